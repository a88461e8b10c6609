"""`headrace bench quantization`: what 8-bit and 4-bit weights cost and save, on a model that is quantised here.

The loss is bits per byte (what the model needs to encode a text, teacher-forced) on Python files that the bundled model
has not been trained on: Headrace's own, or those given. Every file is scored from its beginning, in windows that slide
by half their length, as in the recipe of the bundled model. Bytes are those that the parameters take in memory while
the model runs. Speed is decoding, each form and the dense model in turn, a block each: the median of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headrace.bench.report import headline, machine, table
from headrace.bench.workload import fixed
from headrace.engine.feed import feed
from headrace.errors import ConfigError
from headrace.layers.linear import Linear
from headrace.llm import BUNDLED_MODEL, LLM
from headrace.models.convert import quantise_checkpoint
from headrace.params import SamplingParams
from headrace.quantization.write import form_of
from headrace.text.tokenizer import Tokenizer

CALIBRATION = ("argparse.py", "dataclasses.py", "json/decoder.py", "logging/__init__.py", "pathlib.py", "textwrap.py")
"""Files of the standard library; of most such files the bundled model has seen some version."""
SEQUENCE = 512


class Case(NamedTuple):
    """One way to quantise."""

    method: str
    group_size: int = 128
    calibrated: bool = False
    desc_act: bool = False

    @property
    def rounding(self) -> str:
        """In words."""
        if not self.calibrated:
            return "nearest"
        return "GPTQ, ordered" if self.desc_act else "GPTQ"


def cases(group_sizes: Sequence[int]) -> list[Case]:
    """All that are measured."""
    ways = [
        Case(method, group, calibrated)
        for group in group_sizes
        for calibrated in (False, True)
        for method in ("awq", "gptq")
    ]
    return [Case("fp8"), *ways, *(Case("gptq", group, True, True) for group in group_sizes)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="checkpoint directory (default: the bundled model)")
    parser.add_argument("--text", type=Path, nargs="+", help="files to score (default: Headrace's own modules)")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to score at most (default: 100000)")
    parser.add_argument("--calibration-tokens", type=int, default=32_768, help="tokens to round by (default: 32768)")
    parser.add_argument(
        "--group-sizes",
        type=int,
        nargs="+",
        default=[128, 32],
        help="inputs of a group, awq and gptq (default: 128 32)",
    )
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of what is not quantised (default: auto)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="requests that decode together")
    parser.add_argument("--steps", type=int, default=64, help="tokens that each request decodes (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of blocks (default: 7)")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    tokenizer = Tokenizer.from_dir(Path(arguments.model))
    texts = _read(arguments.text or sorted(Path(__file__).resolve().parent.parent.rglob("*.py")))
    root = Path(sysconfig.get_paths()["stdlib"])
    ids = [token for text in _read([root / name for name in CALIBRATION]) for token in tokenizer.encode(text)]
    ids = ids[: arguments.calibration_tokens]
    sequences = [ids[start : start + SEQUENCE] for start in range(0, len(ids), SEQUENCE)]
    dense = _load(arguments, arguments.model)
    known, scored, scored_bytes = score(dense, tokenizer, texts, arguments.tokens)
    rows: list[dict[str, Any]] = [
        {"layout": "dense", "rounding": "", "group": "", "bits per byte": f"{known:.4f}", "more": "", **_memory(dense)}
        | {f"speed, {size} requests": "1" for size in arguments.batch_sizes}
    ]
    for case in cases(arguments.group_sizes):
        _progress(f"{case.method}, {case.rounding}, group {case.group_size}")
        with tempfile.TemporaryDirectory() as directory:
            quantise_checkpoint(
                arguments.model,
                directory,
                form_of(case.method, case.group_size, desc_act=case.desc_act),
                feed=(lambda model: feed(model, sequences)) if case.calibrated else None,
            )
            llm = _load(arguments, directory)
        bits, _, _ = score(llm, tokenizer, texts, arguments.tokens)
        row = {
            "layout": case.method,
            "rounding": case.rounding,
            "group": "output" if case.method == "fp8" else str(case.group_size),
            "bits per byte": f"{bits:.4f}",
            "more": f"{bits / known - 1:+.2%}",
            **_memory(llm),
        }
        for size in arguments.batch_sizes:
            row[f"speed, {size} requests"] = f"{_speed(llm, dense, size, arguments.steps, arguments.repeats):.2f}"
        rows.append(row)
        _progress(f"{row}")
    facts = machine()
    text = (
        f"{headline(facts)}\n\n{Path(arguments.model).name}, {dense.engine.device}; {scored:,} tokens, "
        f"{scored_bytes:,} bytes of text scored; rounding by GPTQ saw {len(ids):,} tokens. Speed is relative to the "
        f"dense model, whose type is {_dtype(dense)}.\n\n{table(rows)}"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(f"# Quantised weights: `headrace bench quantization`\n\n{text}\n", "utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", "utf-8")
    return 0


def _progress(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


def _read(paths: Sequence[Path]) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text cannot be read ({error}): give files of UTF-8 text") from error


def _load(arguments: argparse.Namespace, path: str) -> LLM:
    return LLM(
        path,
        device=arguments.device,
        dtype=arguments.dtype,
        kv_cache_gib=0.5,
        max_num_batched_tokens=1024,  # the same for all: on a busy machine the measured budget can be any
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )


def windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored token) of windows over tokens 0 .. length - 1; every token from 1 on is scored once."""
    result, scored, start = [], 1, 0
    while scored < length:
        end = min(length, start + window)
        result.append((start, end, scored))
        scored, start = end, start + window // 2
    return result


def score(llm: LLM, tokenizer: Tokenizer, texts: Sequence[str], most: int) -> tuple[float, int, int]:
    """Bits per byte of whole texts, as many as have `most` tokens together; the tokens and bytes that were scored."""
    jobs: list[tuple[list[int], int]] = []
    n_tokens = n_bytes = 0
    bos = llm.engine.model.config.bos_token_id
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if n_tokens and n_tokens + len(ids) > most:
            continue
        n_tokens, n_bytes = n_tokens + len(ids), n_bytes + len(text.encode())
        ids = ids if bos is None else [bos, *ids]
        for start, end, first in windows(len(ids), llm.engine.max_model_len):
            jobs.append((ids[start:end], first - start))
    outputs = llm.score([{"prompt_token_ids": ids} for ids, _ in jobs])
    nats = -sum(
        sum(p for p in o.logprobs[first:] if p is not None) for o, (_, first) in zip(outputs, jobs, strict=True)
    )
    return nats / math.log(2) / n_bytes, n_tokens, n_bytes


def _memory(llm: LLM) -> dict[str, str]:
    """Bytes of linear maps and of all parameters, in MiB."""
    model = llm.engine.model
    maps = [m for m in model.modules() if isinstance(m, Linear)]
    weights = sum(m.inputs * sum(m.outputs) for m in maps)
    inside = sum(p.nbytes for m in maps for p in m.parameters())
    return {
        "bits a weight": f"{8 * inside / weights:.2f}",
        "linear maps, MiB": f"{inside / 2**20:.1f}",
        "all, MiB": f"{sum(p.nbytes for p in model.parameters()) / 2**20:.1f}",
    }


def _speed(llm: LLM, dense: LLM, size: int, steps: int, repeats: int) -> float:
    """Tokens a second of `llm`, relative to those of `dense`."""
    ratios = []
    for _ in range(repeats + 1):
        ours, theirs = (_seconds(one, size, steps) for one in (llm, dense))
        ratios.append(theirs / ours)
    return statistics.median(ratios[1:])  # the first pair warms up


def _seconds(llm: LLM, size: int, steps: int) -> float:
    works = fixed(size, 16, steps, llm.engine.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": work.prompt_ids} for work in works], params)
    return time.perf_counter() - start


def _dtype(llm: LLM) -> str:
    return str(llm.engine.dtype).removeprefix("torch.")
