"""Prefill first: a step is either prompts or decoding, and prompts go before decoding.

The policy of engines before chunked prefill, kept for comparison: running streams stall while prompts are
evaluated. Prompts longer than the budget are still cut, since a step holds no more rows than that.
"""

from __future__ import annotations

from headrace.scheduling.base import SCHEDULERS, RequestView, Snapshot
from headrace.scheduling.splitfuse import SplitFuse, by_arrival


@SCHEDULERS.register(
    "prefill_first",
    label="exact",
    summary="Prompts before decoding, never mixed in a step; for comparison.",
)
class PrefillFirst(SplitFuse):
    """Two phases; budget, admission and victim are SplitFuse's."""

    def order(self, snapshot: Snapshot) -> list[list[RequestView]]:
        """Begun and waiting prompts by arrival; only when none of them can move, the decoding requests."""
        running = sorted(snapshot.running, key=by_arrival)
        prompts = [v for v in running if not v.decoding] + sorted(snapshot.waiting, key=by_arrival)
        return [prompts, [v for v in running if v.decoding]]
