"""`headrace bench cpu`: the bundled model against transformers' `generate`, same requests, same run.

The peer gets its best case: greedy, key-value cache, no gradients, requests sorted by length so that a batch
pads little, and the best of several batch sizes and sort orders. Both sides run in turn, and the figure is
the median ratio, because absolute times on a shared CPU mean little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.bench.report import headline, machine, table
from headrace.bench.workload import Work, uniform
from headrace.errors import ConfigError
from headrace.llm import BUNDLED_MODEL, LLM
from headrace.params import SamplingParams

ORDERS: dict[str, Callable[[Work], tuple[int, int]]] = {
    "by output": lambda work: (work.output_tokens, len(work.prompt_ids)),
    "by prompt": lambda work: (len(work.prompt_ids), work.output_tokens),
}

FINALISTS = 3
"""Settings of the peer that run twice before one is chosen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", type=str, default=str(BUNDLED_MODEL), help="checkpoint directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of both sides")
    parser.add_argument("--requests", type=int, default=64, help="number of requests (default: 64)")
    parser.add_argument("--low", type=int, default=16, help="shortest prompt and output in tokens (default: 16)")
    parser.add_argument("--high", type=int, default=128, help="longest prompt and output in tokens (default: 128)")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="batch sizes the peer tries"
    )
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--scheduler", default="splitfuse", help="step composer (default: splitfuse)")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    llm = LLM(
        arguments.model, device="cpu", dtype=arguments.dtype, scheduler=arguments.scheduler, skip_tokenizer_init=True
    )
    works = uniform(arguments.requests, arguments.low, arguments.high, llm.engine.vocab_size)
    wanted = sum(work.output_tokens for work in works)
    peer = Peer(arguments.model, getattr(torch, arguments.dtype))
    _progress("warming up")
    run_headrace(llm, works[:8])
    peer.run(works[:8], 8, "by output")
    tried: dict[tuple[str, int], float] = {}
    for order in ORDERS:
        for size in arguments.batch_sizes:
            _progress(f"transformers, batches of {size}, sorted {order}")
            tried[order, size] = peer.run(works, size, order)
    # One run decides little on a shared machine: the fastest settings run again, and the better time counts.
    for order, size in sorted(tried, key=lambda key: tried[key])[:FINALISTS]:
        _progress(f"transformers again, batches of {size}, sorted {order}")
        tried[order, size] = min(tried[order, size], peer.run(works, size, order))
    best = min(tried, key=lambda key: tried[key])
    llm.engine.runner.times = type(llm.engine.runner.times)()
    ours, theirs = [], []
    for i in range(arguments.repeats):
        _progress(f"pair {i + 1} of {arguments.repeats}")
        ours.append(run_headrace(llm, works))
        theirs.append(peer.run(works, best[1], best[0]))
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    rows = [
        {
            "engine": "headrace",
            "setting": f"{llm.config.scheduler}, budget {llm.engine.budget}",
            **_figures(ours, wanted),
        },
        {
            "engine": f"transformers {peer.version}",
            "setting": f"batch {best[1]}, sorted {best[0]}",
            **_figures(theirs, wanted),
        },
    ]
    shares = llm.engine.runner.times.shares()
    facts = machine()
    text = (
        f"{headline(facts)}\n\n{arguments.requests} requests, prompt and output lengths uniform "
        f"{arguments.low}..{arguments.high}, {wanted} output tokens, {arguments.dtype}, greedy, "
        f"model {Path(arguments.model).name}\n\n{table(rows)}\n\n"
        f"headrace / transformers, median of {arguments.repeats} pairs: **{ratio:.2f}x**\n\n"
        "Share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + "\n\n"
        "Every setting tried for transformers (one run each, the fastest twice):\n\n"
        + table([{"batch": s, "sorted": o.removeprefix("by "), "tok/s": wanted / t} for (o, s), t in tried.items()])
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(f"# CPU: `headrace bench cpu`\n\n{text}\n", encoding="utf-8")
    if arguments.json:
        figures = {"machine": facts, "ratio": ratio, "rows": rows, "shares": shares}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def run_headrace(llm: LLM, works: Sequence[Work]) -> float:
    """Seconds for all requests; the prefix cache starts empty."""
    llm.engine.forget_prefixes()
    params = [
        SamplingParams(temperature=0.0, max_tokens=w.output_tokens, ignore_eos=True, detokenize=False) for w in works
    ]
    start_s = time.perf_counter()
    outputs = llm.generate([w.prompt_ids for w in works], params)
    seconds = time.perf_counter() - start_s
    if [len(o.outputs[0].token_ids) for o in outputs] != [w.output_tokens for w in works]:
        raise RuntimeError("a request did not produce the tokens asked for; the figure would mean nothing")
    return seconds


class Peer:
    """transformers' `generate` on padded batches."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(
                "the peer is transformers, which is not installed: pip install 'headrace[dev]'"
            ) from error
        transformers.logging.set_verbosity_error()
        self.version = transformers.__version__
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=None)

    @torch.inference_mode()
    def run(self, works: Sequence[Work], size: int, order: str) -> float:
        """Seconds for all requests in batches of `size`; each batch generates as long as its longest output."""
        ordered = sorted(works, key=ORDERS[order])
        start_s = time.perf_counter()
        for first in range(0, len(ordered), size):
            batch = ordered[first : first + size]
            width = max(len(w.prompt_ids) for w in batch)
            ids = torch.tensor([[0] * (width - len(w.prompt_ids)) + w.prompt_ids for w in batch])
            mask = torch.tensor([[0] * (width - len(w.prompt_ids)) + [1] * len(w.prompt_ids) for w in batch])
            longest = max(w.output_tokens for w in batch)
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
            )
            if out.shape[1] != width + longest:
                raise RuntimeError("the peer stopped early; the figure would mean nothing")
        return time.perf_counter() - start_s


def _figures(seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {
        "seconds (min, median, max)": f"{min(seconds):.2f}, {middle:.2f}, {max(seconds):.2f}",
        "tok/s": tokens / middle,
    }


def _progress(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
