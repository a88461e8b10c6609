"""`headrace bench adapters`: what adapters cost, the same requests with none, in some and in all of them.

An engine without room for adapters and one with room run in turn; the figures are medians of the ratios within a round,
because absolute times on a shared CPU mean little. There it is processor time that counts. Factors are random: their
values do not change the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.bench.report import headline, machine, table
from headrace.bench.workload import Work, uniform
from headrace.errors import ConfigError
from headrace.llm import BUNDLED_MODEL, LLM
from headrace.models.adapters import Adapter, Pair
from headrace.params import SamplingParams

ADAPTERS = 4
SETTINGS: dict[str, Sequence[str | None]] = {
    "room, and nobody has one": (None,),
    "half of the requests, one adapter": (None, "0"),
    "all requests, one adapter": ("0",),
    f"all requests, {ADAPTERS} adapters": tuple(map(str, range(ADAPTERS))),
}
"""Names of adapters that requests have in turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", type=str, default=str(BUNDLED_MODEL), help="checkpoint directory")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to measure (default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of the model (default: auto)")
    parser.add_argument("--load-format", default="auto", choices=["auto", "random"], help="random: random weights")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters, on every linear map (default: 16)")
    parser.add_argument("--requests", type=int, default=64, help="number of requests (default: 64)")
    parser.add_argument("--low", type=int, default=16, help="shortest prompt and output in tokens (default: 16)")
    parser.add_argument("--high", type=int, default=128, help="longest prompt and output in tokens (default: 128)")
    parser.add_argument("--threads", type=int, help="of torch; 1 on a machine that others use too")
    parser.add_argument("--budget", type=int, default=512, help="rows of a step (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    if arguments.rank < 1:
        raise ConfigError(f"rank is {arguments.rank}; it must be at least 1")
    common = {
        "device": arguments.device,
        "dtype": arguments.dtype,
        "load_format": arguments.load_format,
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": arguments.budget,
        "kv_cache_gib": 0.5 if arguments.device == "cpu" else None,
    }
    plain = LLM(arguments.model, **common)
    roomy = LLM(arguments.model, max_adapters=ADAPTERS, max_adapter_rank=arguments.rank, **common)
    if arguments.threads is not None:  # behind the first kernels, whose threads overwrite the setting
        torch.set_num_threads(arguments.threads)
    for number in range(ADAPTERS):
        roomy.engine.load_adapter(str(number), random_adapter(roomy, arguments.rank, number))
    works = uniform(arguments.requests, arguments.low, arguments.high, plain.engine.vocab_size)
    for names in ((None,), *SETTINGS.values()):
        seconds_of(roomy, works[: max(8, len(works) // 4)], names)
    seconds_of(plain, works, (None,))
    ratios: dict[str, list[float]] = {name: [] for name in SETTINGS}
    base: list[float] = []
    for i in range(arguments.repeats):
        print(f"[round {i + 1} of {arguments.repeats}]", file=sys.stderr, flush=True)
        base.append(seconds_of(plain, works, (None,)))
        for setting, names in SETTINGS.items():
            ratios[setting].append(seconds_of(roomy, works, names) / base[-1])
    tokens = sum(work.output_tokens for work in works)
    rows = [{"setting": "no room for adapters", "time (median)": 1.0, "min": 1.0, "max": 1.0}]
    rows += [
        {"setting": setting, "time (median)": statistics.median(found), "min": min(found), "max": max(found)}
        for setting, found in ratios.items()
    ]
    bank = roomy.engine.model.adapters
    assert bank is not None
    text = (
        f"{headline(machine())}\n\n{arguments.requests} requests, prompt and output lengths uniform "
        f"{arguments.low}..{arguments.high}, {tokens} output tokens, greedy, model {Path(arguments.model).name}, "
        f"{str(roomy.engine.dtype).removeprefix('torch.')}, rank {arguments.rank} on every linear map; {ADAPTERS} "
        f"adapters take {bank.nbytes / 2**20:.1f} MiB. Times are relative to an engine without room for adapters in "
        f"the same round, {arguments.repeats} rounds; that engine took {statistics.median(base):.2f} s.\n\n"
        f"{table(rows)}"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(f"# Adapters: `headrace bench adapters`\n\n{text}\n", encoding="utf-8")
    return 0


def random_adapter(llm: LLM, rank: int, seed: int) -> Adapter:
    """An adapter of every linear map that has room."""
    bank = llm.engine.model.adapters
    assert bank is not None
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: Pair(
            torch.randn(rank, room.inputs, generator=generator) / room.inputs**0.5,
            torch.randn(room.width(name), rank, generator=generator) * 0.01,
            1.0,
        )
        for room in bank.rooms
        for name in room.names
    }
    return Adapter("random", pairs, f"random {seed}")


def seconds_of(llm: LLM, works: Sequence[Work], names: Sequence[str | None]) -> float:
    """Seconds for all requests, on the CPU those of its threads; the prefix cache starts empty."""
    clock = time.process_time if llm.engine.device.type == "cpu" else time.perf_counter
    llm.engine.cache.drop_idle()
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=work.output_tokens,
            ignore_eos=True,
            detokenize=False,
            adapter=names[i % len(names)],
        )
        for i, work in enumerate(works)
    ]
    start_s = clock()
    outputs = llm.generate([work.prompt_ids for work in works], params)
    seconds = clock() - start_s
    if [len(o.outputs[0].token_ids) for o in outputs] != [work.output_tokens for work in works]:
        raise RuntimeError("a request did not produce the tokens asked for; the figure would mean nothing")
    return seconds
