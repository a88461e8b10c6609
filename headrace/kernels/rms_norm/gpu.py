"""RMS normalisation on a GPU: what `reference.py` defines, one read and one write of every element.

A program takes whole lines, as many as fit its tile, so that heads of 128 numbers keep it busy. How a line is summed
follows from its width only. Letters: R rows, N heads, E width; a line is one head of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import begin, tl, triton
from headrace.kernels.gpu_sizes import next_power, overlaps

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernel knows."""
_TILE = 1024
"""Elements of a tile of short lines."""


@triton.jit(do_not_specialize=["n_lines", "heads"])
def _norm(
    x_RNE,
    weight_NE,
    y_LE,
    n_lines,
    heads,
    width,
    x_row,
    x_head,
    weight_head,
    eps,
    LINES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    line_L1 = (tl.program_id(0) * LINES + tl.arange(0, LINES))[:, None]
    i_1E = tl.arange(0, BLOCK_E)[None, :]
    here = (line_L1 < n_lines) & (i_1E < width)
    row_L1, head_L1 = line_L1 // heads, line_L1 % heads
    x_at = x_RNE + row_L1.to(tl.int64) * x_row + head_L1.to(tl.int64) * x_head + i_1E
    x_LE = tl.load(x_at, mask=here, other=0.0).to(tl.float32)
    weight_LE = tl.load(weight_NE + head_L1 * weight_head + i_1E, mask=here, other=0.0).to(tl.float32)
    scale_L = 1.0 / tl.sqrt(tl.sum(x_LE * x_LE, 1) / width + eps)
    y_LE_ = x_LE * scale_L[:, None] * weight_LE
    tl.store(y_LE + line_L1.to(tl.int64) * width + i_1E, y_LE_.to(y_LE.dtype.element_ty), mask=here)


def rms_norm_gpu(x_RE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See `headrace.kernels.rms_norm.rms_norm`, which has checked the shapes. x and weight of one type of `TYPES`."""
    y_RE = x_RE.new_empty(x_RE.shape)
    if not y_RE.numel():
        return y_RE
    per_head = weight_E.dim() == 2
    x = x_RE
    if x.dim() != 3 and (per_head or x.dim() != 2):
        x = x.reshape(-1, *weight_E.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 2:
        x = x[:, None]
    rows, heads, width = x.shape
    block_e = next_power(width)
    lines = max(_TILE // block_e, 1)
    _norm[(-(-rows * heads // lines),)](
        x,
        weight_E.contiguous(),
        y_RE,
        rows * heads,
        heads,
        width,
        x.stride(0),
        x.stride(1),
        width if per_head else 0,
        eps,
        LINES=lines,
        BLOCK_E=block_e,
        OVERLAP=overlaps(x.device),
        launch_pdl=overlaps(x.device),
        num_warps=min(max(lines * block_e // 256, 1), 16),
    )
    return y_RE
