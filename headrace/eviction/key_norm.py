"""Eviction by key norm (arXiv 2406.11430): keys with a low L2 norm are those that attention goes to.

Rotary embedding does not change a norm, so the cached keys can be taken as they are.
"""

from __future__ import annotations

from torch import Tensor

from headrace.eviction.base import EVICTORS, Cells, Evictor
from headrace.eviction.streaming_llm import SINKS

RECENT_SHARE = 4
"""One slot in so many is for the most recent tokens, whatever their norm."""


@EVICTORS.register(
    "key_norm",
    label="lossy",
    option='evictor="key_norm", cache_budget=<slots>',
    example={"evictor": "key_norm", "cache_budget": 16},
    summary="Keeps the first four tokens, the most recent quarter, and the keys of the lowest norm, head by head.",
    source="arXiv 2406.11430",
    composes="everything; selectors that select and models with sliding-window layers are refused",
)
class KeyNorm(Evictor):
    """Each cell keeps its own slots; all have the same number."""

    least_budget = 2 * SINKS
    """Room for the sinks, the recent tokens, and one choice at least."""

    def score(self, cells: Cells) -> Tensor:
        """The negative norm, [L, K, n]."""
        score_LKn = -cells.keys().float().norm(dim=3)
        score_LKn[:, :, :SINKS] = float("inf")
        score_LKn[:, :, max(0, cells.n - cells.budget // RECENT_SHARE) :] = float("inf")
        return score_LKn
