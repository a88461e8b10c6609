"""Rotation of heads on a GPU: what `reference.py` defines, in one pass and without a copy.

A program turns some heads of one row. Letters: R rows, N heads, D head size, h = D/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.gpu_sizes import next_power

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernel knows."""
_TILE = 1024
"""Pairs of a tile."""


@triton.jit(do_not_specialize=["heads"])
def _rotate(
    x_RND,
    cos_RD,
    sin_RD,
    heads,
    half,
    x_row,
    x_head,
    x_item,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n_N1 = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    i_1h = tl.arange(0, BLOCK_H)[None, :]
    is_item = i_1h < half
    here = (n_N1 < heads) & is_item
    angle_at = row * 2 * half + i_1h
    cos_1h = tl.load(cos_RD + angle_at, mask=is_item, other=0.0).to(tl.float32)
    cos2_1h = tl.load(cos_RD + angle_at + half, mask=is_item, other=0.0).to(tl.float32)
    sin_1h = tl.load(sin_RD + angle_at, mask=is_item, other=0.0).to(tl.float32)
    sin2_1h = tl.load(sin_RD + angle_at + half, mask=is_item, other=0.0).to(tl.float32)
    first_at = x_RND + row * x_row + n_N1.to(tl.int64) * x_head + i_1h * x_item
    second_at = first_at + half * x_item
    a_Nh = tl.load(first_at, mask=here, other=0.0).to(tl.float32)
    b_Nh = tl.load(second_at, mask=here, other=0.0).to(tl.float32)
    # A product that is rounded to the element type first, then the sum: the order of the reference.
    element = x_RND.dtype.element_ty
    first_Nh = (a_Nh * cos_1h).to(element).to(tl.float32) + b_Nh * sin_1h
    second_Nh = (b_Nh * cos2_1h).to(element).to(tl.float32) + a_Nh * sin2_1h
    tl.store(first_at, first_Nh.to(element), mask=here)
    tl.store(second_at, second_Nh.to(element), mask=here)


def rotate_gpu_(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> None:
    """See `headrace.kernels.rotary.rotate_`, which has checked the shapes. All of one type of `TYPES`."""
    rows, heads, size = x_RND.shape
    if not x_RND.numel():
        return
    block_h = next_power(size // 2)
    block_n = min(max(_TILE // block_h, 1), next_power(heads))
    _rotate[(rows, -(-heads // block_n))](
        x_RND,
        cos_R1D.contiguous(),
        sin_R1D.contiguous(),
        heads,
        size // 2,
        *x_RND.stride(),
        BLOCK_N=block_n,
        BLOCK_H=block_h,
        num_warps=min(max(block_n * block_h // 256, 1), 8),
    )
