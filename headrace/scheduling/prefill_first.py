"""Prefill first: a step is either prompts or decoding, and prompts go before decoding.

The policy of engines before chunked prefill, kept for comparison: running streams stall while prompts are
evaluated. Prompts longer than the budget are still cut, since a step holds no more rows than that.
"""

from __future__ import annotations

from headrace.scheduling.base import SCHEDULERS, RequestView, Snapshot
from headrace.scheduling.splitfuse import SplitFuse, by_rank


@SCHEDULERS.register(
    "prefill_first",
    label="exact",
    summary="Prompts before decoding, never mixed in a step; for comparison.",
)
class PrefillFirst(SplitFuse):
    """Two phases; budget, admission and victim are SplitFuse's."""

    def order(self, snapshot: Snapshot) -> list[list[RequestView]]:
        """Prompts by priority, begun before waiting, each by arrival; only when none of them can move, the
        decoding requests."""
        begun = [v for v in snapshot.running if not v.decoding]
        prompts = sorted([*begun, *snapshot.waiting], key=lambda v: (v.priority, not v.running, v.arrival))
        return [prompts, sorted((v for v in snapshot.running if v.decoding), key=by_rank)]
