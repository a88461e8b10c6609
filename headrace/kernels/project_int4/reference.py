"""Linear maps whose weights are 4-bit codes, in plain torch: the definition that every faster form is compared with.

    w_en = (code_en - zero_gn) * scale_gn,   g = e // group size

Letters: R rows, E inputs, N outputs, G groups of inputs, W = ceil(E / 8) words of eight inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES = 8
"""Codes of a word, those of the first inputs in the lowest bits."""


def unpack_int4(words_WN: Tensor, inputs: int) -> Tensor:
    """Codes 0 .. 15, uint8 [E, N], of words int32 [W, N]."""
    shift_8 = torch.arange(0, 32, 4, dtype=torch.int32, device=words_WN.device)
    codes_W8N = (words_WN[:, None] >> shift_8[:, None]) & 15
    return codes_W8N.to(torch.uint8).flatten(0, 1)[:inputs]


def pack_int4(codes_EN: Tensor) -> Tensor:
    """Words int32 [W, N] of codes [E, N]; where E is no multiple of 8, the last word is filled up with zeros."""
    inputs, outputs = codes_EN.shape
    words_WN = torch.zeros(-(-inputs // CODES), outputs, dtype=torch.int32, device=codes_EN.device)
    for i in range(CODES):
        part = codes_EN[i::CODES].to(torch.int32)
        words_WN[: len(part)] |= part << (4 * i)
    return words_WN


def dequantise_int4(words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, inputs: int, group: int) -> Tensor:
    """Weights [E, N] in the type of the scales."""
    group_E = torch.arange(inputs, device=words_WN.device) // group
    codes_EN = unpack_int4(words_WN, inputs).to(scales_GN.dtype)
    return (codes_EN - zeros_GN.to(scales_GN.dtype)[group_E]) * scales_GN[group_E]


def project_int4_reference(
    x_RE: Tensor, words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, *, group: int
) -> Tensor:
    """See `headrace.kernels.project_int4.project_int4`. Any device and floating dtype.

    Weights and sums are in the wider of the types of x and of the scales.
    """
    kind = torch.promote_types(x_RE.dtype, scales_GN.dtype)
    weight_EN = dequantise_int4(words_WN, zeros_GN, scales_GN.to(kind), x_RE.shape[1], group)
    return (x_RE.to(kind) @ weight_EN).to(x_RE.dtype)
