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
    """Log-softmax of float32 logits at the chosen ids, their ranks, and the `top` best tokens of each row."""
    logprobs_MV = torch.log_softmax(logits_MV, dim=-1)
    chosen_M1 = logprobs_MV.gather(1, chosen_M[:, None].long())
    rank_M = (logprobs_MV > chosen_M1).sum(dim=1) + 1
    values_MN, ids_MN = logprobs_MV.topk(min(top, logits_MV.shape[1]), dim=1)
    return TopLogprobs(ids_MN, values_MN, chosen_M1[:, 0], rank_M)
