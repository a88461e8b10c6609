"""`headrace bench gpu`: decoding, mixed load, prefill, bursts and the start, against a peer's figures and the floor.

Random weights made on the device, token ids in and out, greedy unless said otherwise, no prefix cache, one engine a
geometry. Time per output token = (seconds of `LLM.generate` with n outputs - seconds with one) / (n - 1), so what the
host does counts. Each figure is printed and written as soon as it is known: a run may be cut.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import headrace
from headrace.bench import trace
from headrace.bench.floors import decode_floor_s, shape_of, work_floor_s
from headrace.bench.geometry import GEOMETRIES, write_model
from headrace.bench.gpu_report import MS, OUTPUT, PROMPT, REQUESTS, SECONDS, Figure, Report
from headrace.bench.report import machine
from headrace.bench.workload import Work, fixed, uniform
from headrace.errors import ConfigError
from headrace.llm import LLM
from headrace.params import SamplingParams

WORKLOADS = ("start", "decode", "mixed", "prefill", "burst")
"""In the order in which they run: a start needs the GPU's memory for itself."""
VOCABULARY = 10_000
"""Prompts are made of the lowest token ids, as the peer's were."""
MIXED_TEMPERATURE = 0.6
REPEATED_S, REPETITIONS = 1.0, 5
"""Decoding that takes less is measured again, so many times at most; the median counts."""
FIRST_TOKEN = "headrace.bench.first_token"
"""The module that a start runs."""


class Decode(NamedTuple):
    """Requests that decode together."""

    batch: int
    context: int
    outputs: int


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are. The defaults are those of the peer's figures; tests take smaller ones."""

    decodes: tuple[Decode, ...] = (*(Decode(b, 1024, 129) for b in (1, 8, 32, 64, 128, 256)), Decode(32, 15_000, 256))
    mixed: tuple[int, int, int] = (256, 100, 1024)
    """Requests, and the shortest and longest prompt and output."""
    prefill: tuple[int, int] = (16, 8192)
    burst: tuple[int, int, int] = (256, 2600, 60)
    start_prompt: int = 128
    warm_fixed: tuple[int, int, int] = (4, 128, 16)
    warm_mixed: int = 32
    max_num_seqs: int = 256
    max_model_len: int = 16_384
    options: dict[str, Any] = field(default_factory=dict)
    """More options of the engine."""


SIZES = Sizes()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    names = sorted(GEOMETRIES)
    parser.add_argument("--geometry", nargs="+", choices=names, default=names, help="models (default: all)")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="(default: all)")
    parser.add_argument(
        "--batches",
        nargs="+",
        metavar="N[xCONTEXT]",
        help="requests that decode together, and their context (default: what the peer was measured with)",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to measure (default: cuda)")
    parser.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="also show where the time of a step goes, for decode, mixed and prefill; FILE: keep the traces beside it, "
        "FILE-geometry-workload.json, for a viewer",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file, row by row")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file, row by row")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    decodes = _decodes(arguments)
    _check(arguments)
    report = Report(machine(), arguments.device, arguments.json, arguments.markdown)
    workloads = [name for name in WORKLOADS if name in arguments.workload]
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: write_model(Path(scratch), name) for name in arguments.geometry}
        if "start" in workloads:
            for name, path in paths.items():
                _starts(report, name, path, arguments.device)
        rest = [name for name in workloads if name != "start"]
        for name, path in paths.items():
            if rest:
                _measure(report, name, path, arguments, rest, decodes)
    print(f"\n{report.text()}")
    return 1 if report.failures else 0


def _decodes(arguments: argparse.Namespace) -> list[Decode]:
    """The batches asked for. Raises ConfigError for words that are none."""
    if arguments.batches is None:
        return list(SIZES.decodes)
    if "decode" not in arguments.workload:
        raise ConfigError("--batches is of the workload decode, which was not asked for: leave it out, or add decode")
    found = []
    for word in arguments.batches:
        numbers = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", word)
        if numbers is None:
            raise ConfigError(f"--batches has {word!r}; give numbers of requests, or requests x context as in 32x15000")
        wanted = int(numbers[1]), int(numbers[2] or SIZES.decodes[0].context)
        outputs = {d[:2]: d.outputs for d in SIZES.decodes}.get(wanted, SIZES.decodes[0].outputs)
        if wanted[0] > SIZES.max_num_seqs or wanted[1] + outputs > SIZES.max_model_len:
            raise ConfigError(
                f"--batches has {word!r}; at most {SIZES.max_num_seqs} requests of {SIZES.max_model_len - outputs} "
                "tokens of context are measured: ask for less"
            )
        found.append(Decode(*wanted, outputs))
    return found


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for what cannot be measured."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch finds no GPU here: run it where there is one, or pass --device cpu for figures of the CPU, which "
            "are compared with nothing"
        )
    for name, file in (("json", arguments.json), ("markdown", arguments.markdown), ("trace", arguments.trace)):
        if file and not Path(file).parent.is_dir():
            raise ConfigError(f"--{name} is {file}, but there is no directory {Path(file).parent}: make it first")
    if arguments.trace is None:
        return
    if arguments.device == "cpu":
        raise ConfigError("--trace looks at the kernels of a GPU, and --device is cpu: leave one of them out")
    if not {"decode", *TRACES} & set(arguments.workload):
        raise ConfigError(
            f"--trace looks at decode, mixed and prefill; asked for: {', '.join(arguments.workload)}: leave it out, or "
            "add one"
        )


def _engine_options(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "dtype": "bfloat16",
        "load_format": "random",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_num_seqs": SIZES.max_num_seqs,
        "max_model_len": SIZES.max_model_len,
        "gpu_memory_utilization": 0.88,
        **SIZES.options,
    }


# Measuring


class Rig:
    """One engine that everything of a geometry is measured with."""

    def __init__(self, path: Path, device: str, **options: Any) -> None:
        self.llm = LLM(str(path), **{**_engine_options(device), **options})
        self.vocab_size = min(VOCABULARY, self.llm.engine.vocab_size)
        # One run before the timed one is then enough for wide steps, too.
        for recorder in (self.llm.engine.runner.graphs, self.llm.engine.runner.pieces):
            if recorder is not None:
                recorder.recent.meetings = 1

    def fixed(self, count: int, prompt: int, outputs: int, seed: int = 1) -> list[Work]:
        """Prompts and outputs of one length."""
        return fixed(count, prompt, outputs, self.vocab_size, seed)

    def mixed(self, count: int, seed: int = 0) -> list[Work]:
        """Lengths of the mixed workload."""
        return uniform(count, *SIZES.mixed[1:], self.vocab_size, seed)

    def seconds(self, works: Sequence[Work], temperature: float = 0.0) -> float:
        """Of one `LLM.generate`, from token ids to token ids."""
        params = [
            SamplingParams(temperature=temperature, max_tokens=w.output_tokens, ignore_eos=True, detokenize=False)
            for w in works
        ]
        prompts = [work.prompt_ids for work in works]
        if self.llm.engine.device.type == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        outputs = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - start_s
        if [len(o.outputs[0].token_ids) for o in outputs] != [w.output_tokens for w in works]:
            raise RuntimeError("a request did not produce the tokens asked for; the figure would mean nothing")
        return seconds

    @contextlib.contextmanager
    def preemptions(self) -> Iterator[Callable[[], str]]:
        """A note on the requests that had to give way within, if there were any."""
        before = self.llm.engine.stats.preemptions

        def note() -> str:
            count = self.llm.engine.stats.preemptions - before
            return f"{count} preemptions: the cache does not hold all requests" if count else ""

        yield note

    def close(self) -> None:
        """Give the memory back."""
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _measure(
    report: Report,
    name: str,
    path: Path,
    arguments: argparse.Namespace,
    workloads: Sequence[str],
    decodes: Sequence[Decode],
) -> None:
    rig: Rig | None = None
    with report.part(name, "engine"):
        rig = Rig(path, arguments.device)
    if rig is None:
        return
    with report.part(name, "warm-up"):
        rig.seconds(rig.fixed(*SIZES.warm_fixed))
        rig.seconds(rig.mixed(SIZES.warm_mixed, seed=5), MIXED_TEMPERATURE)
    traced = arguments.trace is not None
    for workload in workloads:
        if workload == "decode":
            for decode in decodes:
                with report.part(name, _decode_name(decode)):
                    report.add(_decode(rig, name, decode))
                if traced:
                    with report.part(name, f"trace of {_decode_name(decode)}"):
                        _trace_decode(report, rig, name, decode, arguments.trace)
            continue
        with report.part(name, workload):
            for figure in MEASURES[workload](rig, name):
                report.add(figure)
        if traced and workload in TRACES:
            with report.part(name, f"trace of {workload}"):
                TRACES[workload](report, rig, name, arguments.trace)
    with report.part(name, "end"):
        rig.llm.engine.check_idle()
        rig.close()


def _decode_name(decode: Decode) -> str:
    return f"decode {decode.batch} x {decode.context}"


def _decode(rig: Rig, name: str, decode: Decode) -> Figure:
    batch, context, outputs = decode
    # So that the steps of this batch, and of what is left of it towards the end, are recorded before they are timed:
    # the peer records its steps when it starts.
    rig.seconds(rig.fixed(batch, context, outputs))
    with rig.preemptions() as note:
        found_s: list[float] = []
        while not found_s or (sum(found_s) < REPEATED_S and len(found_s) < REPETITIONS):
            first_s = rig.seconds(rig.fixed(batch, context, 1, seed=2))
            all_s = rig.seconds(rig.fixed(batch, context, outputs, seed=3))
            if all_s <= first_s:
                raise RuntimeError(f"{outputs} tokens took no longer than one; the figure would mean nothing")
            found_s.append(all_s - first_s)
        floor_s = decode_floor_s(shape_of(GEOMETRIES[name]), *decode)
        ours_ms = statistics.median(found_s) / (outputs - 1) * 1e3
        return Figure(name, _decode_name(decode), MS, ours_ms, floor_s * 1e3, note())


def _mixed(rig: Rig, name: str) -> Iterator[Figure]:
    count = SIZES.mixed[0]
    works = rig.mixed(count)
    tokens = sum(work.output_tokens for work in works)
    floor = tokens / work_floor_s(shape_of(GEOMETRIES[name]), works)
    for repetition in (1, 2):
        with rig.preemptions() as note:
            rate = tokens / rig.seconds(works, MIXED_TEMPERATURE)
            notes = [f"run {repetition} of 2", note()]
            yield Figure(name, f"mixed {count}", OUTPUT, rate, floor, "; ".join(filter(None, notes)))


def _prefill(rig: Rig, name: str) -> Iterator[Figure]:
    count, prompt = SIZES.prefill
    rig.seconds(rig.fixed(count, prompt, 1))
    works = rig.fixed(count, prompt, 1, seed=3)
    floor = count * prompt / work_floor_s(shape_of(GEOMETRIES[name]), works)
    with rig.preemptions() as note:
        rate = count * prompt / rig.seconds(works)
        yield Figure(name, f"prefill {count} x {prompt}", PROMPT, rate, floor, note())


def _burst(rig: Rig, name: str) -> Iterator[Figure]:
    count, prompt, outputs = SIZES.burst
    # As for decoding: the shapes of such steps are met before they are timed.
    rig.seconds(rig.fixed(count, prompt, outputs, seed=2))
    works = rig.fixed(count, prompt, outputs)
    floor = count / work_floor_s(shape_of(GEOMETRIES[name]), works)
    with rig.preemptions() as note:
        rate = count / rig.seconds(works)
        yield Figure(name, f"burst {count} x {prompt} + {outputs}", REQUESTS, rate, floor, note())


MEASURES: dict[str, Callable[[Rig, str], Iterator[Figure]]] = {"mixed": _mixed, "prefill": _prefill, "burst": _burst}


def _starts(report: Report, name: str, path: Path, device: str) -> None:
    """From the start of a process to its first token, with an empty cache of compiled kernels and with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        # What is compiled for a CPU lies elsewhere, and nobody knows here whether it is there already.
        for title in ("start",) if report.on_cpu else ("start, cold", "start, warm"):
            with report.part(name, title):
                seconds, note = _start(path, device, cache)
                if title == "start, warm":
                    note += "; the peer was timed with cold caches only"
                report.add(Figure(name, title, SECONDS, seconds, None, note))


def _start(path: Path, device: str, cache: str) -> tuple[float, str]:
    """Seconds, and where they went."""
    package = str(Path(headrace.__file__).parents[1])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", FIRST_TOKEN, str(path), str(SIZES.start_prompt)]
    start_s = time.monotonic()
    ended = subprocess.run(
        [*command, json.dumps(_engine_options(device))],
        env={**os.environ, "PYTHONPATH": search, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        raise RuntimeError(f"the process that was started ended with {ended.returncode}: {ended.stderr[-2000:]}")
    marks = json.loads(ended.stdout.splitlines()[-1])
    stages = {
        "imports": marks["imported_s"] - start_s,
        "engine": marks["built_s"] - marks["imported_s"],
        "token": marks["token_s"] - marks["built_s"],
    }
    within = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in marks["stages"].items() if seconds >= 0.05)
    stages_note = ", ".join(
        f"{stage} {seconds:.1f} s" + (f" ({within})" if stage == "engine" and within else "")
        for stage, seconds in stages.items()
    )
    return marks["token_s"] - start_s, stages_note


# Traces

TRACED_DECODE_STEPS = 48
TRACED_PREFILL_STEPS = 6
TRACED_MIXED_STEPS = 64
MIXED_SETTLED = 150
"""Steps of the mixed workload after which requests end and others begin all the time."""


def _trace_decode(report: Report, rig: Rig, name: str, decode: Decode, file: str) -> None:
    # Those that are done with their prompts first decode while the others wait, so they need more tokens.
    works = rig.fixed(decode.batch, decode.context, SIZES.max_model_len - decode.context, seed=6)
    title = f"{name}, {_decode_name(decode)}"
    target = _trace_file(file, title)
    report.add_trace(title, trace.trace(rig.llm, works, steps=TRACED_DECODE_STEPS, decode=True, file=target))


def _trace_prefill(report: Report, rig: Rig, name: str, file: str) -> None:
    prompt = SIZES.prefill[1]
    steps = 3 * TRACED_PREFILL_STEPS + trace.UNSETTLED + 5
    works = rig.fixed(-(-steps * rig.llm.engine.budget // prompt), prompt, 1, seed=6)
    title = f"{name}, prefill of {prompt}, steps of {rig.llm.engine.budget} rows"
    target = _trace_file(file, f"{name}, prefill {prompt}")
    report.add_trace(title, trace.trace(rig.llm, works, steps=TRACED_PREFILL_STEPS, decode=False, file=target))


def _trace_mixed(report: Report, rig: Rig, name: str, file: str) -> None:
    works = rig.mixed(2 * SIZES.mixed[0], seed=7)
    title = f"{name}, mixed {SIZES.mixed[0]}"
    found = trace.trace(
        rig.llm, works, steps=TRACED_MIXED_STEPS, decode=False, after=MIXED_SETTLED, file=_trace_file(file, title)
    )
    report.add_trace(title, found)


TRACES: dict[str, Callable[[Report, Rig, str, str], None]] = {"mixed": _trace_mixed, "prefill": _trace_prefill}


def _trace_file(file: str, title: str) -> Path | None:
    if not file:
        return None
    given = Path(file)
    words = title.replace(",", "").replace(" x ", "x").replace(" ", "-")
    return given.with_name(f"{given.stem}-{words}{given.suffix or '.json'}")
