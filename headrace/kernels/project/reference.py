"""Linear maps with norm, gate and sum in plain torch: the definition that every faster form is compared with.

Composed of the references of the parts, each of which rounds its result to the type of x. Letters: R rows, E inputs,
N outputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.rms_norm.reference import rms_norm_reference
from headrace.kernels.silu_mul.reference import silu_mul_reference


def project_reference(
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
) -> Tensor:
    """See `headrace.kernels.project.project`. Any device and floating dtype."""
    if norm is not None:
        x_RE = rms_norm_reference(x_RE, *norm)
    y_RN = F.linear(x_RE, weight_NE, bias_N)
    return silu_mul_reference(y_RN) if gated else y_RN


def project_onto_reference(y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> None:
    """See `headrace.kernels.project.project_onto`. Any device and floating dtype."""
    y_RN.addmm_(x_RE, weight_NE.t())
    if bias_N is not None:
        y_RN.add_(bias_N)
