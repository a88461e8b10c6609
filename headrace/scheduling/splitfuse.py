"""Dynamic SplitFuse: every step has about the same number of rows (DeepSpeed-FastGen, arXiv 2401.08671).

Decoding requests get their row first; prompts, cut to fit exactly, fill the rest of the budget. Step time
depends on the number of rows and hardly on whose they are, and throughput is concave in it, so equal steps
at the knee of the curve are the best ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from headrace.scheduling.base import SCHEDULERS, RequestView, Snapshot


def by_arrival(view: RequestView) -> int:
    """First come, first served."""
    return view.arrival


@SCHEDULERS.register(
    "splitfuse",
    label="exact",
    summary="Decode rows first, prompt chunks fill the step up to a fixed budget.",
    source="DeepSpeed-FastGen, arXiv 2401.08671",
)
class SplitFuse:
    """Decode first, chunked prompts fill the step; the oldest request of all goes before everybody."""

    def order(self, snapshot: Snapshot) -> list[list[RequestView]]:
        """The oldest, then decoding requests, then begun prompts, then waiting ones; each by arrival."""
        running = sorted(snapshot.running, key=by_arrival)
        oldest = running[:1]
        decoding = [v for v in running[1:] if v.decoding]
        prompts = [v for v in running[1:] if not v.decoding]
        return [[*oldest, *decoding, *prompts, *sorted(snapshot.waiting, key=by_arrival)]]

    def budget(self, snapshot: Snapshot) -> int:
        """Always the whole budget."""
        return snapshot.budget

    def admits(self, view: RequestView, need: tuple[int, ...], free: tuple[int, ...], running: int) -> bool:
        """The whole prompt fits, and every running request can still grow by a page."""
        return all(n + running <= f for n, f in zip(need, free, strict=True))

    def victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """The youngest: the least work is thrown away for the least wait."""
        return max(candidates, key=by_arrival)
