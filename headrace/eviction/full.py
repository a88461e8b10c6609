"""The whole cache: nothing is ever evicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.eviction.base import EVICTORS, Cells, Evictor
from headrace.step import FAR


@EVICTORS.register(
    "full",
    label="exact",
    summary="Keeps everything.",
)
class Full(Evictor):
    """Has no budget and no trigger."""

    evicts = False
    least_budget = 0

    def reserve(self, prompt_len: int, limit: int, budget: int) -> int:
        """A slot a token."""
        return limit

    def next_trigger(self, prompt_len: int, n_done: int, budget: int) -> int:
        """Never."""
        return FAR

    def keep_len(self, layers: Sequence[int], n: int, budget: int) -> int:
        """All of them."""
        return n

    def score(self, cells: Cells) -> Tensor:
        """All slots are worth the same, [n]."""
        return torch.zeros(cells.n, device=cells.device)
