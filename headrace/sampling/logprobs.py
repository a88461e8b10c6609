"""Log-probabilities of chosen and top tokens under the model's own distribution (before any processor)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TopLogprobs(NamedTuple):
    """Top tokens of some rows, and the chosen one's place among all."""

    ids_MN: Tensor
    logprobs_MN: Tensor
    chosen_M: Tensor
    """Log-probability of the chosen token, float32."""
    rank_M: Tensor
    """1 + the number of tokens that are more probable than the chosen one, int64."""


def gather_logprobs(logits_MV: Tensor, chosen_M: Tensor, top: int) -> TopLogprobs:
    """Log-softmax of float32 logits at the chosen ids, their ranks, and the `top` best tokens of each row.

    Which of several equal ones are among the best follows from the row alone.
    """
    logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
    chosen_M1 = logprobs_MV.gather(1, chosen_M[:, None].long())
    rank_M = (logprobs_MV > chosen_M1).sum(dim=1) + 1
    # On a GPU torch looks for the best of few rows in another way than for those of many.
    best_MV = _order_keys(logprobs_MV) if logprobs_MV.is_cuda else logprobs_MV
    ids_MN = best_MV.topk(min(top, logits_MV.shape[1]), dim=1).indices
    return TopLogprobs(ids_MN, logprobs_MV.gather(1, ids_MN), chosen_M1[:, 0], rank_M)


def _order_keys(x_MV: Tensor) -> Tensor:
    """int64 numbers in the order of float32 ones, and of equal ones the larger for the lower column: no two in a row
    are equal."""
    bits_MV = (x_MV + 0.0).view(torch.int32)  # -0.0 is 0.0
    bits_MV = torch.where(bits_MV < 0, bits_MV ^ 0x7FFFFFFF, bits_MV)
    columns_V = torch.arange(x_MV.shape[1] - 1, -1, -1, device=x_MV.device)
    return (bits_MV.long() << 32) + columns_V
