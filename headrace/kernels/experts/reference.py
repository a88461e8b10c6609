"""Products with picked experts in plain torch: one library product an expert. What a CPU runs, and what the kernel for
GPUs is compared with. Letters: see the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """Pairs by expert."""

    order_P: Tensor
    """The pairs in the order of their experts, int64."""
    sizes: dict[int, int]
    """Pairs of each expert that has any, in the order of the experts."""


def group_pairs(pick_P: Tensor) -> Groups:
    """Sort the pairs by expert; pairs of one expert keep their order. Waits for the device."""
    experts, counts = pick_P.unique(return_counts=True)
    return Groups(pick_P.argsort(stable=True), dict(zip(experts.tolist(), counts.tolist(), strict=True)))


def multiply_groups(groups: Groups, x_RI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, share: int) -> Tensor:
    """See the package. Any device and floating dtype."""
    y_PO = x_RI.new_empty(len(groups.order_P), weight_NOI.shape[1])
    parts = groups.order_P.split(list(groups.sizes.values()))
    for expert, pairs in zip(groups.sizes, parts, strict=True):
        bias_O = None if bias_NO is None else bias_NO[expert]
        y_PO[pairs] = F.linear(x_RI[torch.div(pairs, share, rounding_mode="floor")], weight_NOI[expert], bias_O)
    return y_PO
