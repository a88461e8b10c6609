"""The report of `headrace bench gpu`: figures as they come, beside a peer, the goals and the floor."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from headrace.bench import trace
from headrace.bench.floors import H200
from headrace.bench.report import headline, table
from headrace.bench.targets import PEER, PEER_DATE, PEER_MACHINE, TARGETS, Target
from headrace.errors import HeadraceError


class Unit(NamedTuple):
    """What a figure is given in."""

    name: str
    digits: int
    low_wins: bool


MS = Unit("ms a token", 2, low_wins=True)
SECONDS = Unit("s", 1, low_wins=True)
OUTPUT = Unit("output tok/s", 0, low_wins=False)
PROMPT = Unit("prompt tok/s", 0, low_wins=False)
REQUESTS = Unit("requests/s", 2, low_wins=False)


class Figure(NamedTuple):
    """One thing that was measured."""

    geometry: str
    name: str
    unit: Unit
    ours: float
    floor: float | None
    """The best that the hardware of the peer's machine could do, in the same unit; None: not known."""
    note: str = ""


class Report:
    """Figures as they come: printed, and written to the files each time, so that a cut run leaves what it had."""

    def __init__(self, facts: dict[str, Any], device: str, json_file: Path | None, markdown: Path | None) -> None:
        self.facts, self.on_cpu = {**facts, "gpu": None} if device == "cpu" else facts, device == "cpu"
        self.figures: list[Figure] = []
        self.traces: list[tuple[str, trace.Traced]] = []
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._files = {json_file: self._json, markdown: self._markdown}
        self._files.pop(None, None)

    def add(self, figure: Figure) -> None:
        """A figure is known."""
        self.figures.append(figure)
        row = self.row(figure)
        shown = ", ".join(f"{name} {row[name]}" for name in list(row)[3:] if row[name] not in ("", "-"))
        print(f"{figure.geometry}, {figure.name}: {shown} ({figure.unit.name})", flush=True)
        self._flush()

    def add_trace(self, title: str, traced: trace.Traced) -> None:
        """A trace is known."""
        self.traces.append((title, traced))
        print(f"\n{trace.describe(traced, title)}\n", flush=True)
        self._flush()

    def part(self, geometry: str, name: str) -> Part:
        """To run a part of the benchmark in: `with report.part(...)`."""
        return Part(self, f"{geometry}: {name}")

    def end_part(self, title: str, seconds: float, error: BaseException | None) -> None:
        """A part has ended, by an error or well."""
        self.seconds[title] = seconds
        if error is not None:
            self.failures[title] = f"{type(error).__name__}: {error}"
        print(f"[{title} {'took' if error is None else 'failed after'} {seconds:.1f} s]", file=sys.stderr, flush=True)
        self._flush()

    def target(self, figure: Figure) -> Target:
        """The peer's figure and goals; nothing on a CPU, where they would mean nothing."""
        none = Target(None, ())
        return none if self.on_cpu else TARGETS.get((figure.geometry, figure.name), none)

    def row(self, figure: Figure) -> dict[str, Any]:
        """A line of the table."""
        target, unit = self.target(figure), figure.unit

        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:,.{unit.digits}f}"

        floor = None if self.on_cpu else figure.floor
        share = "-" if floor is None else f"{_better(unit, figure.ours, floor):.0%}"
        return {
            "geometry": figure.geometry,
            "figure": figure.name,
            "unit": unit.name,
            "ours": number(figure.ours),
            "peer": number(target.peer),
            "goal": ", then ".join(map(number, target.goals)) or "-",
            "floor": number(floor),
            "of the floor": share,
            "against the peer": _verdict(unit, figure.ours, target.peer),
            "note": figure.note,
        }

    def text(self) -> str:
        """The report in Markdown."""
        parts = [headline(self.facts), *self._preamble()]
        if self.figures:
            parts.append(table([self.row(figure) for figure in self.figures]))
            compared = [figure for figure in self.figures if self.target(figure).peer is not None]
            if compared:
                won = sum(_wins(figure, self.target(figure)) for figure in compared)
                parts.append(f"{won} of {len(compared)} won against the peer, {len(compared) - won} lost.")
        parts += [f"**Failed: {title}: {error}**" for title, error in self.failures.items()]
        parts += [trace.describe(traced, title) for title, traced in self.traces]
        if self.seconds:
            parts.append(
                "Took: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()) + "."
            )
        return "\n\n".join(parts)

    def _preamble(self) -> list[str]:
        if self.on_cpu:
            return ["Measured on the CPU: no peer, no goal and no floor is compared with, as all of them are a GPU's."]
        lines = [
            f"Peer: {PEER}, measured on one {PEER_MACHINE}, {PEER_DATE}; same workloads, bfloat16, random weights. "
            f"Floor: bytes that must be read / {H200.read_bytes_s / 1e12:.2f} TB/s, or operations / "
            f"{H200.flops_s / 1e12:.0f} TFLOP/s where that takes longer. Both engines were warmed up; steps of each "
            "batch were recorded before they were timed."
        ]
        if PEER_MACHINE not in (self.facts["gpu"] or ""):
            lines.append(
                f"**Measured on one {self.facts['gpu']}; the absolute figures of peer, goal and floor hold for an "
                f"{PEER_MACHINE}, so the percentages and verdicts below compare two machines.**"
            )
        return lines

    def _flush(self) -> None:
        for file, make in self._files.items():
            assert file is not None
            partial = file.with_name(file.name + ".partial")
            partial.write_text(make(), encoding="utf-8")
            partial.replace(file)  # a run that is cut never leaves half a file

    def _markdown(self) -> str:
        return f"# GPU: `headrace bench gpu`\n\n{self.text()}\n"

    def _json(self) -> str:
        rows = [
            {
                **figure._asdict(),
                "unit": figure.unit.name,
                "floor": None if self.on_cpu else figure.floor,
                "peer": self.target(figure).peer,
                "goals": self.target(figure).goals,
                "won": None if self.target(figure).peer is None else _wins(figure, self.target(figure)),
            }
            for figure in self.figures
        ]
        traces = [
            {
                "title": title,
                "plain_ms": traced.plain_ms,
                "guessed": traced.guessed,
                "times": traced.times and traced.times._asdict(),
                "narrow_only": traced.without and traced.without._asdict(),
                **_plain(traced.costs),
            }
            for title, traced in self.traces
        ]
        peer = None if self.on_cpu else {"engine": PEER, "machine": PEER_MACHINE, "date": PEER_DATE}
        whole = {
            "machine": self.facts,
            "peer": peer,
            "rows": rows,
            "failures": self.failures,
            "traces": traces,
            "seconds": self.seconds,
        }
        return json.dumps(whole, indent=2) + "\n"


class Part:
    """Says on stderr what runs now, and how long it took.

    What fails is reported, and the run goes on: time on a GPU is dear, and the other figures are still worth it.
    """

    def __init__(self, report: Report, title: str) -> None:
        self._report, self._title = report, title

    def __enter__(self) -> None:
        print(f"[{self._title}]", file=sys.stderr, flush=True)
        self._start_s = time.perf_counter()

    def __exit__(self, kind: object, error: BaseException | None, trail: TracebackType | None) -> bool:
        expected = isinstance(error, (HeadraceError, RuntimeError))
        if expected:
            traceback.print_exception(error)
        self._report.end_part(self._title, time.perf_counter() - self._start_s, error)
        return expected


def _plain(costs: trace.StepCosts) -> dict[str, Any]:
    return {**vars(costs), "kernels": {name: vars(cost) for name, cost in costs.kernels.items()}}


def _better(unit: Unit, ours: float, other: float) -> float:
    """How many times as good as the other."""
    return other / ours if unit.low_wins else ours / other


def _wins(figure: Figure, target: Target) -> bool:
    return target.peer is not None and _better(figure.unit, figure.ours, target.peer) > 1


def _verdict(unit: Unit, ours: float, peer: float | None) -> str:
    if peer is None:
        return "-"
    ratio = _better(unit, ours, peer)
    return f"{'won' if ratio > 1 else 'lost'}, {ratio:.2f}x"
