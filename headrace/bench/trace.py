"""Where the time of a step goes on a GPU: kernels by name, pauses inside a step, and the gap between two steps.

The profiler records what ran on the device and which call of the host started it. Each call of `Engine.step` is marked,
and whatever it launched is a step; with planning ahead, the device runs it after the call. The profiler slows the host
down, so steps are also timed without it.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from headrace.bench.report import table
from headrace.bench.workload import Work
from headrace.engine.engine import Engine
from headrace.engine.runner import Granted, ProcessorRequests, StepReport
from headrace.llm import LLM
from headrace.params import SamplingParams

MARK = "headrace.step"
KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "copy"}
"""Categories of a trace that keep the device busy."""
CALLS = ("cuda_runtime", "cuda_driver")
UNSETTLED = 4
"""Steps at the beginning of a profile that are left out: the profiler is still setting itself up."""
NAMES = 25
NAME_LENGTH = 72


class DeviceEvent(NamedTuple):
    """A kernel or a copy."""

    name: str
    kind: str
    start_us: float
    end_us: float


Step = list[DeviceEvent]
"""What one step ran on the device, in the order of its beginnings."""


@dataclass
class KernelCost:
    """A kernel by name, summed over the steps."""

    count: int = 0
    us: float = 0.0
    idle_us: float = 0.0
    """The device did nothing right before it."""


@dataclass
class StepCosts:
    """What steps cost on the device, in microseconds; the lists have an entry a step, `gaps_us` one less."""

    steps: int
    gaps_us: list[float]
    """From the end of a step's last kernel to the beginning of the next step's first."""
    gap_copies_us: list[float]
    """Copies and fills in these gaps."""
    busy_us: list[float]
    """The device does something; kernels beside each other count once."""
    pauses_us: list[float]
    """The device does nothing, between the first and the last kernel of a step."""
    periods_us: list[float]
    """From the beginning of a step's first kernel to that of the next step's."""
    kernels: dict[str, KernelCost] = field(default_factory=dict)


class Steps(NamedTuple):
    """The steps of a trace."""

    steps: list[Step]
    guessed: int
    """Kernels and copies whose launch the trace lacks: they were put beside what ran before them."""


def split_steps(events: Iterable[dict[str, Any]]) -> Steps:
    """The steps of a trace in Chrome's format.

    Args:
        events: its `traceEvents`. Marks are events of the category user_annotation; a device event belongs to the
            mark within which the call with the same correlation began, a replayed graph's to that of its launch. What
            was launched outside of all marks is left out.

    Raises RuntimeError if the trace lacks most of the launches, or a step has no kernels.
    """
    marks: list[tuple[float, float]] = []
    called_us: dict[int, float] = {}
    device: list[tuple[int, DeviceEvent]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        kind, start_us = event.get("cat"), float(event["ts"])
        if kind == "user_annotation" and event["name"] == MARK:
            marks.append((start_us, start_us + event["dur"]))
        elif kind in CALLS and "correlation" in event.get("args", {}):
            called_us[event["args"]["correlation"]] = start_us
        elif kind in KINDS:
            found = DeviceEvent(event["name"], KINDS[kind], start_us, start_us + event["dur"])
            device.append((event.get("args", {}).get("correlation", -1), found))
    marks.sort()
    starts = [start for start, _ in marks]
    steps: list[Step] = [[] for _ in marks]
    guessed, place = 0, -1
    for correlation, found in sorted(device, key=lambda pair: pair[1].start_us):
        launched_us = called_us.get(correlation)
        if launched_us is None:
            guessed += 1
        else:
            place = bisect.bisect_right(starts, launched_us) - 1
            place = place if place >= 0 and launched_us <= marks[place][1] else -1
        if place >= 0:
            steps[place].append(found)
    if 2 * guessed >= len(device):
        raise RuntimeError(f"the launches of {guessed} of {len(device)} kernels and copies are not in the trace")
    for number, step in enumerate(steps):
        if not any(event.kind == "kernel" for event in step):
            raise RuntimeError(f"step {number} of the trace has no kernels")
    return Steps(steps, guessed)


def measure(steps: Sequence[Step]) -> StepCosts:
    """Gaps, pauses and kernels of at least two consecutive steps."""
    if len(steps) < 2:
        raise RuntimeError(f"{len(steps)} steps in the trace; a gap needs two: let it run longer")
    spans = [_kernel_span(step) for step in steps]
    costs = StepCosts(len(steps), [], [], [], [], [])
    for (_, end_us), (start_us, _), step, after in zip(spans, spans[1:], steps, steps[1:]):
        costs.gaps_us.append(max(0.0, start_us - end_us))
        copies = [event for event in (*step, *after) if event.kind == "copy"]
        costs.gap_copies_us.append(_covered_us(copies, end_us, start_us))
    for (start_us, end_us), step in zip(spans, steps, strict=True):
        busy_us = _covered_us(step, start_us, end_us)
        costs.pauses_us.append(end_us - start_us - busy_us)
        costs.busy_us.append(_covered_us(step, -math.inf, math.inf))
    costs.periods_us = [after[0] - before[0] for before, after in itertools.pairwise(spans)]
    covered_us: float | None = None
    for event in sorted(itertools.chain.from_iterable(steps), key=lambda event: event.start_us):
        cost = costs.kernels.setdefault(event.name, KernelCost())
        cost.count += 1
        cost.us += event.end_us - event.start_us
        if covered_us is not None:
            cost.idle_us += max(0.0, event.start_us - covered_us)
        covered_us = event.end_us if covered_us is None else max(covered_us, event.end_us)
    return costs


def _kernel_span(step: Step) -> tuple[float, float]:
    kernels = [event for event in step if event.kind == "kernel"]
    return min(k.start_us for k in kernels), max(k.end_us for k in kernels)


def _covered_us(events: Iterable[DeviceEvent], low_us: float, high_us: float) -> float:
    """Time within [low, high] during which at least one of the events runs."""
    total, reached_us = 0.0, low_us
    for event in sorted(events, key=lambda event: event.start_us):
        start_us, end_us = max(event.start_us, reached_us), min(event.end_us, high_us)
        if end_us > start_us:
            total += end_us - start_us
            reached_us = end_us
    return total


def median_and_p95(values: Sequence[float]) -> tuple[float, float]:
    """The middle value, and the one that 95 % do not exceed."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1]


class Times(NamedTuple):
    """Steps without the profiler: milliseconds a step."""

    plain_ms: float
    """From one step to the next."""
    host_ms: float
    """The host is busy with it, and does not wait for the device."""
    launch_ms: float
    """Of these the building and launching of what the step runs."""
    wide: float = 0.0
    """Share of the steps that were replayed although they are wide or odd: whole, or their forward in pieces."""


class Traced(NamedTuple):
    """What a trace found."""

    costs: StepCosts
    plain_ms: float
    """Milliseconds of a step without the profiler."""
    guessed: int
    """See `Steps`."""
    times: Times | None = None
    without: Times | None = None
    """Of steps like these when wide ones are not recorded; None: not measured."""


def describe(traced: Traced, title: str) -> str:
    """Markdown: one paragraph on the step, one table of kernels."""
    costs, plain_ms, guessed = traced[:3]
    gap_us, gap95_us = median_and_p95(costs.gaps_us)
    busy_ms = statistics.fmean(costs.busy_us) / 1e3
    lines = [
        f"### {title}",
        "",
        f"{costs.steps} steps under the profiler: {statistics.median(costs.periods_us) / 1e3:.3f} ms a step; as many "
        f"without it: {plain_ms:.3f} ms. The device is busy for {busy_ms:.3f} ms of a step, so without the profiler it "
        f"is idle for about {max(0.0, plain_ms - busy_ms) * 1e3:.0f} us.",
        f"Gap between the last kernel of a step and the first of the next: median {gap_us:.1f} us, 95th percentile "
        f"{gap95_us:.1f} us, of which copies {statistics.median(costs.gap_copies_us):.1f} us. Pauses inside a step: "
        f"median {statistics.median(costs.pauses_us):.1f} us.",
        "",
        table(kernel_rows(costs)),
    ]
    if traced.times is not None:
        mine, other = traced.times, traced.without
        told = f"The host is busy for {mine.host_ms:.2f} ms of a step, {mine.launch_ms:.2f} of them to launch it"
        if mine.wide:
            told += f", and {mine.wide:.0%} of the steps are recorded wide ones"
        if other is not None:
            told += f"; if wide steps are not recorded, for {other.host_ms:.2f} ms of {other.plain_ms:.3f}"
        lines[3:3] = [f"{told}."]
    if guessed:
        lines[3:3] = [
            f"The launches of {guessed} kernels and copies were not recorded: they count with their neighbours."
        ]
    return "\n".join(lines)


def kernel_rows(costs: StepCosts) -> list[dict[str, Any]]:
    """The kernels that take longest, then all others in one row, then the sum; counts and microseconds a step."""
    ordered = sorted(costs.kernels.items(), key=lambda item: -item[1].us)
    named = ordered[:NAMES]
    if len(ordered) > NAMES:
        rest = KernelCost(*(sum(getattr(cost, part) for _, cost in ordered[NAMES:]) for part in vars(KernelCost())))
        named.append((f"{len(ordered) - NAMES} others", rest))
    total = KernelCost(*(sum(getattr(cost, part) for _, cost in ordered) for part in vars(KernelCost())))
    return [_kernel_row(name, cost, costs.steps, total.us) for name, cost in [*named, ("sum", total)]]


def _kernel_row(name: str, cost: KernelCost, steps: int, total_us: float) -> dict[str, Any]:
    short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."
    return {
        "kernel": short.replace("|", "/"),
        "a step": cost.count / steps,
        "us a step": cost.us / steps,
        "us each": cost.us / max(cost.count, 1),
        "share": f"{cost.us / total_us:.1%}",
        "idle before it, us a step": cost.idle_us / steps,
    }


@contextmanager
def queued(llm: LLM, works: Sequence[Work], temperature: float = 0.0) -> Iterator[None]:
    """Requests in the engine, as `LLM.generate` would put them there, and out of it again at the end."""
    samples = [
        llm.front.add(
            (work.prompt_ids, None),
            SamplingParams(temperature=temperature, max_tokens=work.output_tokens, ignore_eos=True, detokenize=False),
            request_id=f"trace-{i}",
            number=i,
        )
        for i, work in enumerate(works)
    ]
    try:
        yield
    finally:
        for group in samples:
            llm.engine.abort(group[0].request_id)
            llm.front.forget(group)
        while llm.engine.has_work:
            llm.engine.step()
    llm.engine.check_idle()


def time_steps(engine: Engine, steps: int) -> Times:
    """Run steps and time them, and the host's part of them."""
    launch = engine.runner.launch
    launched_s = waited_s = 0.0

    def timed(granted: Sequence[Granted], processors: ProcessorRequests = ()) -> Callable[[], StepReport]:
        nonlocal launched_s
        began_s = time.perf_counter()
        report = launch(granted, processors)
        launched_s += time.perf_counter() - began_s

        def wait() -> StepReport:
            nonlocal waited_s
            began_s = time.perf_counter()
            result = report()
            waited_s += time.perf_counter() - began_s
            return result

        return wait

    replays = _wide_replays(engine)
    engine.runner.launch = timed  # type: ignore[method-assign]
    try:
        start_s = time.perf_counter()
        for _ in range(steps):
            engine.step()  # which waits for the step before, so it takes as long as a step
        seconds = time.perf_counter() - start_s
    finally:
        del engine.runner.launch
    wide = _wide_replays(engine) - replays
    a_step = 1e3 / steps
    return Times(seconds * a_step, (seconds - waited_s) * a_step, launched_s * a_step, wide / steps)


def _wide_replays(engine: Engine) -> int:
    graphs, pieces = engine.runner.graphs, engine.runner.pieces
    return (graphs.wide_replays if graphs else 0) + (pieces.replays if pieces else 0)


@contextmanager
def _narrow_only(engine: Engine) -> Iterator[None]:
    """Wide steps run as they are within."""
    graphs, pieces = engine.runner.graphs, engine.runner.pieces
    wide = graphs.wide if graphs else []
    engine.runner.pieces = None
    if graphs:
        graphs.wide = []
    try:
        yield
    finally:
        engine.runner.pieces = pieces
        if graphs:
            graphs.wide = wide


def trace(
    llm: LLM, works: Sequence[Work], *, steps: int, decode: bool, after: int = 2, file: Path | None = None
) -> Traced:
    """Time steps without the profiler, as many without recording wide ones, then profile as many.

    Args:
        steps: of each kind. The requests must keep the engine busy for 3 steps + 12.
        decode: begin when every request has its prompt behind it; such steps are narrow.
        after: otherwise begin after so many steps.
        file: where the trace goes in Chrome's format, for a viewer; None: nowhere.

    Raises RuntimeError if the requests end too early or the trace cannot be read.
    """
    engine = llm.engine
    with queued(llm, works), tempfile.TemporaryDirectory() as scratch:
        if decode:
            while engine.n_waiting or any(request.pending > 1 for request in engine.running):
                engine.step()
        for _ in range(8 if decode else after):
            engine.step()
        torch.cuda.synchronize()
        times, without = time_steps(engine, steps), None
        if engine.runner.pieces is not None and not decode:
            with _narrow_only(engine):
                engine.step()
                without = time_steps(engine, steps)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(UNSETTLED + steps):
                if not engine.has_work:
                    raise RuntimeError("the requests ended before the trace did: it would mean nothing")
                with record_function(MARK):
                    engine.step()
            torch.cuda.synchronize()
        target = file or Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(target))
        events = json.loads(target.read_text(encoding="utf-8"))["traceEvents"]
    steps_of_trace, guessed = split_steps(events)
    return Traced(measure(steps_of_trace[UNSETTLED:]), times.plain_ms, guessed, times, without)
