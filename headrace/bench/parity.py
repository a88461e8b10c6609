"""`headrace bench parity`: what fixed orders of sums cost, with parity on and off side by side.

Random weights made on the device, token ids in and out, greedy, no prefix cache. Time per output token as in `headrace
bench gpu`: (seconds with n outputs - seconds with one) / (n - 1). Two engines a geometry, one after the other. With
parity some requests run again by themselves, and their tokens and log-probs have to be the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.bench.geometry import GEOMETRIES, write_model
from headrace.bench.gpu import Rig
from headrace.bench.report import headline, machine, table
from headrace.errors import ConfigError
from headrace.params import SamplingParams

BATCHES = (1, 64)
CONTEXT = 1024
OUTPUTS = 129
PREFILL = (4, 8192)
"""Requests, and tokens of each."""
ALONE = 2
"""Requests of the largest batch that run again by themselves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    names = sorted(GEOMETRIES)
    parser.add_argument("--geometry", nargs="+", choices=names, default=names, help="models (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="requests that decode together")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"tokens of a prompt (default: {CONTEXT})")
    parser.add_argument("--outputs", type=int, default=OUTPUTS, help=f"tokens of an output (default: {OUTPUTS})")
    parser.add_argument(
        "--prefill",
        nargs=2,
        type=int,
        default=list(PREFILL),
        metavar=("N", "TOKENS"),
        help="requests and tokens of each whose prompts are timed; N 0: none (default: {} {})".format(*PREFILL),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to measure (default: cuda)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status: 1 if a result with parity was not the same."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here: run it where there is one, or pass --device cpu")
    if arguments.outputs < 2 or min(arguments.batches) < 1:
        raise ConfigError("--outputs must be at least 2, and each of --batches at least 1")
    print(headline(machine()))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.geometry:
            path = write_model(Path(scratch), name)
            off, on = (measure(path, arguments, parity=parity) for parity in (False, True))
            for work in off:
                ratio = on[work] / off[work] if isinstance(off[work], float) else None
                cost = None if ratio is None else round((ratio - 1.0) * 100.0, 1)
                row = {"geometry": name, "work": work, "off": off[work], "on": on[work], "cost_percent": cost}
                rows.append(row)
                print(json.dumps(row), flush=True)
    print(f"\n{table(rows)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 1 if any("differ" in row["work"] and row["on"] for row in rows) else 0


def measure(path: Path, arguments: argparse.Namespace, *, parity: bool) -> dict[str, Any]:
    """Figures of one engine by their names: milliseconds, and requests that differ from what they are alone."""
    most = max(arguments.context + arguments.outputs, arguments.prefill[1] + 1)
    rig = Rig(path, arguments.device, parity=parity, max_model_len=most)
    found: dict[str, Any] = {}

    def seconds(count: int, prompt: int, outputs: int, seed: int) -> float:
        return rig.seconds(rig.fixed(count, prompt, outputs, seed))

    for batch in arguments.batches:
        seconds(batch, arguments.context, min(arguments.outputs, 17), 1)
        seconds(batch, arguments.context, arguments.outputs, 2)
        first_s, all_s = (seconds(batch, arguments.context, n, 3) for n in (1, arguments.outputs))
        name = f"decode {batch} x {arguments.context}, ms a token"
        found[name] = round((all_s - first_s) / (arguments.outputs - 1) * 1e3, 3)
    count, tokens = arguments.prefill
    if count:
        seconds(count, tokens, 1, 4)
        found[f"prefill {count} x {tokens}, ms"] = round(seconds(count, tokens, 1, 5) * 1e3, 1)
    found[f"requests of {ALONE} that differ alone"] = _differing(rig, arguments)
    rig.close()
    return found


def _differing(rig: Rig, arguments: argparse.Namespace) -> int:
    """How many of the first requests of a batch have other tokens or log-probs by themselves."""
    works = rig.fixed(max(arguments.batches), arguments.context, min(arguments.outputs, 64), 6)
    prompts = [work.prompt_ids for work in works]

    def outcomes(some: Sequence[Sequence[int]]) -> list[Any]:
        params = SamplingParams(temperature=0.0, max_tokens=works[0].output_tokens, ignore_eos=True, detokenize=False)
        found = [output.outputs[0] for output in rig.llm.generate([list(prompt) for prompt in some], params)]
        return [(one.token_ids, one.cumulative_logprob) for one in found]

    batched = outcomes(prompts)[:ALONE]
    return sum(outcomes([prompt])[0] != one for prompt, one in zip(prompts[:ALONE], batched, strict=True))
