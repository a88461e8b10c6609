"""StreamingLLM (arXiv 2309.17453): the first tokens, on which attention rests, and the most recent ones.

Keys keep the rotation of their true position; the paper numbers the tokens that are left anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.eviction.base import EVICTORS, Cells, Evictor

SINKS = 4
"""First tokens that are always kept: with four the paper's perplexities are those of the whole cache."""


@EVICTORS.register(
    "streaming_llm",
    label="lossy",
    option='evictor="streaming_llm", cache_budget=<slots>',
    example={"evictor": "streaming_llm", "cache_budget": 16},
    summary="Keeps the first four tokens and the most recent ones.",
    source="arXiv 2309.17453; positions are not numbered anew",
    composes="everything; selectors that select and models with sliding-window layers are refused",
)
class StreamingLLM(Evictor):
    """Sinks and a window, the same in every cell. Reads no keys."""

    least_budget = SINKS + 1

    def score(self, cells: Cells) -> Tensor:
        """The younger, the better, [n]."""
        # Places up to 2**24 are exact in fp32.
        score_n = torch.arange(cells.n, dtype=torch.float32, device=cells.device)
        score_n[:SINKS] = torch.inf
        return score_n
