"""`turn` on a GPU: one launch a layer instead of three, and no gather of angles a step.

A program takes some heads of one row, as two halves that a rotation mixes. Rounding is that of the three operations:
the norm is rounded to the element type, then the first product of the rotation, then the sum. Letters: N heads of the
product, queries, keys and values; h = D/2.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.gpu_runtime import begin, tl, triton
from headrace.kernels.gpu_sizes import next_power, overlaps
from headrace.step import Turn

_TILE = 1024
"""Pairs of a tile."""


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def _turn(
    qkv_RND,
    weight_ND,
    cos_Ph,
    sin_Ph,
    pos_R,
    place_R,
    k_pool,
    v_pool,
    heads,
    kv_heads,
    half,
    row_stride,
    head_stride,
    k_pool_head,
    v_pool_head,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_NORM: tl.constexpr,
    KIND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    n_N1 = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    i_1h = tl.arange(0, BLOCK_H)[None, :]
    is_item = i_1h < half
    here = (n_N1 < heads + 2 * kv_heads) & is_item
    turns = (n_N1 < heads + kv_heads) & is_item
    element = qkv_RND.dtype.element_ty
    at = qkv_RND + row * row_stride + n_N1 * head_stride + i_1h
    a_Nh = tl.load(at, mask=here, other=0.0).to(KIND)
    b_Nh = tl.load(at + half, mask=here, other=0.0).to(KIND)
    position = tl.load(pos_R + row).to(tl.int64)
    place = tl.load(place_R + row)
    cos_1h = tl.load(cos_Ph + position * half + i_1h, mask=is_item, other=0.0).to(element).to(KIND)
    sin_1h = tl.load(sin_Ph + position * half + i_1h, mask=is_item, other=0.0).to(element).to(KIND)
    x_Nh = a_Nh
    y_Nh = b_Nh
    if HAS_NORM:
        at_weight = weight_ND + n_N1 * (2 * half) + i_1h
        scale_N1 = 1.0 / tl.sqrt((tl.sum(a_Nh * a_Nh, 1) + tl.sum(b_Nh * b_Nh, 1)) / (2 * half) + eps)[:, None]
        x_Nh = (a_Nh * scale_N1 * tl.load(at_weight, mask=turns, other=0.0).to(KIND)).to(element).to(KIND)
        y_Nh = (b_Nh * scale_N1 * tl.load(at_weight + half, mask=turns, other=0.0).to(KIND)).to(element).to(KIND)
    first_Nh = ((x_Nh * cos_1h).to(element).to(KIND) - y_Nh * sin_1h).to(element)
    second_Nh = ((y_Nh * cos_1h).to(element).to(KIND) + x_Nh * sin_1h).to(element)
    tl.store(at, first_Nh, mask=turns)
    tl.store(at + half, second_Nh, mask=turns)
    # Keys go to their slots as they were turned, values as they were.
    k_N1 = (n_N1 - heads).to(tl.int64)
    is_key = turns & (n_N1 >= heads)
    at_key = k_pool + k_N1 * k_pool_head + place * (2 * half) + i_1h
    tl.store(at_key, first_Nh, mask=is_key)
    tl.store(at_key + half, second_Nh, mask=is_key)
    is_value = here & (n_N1 >= heads + kv_heads)
    at_value = v_pool + (k_N1 - kv_heads) * v_pool_head + place * (2 * half) + i_1h
    tl.store(at_value, a_Nh.to(element), mask=is_value)
    tl.store(at_value + half, b_Nh.to(element), mask=is_value)


def turn_gpu(work: Turn, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """See the package. Raises ValueError for strides and types that the kernel does not know."""
    qkv_RND = work.qkv_RND
    rows, heads, size = qkv_RND.shape
    if qkv_RND.stride(2) != 1 or work.cos_PD.stride(1) != 1 or work.sin_PD.stride(1) != 1:
        raise ValueError(f"strides are {qkv_RND.stride()}: elements of a head must be neighbours")
    if not qkv_RND.dtype == k_pool_KPSD.dtype == v_pool_KPSD.dtype:
        raise ValueError(f"the product is {qkv_RND.dtype}, pools are {k_pool_KPSD.dtype} and {v_pool_KPSD.dtype}")
    for pool in (k_pool_KPSD, v_pool_KPSD):
        if pool.shape[3] != size or not pool[0].is_contiguous():
            raise ValueError(f"pool {list(pool.shape)} with strides {pool.stride()}: pages of heads of {size} numbers")
    if not rows:
        return
    block_h = next_power(size // 2)
    block_n = min(max(_TILE // block_h, 1), next_power(heads))
    if rows * -(-heads // block_n) < 256:
        # Of few rows, programs for many processors; not so small that a head is summed by more threads than of many.
        block_n = min(block_n, max(4, 256 // block_h))
    weight, eps = (qkv_RND, 0.0) if work.norm is None else (work.norm[0].contiguous(), work.norm[1])
    _turn[(rows, -(-heads // block_n))](
        qkv_RND,
        weight,
        work.cos_PD,
        work.sin_PD,
        work.pos_R,
        place_R,
        k_pool_KPSD,
        v_pool_KPSD,
        work.heads,
        work.kv_heads,
        size // 2,
        qkv_RND.stride(0),
        qkv_RND.stride(1),
        k_pool_KPSD.stride(0),
        v_pool_KPSD.stride(0),
        eps,
        BLOCK_N=block_n,
        BLOCK_H=block_h,
        HAS_NORM=work.norm is not None,
        KIND=tl.float64 if qkv_RND.element_size() == 8 else tl.float32,
        OVERLAP=overlaps(qkv_RND.device),
        launch_pdl=overlaps(qkv_RND.device),
        num_warps=min(max(block_n * block_h // 256, 1), 8),
    )
