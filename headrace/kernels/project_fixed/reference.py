"""Linear maps a row at a time in plain torch: the definition that every faster form is compared with.

A product of one row knows no other rows. Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def project_fixed_reference(x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """See `headrace.kernels.project_fixed.project_fixed`, without norm and gate. Any device and floating dtype."""
    y_RN = x_RE.new_empty(x_RE.shape[0], weight_NE.shape[0])
    for x_E, y_N in zip(x_RE, y_RN, strict=True):
        # A copy begins at an address of its own, as each does: a library may look at how a row is aligned.
        y_N.copy_(F.linear(x_E.clone()[None], weight_NE, bias_N)[0])
    return y_RN


def project_fixed_onto_reference(y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> None:
    """See `headrace.kernels.project_fixed.project_fixed_onto`. Any device and floating dtype."""
    wide = torch.promote_types(y_RN.dtype, torch.float32)
    for x_E, y_N in zip(x_RE, y_RN, strict=True):
        y_N.copy_(y_N.to(wide) + F.linear(x_E.clone()[None].to(wide), weight_NE.to(wide))[0])
    if bias_N is not None:
        y_RN.add_(bias_N)
