"""`headrace generate`: complete the prompts of a JSONL file, or of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.commands.options import NAMED_TWICE, add_options, read_options
from headrace.config import EngineConfig
from headrace.errors import RequestError
from headrace.outputs import RequestOutput
from headrace.params import SamplingParams
from headrace.request import PositionLogprobs

if TYPE_CHECKING:
    from headrace.llm import LLM

SHOWN = 3
"""Completions printed at the end."""
DEFAULTS: dict[str, Any] = {"max_tokens": 128}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "input", nargs="?", type=Path, help='JSONL file, a line {"prompt": ...}; "-" for standard input'
    )
    parser.add_argument("-p", "--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument(
        "-o", "--output", type=Path, help="JSONL file for the completions; standard output if not given"
    )
    parser.add_argument("--compare", action="store_true", help="also run the same requests one at a time, and compare")
    add_options(parser, SamplingParams, "sampling", skip=NAMED_TWICE, **DEFAULTS)
    add_options(parser, EngineConfig, "engine", skip=("seed",))


@dataclass
class Job:
    """One line of the input."""

    prompt: Any
    params: SamplingParams
    extra: dict[str, Any]
    """Fields handed through to the output, such as `id`."""


def run(arguments: argparse.Namespace) -> int:
    """The whole command. Returns the exit status."""
    from headrace.llm import LLM  # here, so that --help does not wait for torch

    defaults = read_options(arguments, SamplingParams, skip=NAMED_TWICE, **DEFAULTS)
    jobs = [Job(text, defaults, {}) for text in arguments.prompt]
    if arguments.input is not None:
        jobs += read_jobs(arguments.input, defaults)
    if not jobs:
        raise RequestError("there is nothing to complete: name a JSONL file or give --prompt")
    started_s = time.perf_counter()
    print("loading the model; on a CPU the very first run also compiles kernels, up to half a minute", file=sys.stderr)
    config = read_options(arguments, EngineConfig, skip=("seed",))
    llm = LLM(**dataclasses.asdict(config))
    print(f"model ready in {time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    prompts, params = [job.prompt for job in jobs], [job.params for job in jobs]
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty() or arguments.compare)
    batch_s = time.perf_counter() - start_s
    lines = [json.dumps(_line(job, output), ensure_ascii=False) for job, output in zip(jobs, outputs, strict=True)]
    if arguments.output is None:
        print("\n".join(lines))
    else:
        _write(arguments.output, lines)
    rows = [("batched", outputs, batch_s)]
    if arguments.compare:
        rows.append(("one at a time", *_one_at_a_time(llm, prompts, params)))
    _report(rows, arguments.output)
    return 1 if any(sample.error for output in outputs for sample in output.outputs) else 0


def read_jobs(path: Path, defaults: SamplingParams) -> list[Job]:
    """Jobs of a JSONL file. Raises RequestError naming the line that cannot be read."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}; give a JSONL file with one prompt a line") from error
    jobs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RequestError(f"{path}, line {number}: not JSON ({error.msg}): {line:.60}") from error
        if not isinstance(record, dict) or not ("prompt" in record or "prompt_token_ids" in record):
            raise RequestError(f'{path}, line {number}: needs "prompt" or "prompt_token_ids"')
        given = record.pop("params", {})
        known = {spec.name for spec in dataclasses.fields(SamplingParams)}
        if not isinstance(given, dict) or set(given) - known:
            raise RequestError(f"{path}, line {number}: params {given!r:.80}; known: {', '.join(sorted(known))}")
        prompt = {key: record.pop(key) for key in ("prompt", "prompt_token_ids") if key in record}
        jobs.append(Job(prompt, dataclasses.replace(defaults, **given), record))
    return jobs


def _line(job: Job, output: RequestOutput) -> dict[str, Any]:
    samples = [
        {
            "text": sample.text,
            "finish_reason": sample.finish_reason,
            "output_tokens": len(sample.token_ids),
            **({"token_ids": sample.token_ids} if not job.params.detokenize else {}),
            **({"cumulative_logprob": sample.cumulative_logprob} if sample.cumulative_logprob is not None else {}),
            **({"logprobs": _logprobs(sample.logprobs)} if sample.logprobs is not None else {}),
            **({"error": str(sample.error)} if sample.error else {}),
        }
        for sample in output.outputs
    ]
    head = {"prompt": output.prompt} if output.prompt is not None else {"prompt_token_ids": output.prompt_token_ids}
    body = samples[0] if len(samples) == 1 else {"samples": samples}
    line = {**job.extra, **head, **body, "prompt_tokens": len(output.prompt_token_ids), "seed": output.seed}
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = _logprobs(output.prompt_logprobs)
    return line


def _logprobs(positions: Sequence[PositionLogprobs | None]) -> list[dict[int, float] | None]:
    """Token id to log-probability at each position; the first prompt token has none."""
    return [p if p is None else {token: entry.logprob for token, entry in p.items()} for p in positions]


def _write(path: Path, lines: Sequence[str]) -> None:
    """Whole or not at all: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _one_at_a_time(
    llm: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]
) -> tuple[list[RequestOutput], float]:
    llm.engine.forget_prefixes()  # else the second run would find its prompts in the prefix cache
    outputs = []
    start_s = time.perf_counter()
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        print(f"\rone at a time: {i + 1}/{len(prompts)}", end="", file=sys.stderr)
        outputs += llm.generate(prompt, one)
    print(file=sys.stderr)
    return outputs, time.perf_counter() - start_s


def _report(rows: Sequence[tuple[str, list[RequestOutput], float]], path: Path | None) -> None:
    outputs = rows[0][1]
    out = sys.stderr
    if path is not None:
        for output in outputs[:SHOWN]:
            print(f"\n--- request {output.request_id} " + "-" * 50, file=out)
            print((output.prompt or "") + output.outputs[0].text, file=out)
        print(f"\n{len(outputs)} completions in {path}\n", file=out)
    print(
        f"{'':<16}{'requests':>10}{'prompt tok':>12}{'output tok':>12}{'seconds':>10}{'tok/s':>10}{'TTFT ms':>10}",
        file=out,
    )
    for name, done, seconds in rows:
        prompt_tokens = sum(len(o.prompt_token_ids) for o in done)
        output_tokens = sum(len(s.token_ids) for o in done for s in o.outputs)
        first_ms = [1e3 * o.metrics.ttft_s for o in done if o.metrics and o.metrics.ttft_s is not None]
        ttft = f"{statistics.median(first_ms):.0f}" if first_ms else "-"
        print(
            f"{name:<16}{len(done):>10}{prompt_tokens:>12}{output_tokens:>12}{seconds:>10.2f}"
            f"{output_tokens / seconds:>10,.0f}{ttft:>10}",
            file=out,
        )
    if len(rows) == 2:
        print(f"\nbatched is {rows[1][2] / rows[0][2]:.1f} times as fast", file=out)
