"""Dynamic SplitFuse: every step has about the same number of rows (DeepSpeed-FastGen, arXiv 2401.08671).

Decoding requests get their row first; prompts, cut to fit exactly, fill the rest of the budget. Step time
depends on the number of rows and hardly on whose they are, and throughput is concave in it, so equal steps
at the knee of the curve are the best ones. Priorities come before that: a class of lower priority gets what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.scheduling.base import SCHEDULERS, RequestView, Snapshot


def by_rank(view: RequestView) -> tuple[int, int]:
    """By priority; among equals first come, first served."""
    return view.rank


def _by_class(view: RequestView) -> tuple[int, int, int]:
    """By priority; among equals decoding, begun prompts, waiting ones; each by arrival."""
    stage = 0 if view.decoding else 1 if view.running else 2
    return view.priority, stage, view.arrival


@SCHEDULERS.register(
    "splitfuse",
    label="exact",
    summary="Decode rows first, prompt chunks fill the step up to a fixed budget.",
    source="DeepSpeed-FastGen, arXiv 2401.08671",
)
class SplitFuse:
    """Decode first, chunked prompts fill the step; the first in rank of those that run goes before everybody."""

    steady = True

    def order(self, snapshot: Snapshot) -> list[list[RequestView]]:
        """By priority; among equals decoding requests, then begun prompts, then waiting ones, each by arrival. In
        front of the highest priority goes the oldest of its running requests."""
        order = sorted([*snapshot.running, *snapshot.waiting], key=_by_class)
        leading = [v for v in order if v.running and v.priority == order[0].priority]
        if leading:
            first = min(leading, key=by_rank)
            order.remove(first)
            order.insert(0, first)
        return [order]

    def budget(self, snapshot: Snapshot) -> int:
        """Always the whole budget."""
        return snapshot.budget

    def admits(self, view: RequestView, need: tuple[int, ...], free: tuple[int, ...], running: int) -> bool:
        """The whole prompt fits, and every running request can still grow by a page."""
        return all(n + running <= f for n, f in zip(need, free, strict=True))

    def victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """The youngest of the lowest priority: the least work is thrown away for the least wait."""
        return max(candidates, key=by_rank)
