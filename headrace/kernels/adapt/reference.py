"""Low-rank changes of a linear map in plain torch: the definition that every faster form is compared with.

Letters: R rows, E inputs, N outputs, P projections side by side, Q rank, K = P Q, S places (0: no change).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of every place, of one type, at addresses that never change.

    Each projection has a first factor of its own; of the second, whose full form is block diagonal, only the blocks are
    kept. Unused ranks are zeros.
    """

    a_SEK: Tensor
    """First factors transposed, those of the projections side by side."""
    b_SQN: Tensor
    """Second factors transposed, scaled."""
    borders: tuple[int, ...]
    """Outputs of projection p are [borders[p], borders[p + 1])."""
    borders_P: Tensor
    """The same, int32 on the device."""


def adapt_reference_(y_RN: Tensor, x_RE: Tensor, slot_R: Tensor, factors: Factors) -> None:
    """See `headrace.kernels.adapt.adapt_`. Any device and floating dtype; waits for the device."""
    rank = factors.b_SQN.shape[1]
    wide = torch.promote_types(x_RE.dtype, torch.float32)
    for slot in slot_R.unique().tolist():
        if not slot:
            continue
        rows_r = (slot_R == slot).nonzero()[:, 0]
        # Summed in the wider type and rounded once, as a product of the narrow type is.
        h_rK = (x_RE[rows_r].to(wide) @ factors.a_SEK[slot].to(wide)).to(x_RE.dtype).to(wide)
        b_QN = factors.b_SQN[slot].to(wide)
        spans = list(zip(factors.borders, factors.borders[1:]))
        delta_rN = torch.cat(
            [h_rQ @ b_QN[:, low:high] for h_rQ, (low, high) in zip(h_rK.split(rank, 1), spans, strict=True)], 1
        )
        y_RN[rows_r] = (y_RN[rows_r].to(wide) + delta_rN).to(y_RN.dtype)
