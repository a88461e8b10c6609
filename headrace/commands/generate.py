"""`headrace generate`: complete the prompts of a JSONL file, or of the command line."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.checks import show
from headrace.commands.options import NAMED_TWICE, add_options, read_options
from headrace.commands.output import Lines
from headrace.config import EngineConfig
from headrace.errors import RequestError
from headrace.outputs import RequestOutput
from headrace.params import SamplingParams
from headrace.request import PositionLogprobs

if TYPE_CHECKING:
    from headrace.llm import LLM

LISTED = 8
"""Bad lines that a message names; the rest is counted."""
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
    where: str
    """Where it comes from, for messages."""


def run(arguments: argparse.Namespace) -> int:
    """The whole command. Returns the exit status."""
    defaults = read_options(arguments, SamplingParams, skip=NAMED_TWICE, **DEFAULTS)
    config = read_options(arguments, EngineConfig, skip=("seed",))
    jobs = [Job(text, defaults, {}, f"prompt {i + 1}") for i, text in enumerate(arguments.prompt)]
    if arguments.input is not None:
        jobs += read_jobs(arguments.input, defaults)
    if not jobs:
        raise RequestError("there is nothing to complete: name a JSONL file or give --prompt")
    if arguments.input and arguments.output and _same_file(arguments.input, arguments.output):
        raise RequestError(f"{arguments.output} is the input too: give another file with -o")
    lines = Lines(arguments.output, len(jobs))
    try:
        llm, rows = _complete(jobs, config, lines, use_tqdm=sys.stderr.isatty() or arguments.compare)
        lines.close()
        if arguments.compare:
            rows.append(("one at a time", *_one_at_a_time(llm, jobs)))
    except KeyboardInterrupt:
        lines.abandon()
        print(f"\nheadrace: interrupted; {lines.kept}", file=sys.stderr)
        return 130
    except BaseException:
        lines.abandon()
        raise
    _report(rows, arguments.output)
    return 1 if any(sample.error for output in rows[0][1] for sample in output.outputs) else 0


Row = tuple[str, list[RequestOutput], float]
"""Name of a run, what it made, and its seconds."""


def _complete(jobs: Sequence[Job], config: EngineConfig, lines: Lines, *, use_tqdm: bool) -> tuple[LLM, list[Row]]:
    """Load the model and complete all prompts together."""
    from headrace.llm import LLM  # here, so that --help does not wait for torch

    started_s = time.perf_counter()
    print("loading the model; on a CPU the very first run also compiles kernels, up to half a minute", file=sys.stderr)
    llm = LLM(**dataclasses.asdict(config))
    print(f"model ready in {time.perf_counter() - started_s:.1f} s", file=sys.stderr)
    bad = []
    for job in jobs:
        try:
            llm.front.check(job.prompt, job.params)
        except RequestError as error:
            bad.append(f"{job.where}: {error}")
    _refuse(bad)
    start_s = time.perf_counter()
    outputs = llm.generate(
        [job.prompt for job in jobs],
        [job.params for job in jobs],
        use_tqdm=use_tqdm,
        on_output=lambda place, output: lines.put(place, _line(jobs[place], output)),
    )
    return llm, [("batched", outputs, time.perf_counter() - start_s)]


def read_jobs(path: Path, defaults: SamplingParams) -> list[Job]:
    """Jobs of a JSONL file. Raises RequestError naming every line that cannot be read: all lines are run, or none."""
    try:
        data = sys.stdin.read().encode(errors="surrogateescape") if str(path) == "-" else path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{path}: {reason}; give a JSONL file with one prompt a line") from error
    jobs, bad = [], []
    # At line feeds alone: other separators of Unicode are characters of a text.
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            jobs.append(_read_job(line, defaults, where))
        except RequestError as error:
            bad.append(f"{where}: {error}")
    _refuse(bad)
    return jobs


def _read_job(line: bytes, defaults: SamplingParams, where: str) -> Job:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8 (byte {error.start}): {show(line)}") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise RequestError(f"not JSON ({reason}): {show(line.decode())}") from error
    if not isinstance(record, dict) or not ("prompt" in record or "prompt_token_ids" in record):
        raise RequestError(f'needs "prompt" or "prompt_token_ids": {show(record)}')
    given = record.pop("params", {})
    if not isinstance(given, dict):
        raise RequestError(f"params is {show(given)}; it must be an object")
    try:
        params = SamplingParams.from_dict({**defaults.to_dict(), **given})
    except RequestError as error:
        raise RequestError(f"params: {error}") from error
    prompt = {key: record.pop(key) for key in ("prompt", "prompt_token_ids") if key in record}
    return Job(prompt, params, record, where)


def _refuse(bad: Sequence[str]) -> None:
    """Raise RequestError if there are any bad lines."""
    if len(bad) > 1:
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise RequestError(f"{len(bad)} lines cannot be used, and none was run: {'; '.join(bad[:LISTED])}{more}")
    if bad:
        raise RequestError(bad[0])


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


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


def _one_at_a_time(llm: LLM, jobs: Sequence[Job]) -> tuple[list[RequestOutput], float]:
    llm.engine.cache.drop_idle()  # else the second run would find its prompts in the prefix cache
    outputs = []
    start_s = time.perf_counter()
    for i, job in enumerate(jobs):
        print(f"\rone at a time: {i + 1}/{len(jobs)}", end="", file=sys.stderr)
        outputs += llm.generate(job.prompt, job.params)
    print(file=sys.stderr)
    return outputs, time.perf_counter() - start_s


def _report(rows: Sequence[Row], path: Path | None) -> None:
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
