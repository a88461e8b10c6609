"""Linear maps whose weights are 8-bit floats with scales, in plain torch: what every faster form is compared with.

    w_ne = float(code_ne) * scale_ng,   g = e // group size

Codes are E4M3 (arXiv 2209.05433): four bits of exponent, three of mantissa, no infinities. Letters: R rows, E inputs,
N outputs, G groups of inputs (1 where each output has one scale).
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


def dequantise_fp8(codes_NE: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """Weights [N, E] in the type of the scales."""
    group_E = torch.arange(codes_NE.shape[1], device=codes_NE.device) // group
    return codes_NE.to(scales_NG.dtype) * scales_NG[:, group_E]


def project_fp8_reference(x_RE: Tensor, codes_NE: Tensor, scales_NG: Tensor, *, group: int) -> Tensor:
    """See `headrace.kernels.project_fp8.project_fp8`. Any device and floating dtype.

    Weights and sums are in the wider of the types of x and of the scales.
    """
    kind = torch.promote_types(x_RE.dtype, scales_NG.dtype)
    return (x_RE.to(kind) @ dequantise_fp8(codes_NE, scales_NG.to(kind), group).t()).to(x_RE.dtype)
