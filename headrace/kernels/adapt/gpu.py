"""Low-rank changes of linear maps on a GPU: what `reference.py` defines, in two launches, h = A_s x and y += B_s h.

For few rows each row has programs of its own, which read its place's factors as a stream. For many, neighbouring rows
share a tile, and the tile is multiplied once for each place that occurs in it: rows of one request stand side by side,
so that this is mostly one. Inputs are cut into shares whose sums are added in order. Launches follow from shapes alone,
and nothing waits for the device. Letters: R rows, E inputs, N outputs, P projections, Q rank, K = P Q, S places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.adapt.reference import Factors
from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.gpu_sizes import next_power

MOST_SINGLE_ROWS = 128
"""Rows up to which each is on its own; float64 always is."""
_SHARE_E = 512
"""Inputs that a program of the first product sums."""
_TILE_NUMBERS = 4096
"""Numbers of a tile of factors that the rows on their own read at a time."""
_BLOCK_N = 256
"""Outputs of a program for a row on its own."""
_TILE_R = 32
_TILE_N = 128
_TILE_E = 64


@triton.jit
def _shrink_row(h_CRK, x_RE, slot_R, a_SEK, n_rows, inputs, ranks, x_row, SHARE_E: tl.constexpr,
                BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    row, share = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_R + row).to(tl.int64)
    kind = h_CRK.dtype.element_ty
    if slot > 0:
        i_K = tl.arange(0, BLOCK_K)
        first = share * SHARE_E
        sum_EK = tl.zeros((BLOCK_E, BLOCK_K), dtype=kind)
        for start in range(0, SHARE_E, BLOCK_E):
            i_E = first + start + tl.arange(0, BLOCK_E)
            here_E = i_E < inputs
            x_E = tl.load(x_RE + row.to(tl.int64) * x_row + i_E, mask=here_E, other=0.0).to(kind)
            at_EK = a_SEK + (slot * inputs + i_E)[:, None] * ranks + i_K[None, :]
            a_EK = tl.load(at_EK, mask=here_E[:, None] & (i_K < ranks)[None, :], other=0.0).to(kind)
            sum_EK += x_E[:, None] * a_EK
        h_K = tl.sum(sum_EK, 0)
        tl.store(h_CRK + (share * n_rows + row).to(tl.int64) * ranks + i_K, h_K, mask=i_K < ranks)


@triton.jit
def _expand_row(y_RN, h_CRK, slot_R, b_SQN, borders_P, n_rows, outputs, rank, ranks, y_row, blocks,
                SHARES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    part, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    slot = tl.load(slot_R + row).to(tl.int64)
    kind = h_CRK.dtype.element_ty
    element = y_RN.dtype.element_ty
    if slot > 0:
        i_N = tl.load(borders_P + part) + block * BLOCK_N + tl.arange(0, BLOCK_N)
        here_N = i_N < tl.load(borders_P + part + 1)
        i_Q = tl.arange(0, BLOCK_Q)
        h_Q = tl.zeros((BLOCK_Q,), dtype=kind)
        for share in tl.static_range(SHARES):
            at_Q = h_CRK + (share * n_rows + row).to(tl.int64) * ranks + part * rank + i_Q
            h_Q += tl.load(at_Q, mask=i_Q < rank, other=0.0)
        h_Q = h_Q.to(element).to(kind)
        at_QN = b_SQN + (slot * rank + i_Q)[:, None] * outputs + i_N[None, :]
        b_QN = tl.load(at_QN, mask=(i_Q < rank)[:, None] & here_N[None, :], other=0.0).to(kind)
        y_N = y_RN + row.to(tl.int64) * y_row + i_N
        delta_N = tl.sum(h_Q[:, None] * b_QN, 0)
        tl.store(y_N, (tl.load(y_N, mask=here_N, other=0.0).to(kind) + delta_N).to(element), mask=here_N)


@triton.jit
def _shrink_tile(h_CRK, x_RE, slot_R, a_SEK, n_rows, inputs, ranks, x_row, SHARE_E: tl.constexpr,
                 BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    i_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    share = tl.program_id(1)
    i_K = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    slots_R = tl.load(slot_R + i_R, mask=i_R < n_rows, other=0)
    x_R1 = x_RE + i_R.to(tl.int64)[:, None] * x_row
    sum_RK = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    slot = tl.max(slots_R, 0)
    while slot > 0:
        a_11 = a_SEK + slot.to(tl.int64) * inputs * ranks
        mine_R = slots_R == slot
        for start in range(0, SHARE_E, BLOCK_E):
            i_E = share * SHARE_E + start + tl.arange(0, BLOCK_E)
            here_E = i_E < inputs
            tile_RE = tl.load(x_R1 + i_E[None, :], mask=(i_R < n_rows)[:, None] & here_E[None, :], other=0.0)
            # Chosen after the load: what is in other rows, be it NaN, stays there.
            tile_RE = tl.where(mine_R[:, None], tile_RE, tl.zeros_like(tile_RE))
            at_EK = a_11 + i_E[:, None] * ranks + i_K[None, :]
            a_EK = tl.load(at_EK, mask=here_E[:, None] & (i_K < ranks)[None, :], other=0.0)
            sum_RK = tl.dot(tile_RE, a_EK, sum_RK, input_precision="ieee")
        slots_R = tl.where(mine_R, 0, slots_R)
        slot = tl.max(slots_R, 0)
    at_RK = h_CRK + (share * n_rows + i_R).to(tl.int64)[:, None] * ranks + i_K[None, :]
    tl.store(at_RK, sum_RK, mask=(i_R < n_rows)[:, None] & (i_K < ranks)[None, :])


@triton.jit
def _expand_tile(y_RN, h_CRK, slot_R, b_SQN, borders_P, n_rows, outputs, rank, ranks, y_row, blocks,
                 SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_Q: tl.constexpr,
                 BLOCK_N: tl.constexpr):  # fmt: skip
    i_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    i_N = tl.load(borders_P + part) + block * BLOCK_N + tl.arange(0, BLOCK_N)
    here_N = i_N < tl.load(borders_P + part + 1)
    i_Q = tl.arange(0, BLOCK_Q)
    element = y_RN.dtype.element_ty
    slots_R = tl.load(slot_R + i_R, mask=i_R < n_rows, other=0)
    changed_R = slots_R > 0
    h_RQ = tl.zeros((BLOCK_R, BLOCK_Q), dtype=tl.float32)
    for share in tl.static_range(SHARES):
        at_RQ = h_CRK + (share * n_rows + i_R).to(tl.int64)[:, None] * ranks + part * rank + i_Q[None, :]
        h_RQ += tl.load(at_RQ, mask=(i_R < n_rows)[:, None] & (i_Q < rank)[None, :], other=0.0)
    rounded_RQ = h_RQ.to(element)
    sum_RN = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    slot = tl.max(slots_R, 0)
    while slot > 0:
        mine_R = slots_R == slot
        at_QN = b_SQN + slot.to(tl.int64) * rank * outputs + i_Q[:, None] * outputs + i_N[None, :]
        b_QN = tl.load(at_QN, mask=(i_Q < rank)[:, None] & here_N[None, :], other=0.0)
        mine_RQ = tl.where(mine_R[:, None], rounded_RQ, tl.zeros_like(rounded_RQ))
        sum_RN = tl.dot(mine_RQ, b_QN, sum_RN, input_precision="ieee")
        slots_R = tl.where(mine_R, 0, slots_R)
        slot = tl.max(slots_R, 0)
    at_RN = y_RN + i_R.to(tl.int64)[:, None] * y_row + i_N[None, :]
    here_RN = changed_R[:, None] & here_N[None, :]
    old_RN = tl.load(at_RN, mask=here_RN, other=0.0).to(tl.float32)
    tl.store(at_RN, (old_RN + sum_RN).to(element), mask=here_RN)


def adapt_gpu_(
    y_RN: Tensor, x_RE: Tensor, slot_R: Tensor, factors: Factors, *, single_rows: int = MOST_SINGLE_ROWS
) -> None:
    """See `headrace.kernels.adapt.adapt_`, which has checked the shapes. `single_rows`: see `MOST_SINGLE_ROWS`."""
    rows, inputs = x_RE.shape
    _, rank, outputs = factors.b_SQN.shape
    if not rows or not outputs:
        return
    if x_RE.stride(1) != 1:
        x_RE = x_RE.contiguous()
    y_there = y_RN if y_RN.stride(1) == 1 else y_RN.contiguous()
    parts = len(factors.borders) - 1
    ranks = parts * rank
    widest = max(high - low for low, high in zip(factors.borders, factors.borders[1:]))
    shares = max(-(-inputs // _SHARE_E), 1)
    kind = torch.float64 if x_RE.dtype is torch.float64 else torch.float32
    # Rows without a change are never written, and never read.
    h_CRK = x_RE.new_empty((shares, rows, ranks), dtype=kind)
    shrink = (h_CRK, x_RE, slot_R, factors.a_SEK, rows, inputs, ranks, x_RE.stride(0))
    expand = (y_there, h_CRK, slot_R, factors.b_SQN, factors.borders_P, rows, outputs, rank, ranks, y_there.stride(0))
    if rows <= single_rows or kind is torch.float64:
        block_k = next_power(ranks)
        block_e = min(max(_TILE_NUMBERS // block_k, 1), _SHARE_E)
        _shrink_row[(rows, shares)](*shrink, SHARE_E=_SHARE_E, BLOCK_E=block_e, BLOCK_K=block_k)
        block_n = min(next_power(widest), _BLOCK_N)
        blocks = -(-widest // block_n)
        _expand_row[(rows, parts * blocks)](
            *expand, blocks, SHARES=shares, BLOCK_Q=next_power(rank), BLOCK_N=block_n, num_warps=4
        )
    else:
        tiles = -(-rows // _TILE_R)
        block_k = min(max(next_power(ranks), 16), 64)
        _shrink_tile[(tiles, shares, -(-ranks // block_k))](
            *shrink, SHARE_E=_SHARE_E, BLOCK_R=_TILE_R, BLOCK_E=_TILE_E, BLOCK_K=block_k
        )
        block_n = min(max(next_power(widest), 16), _TILE_N)
        blocks = -(-widest // block_n)
        _expand_tile[(tiles, parts * blocks)](
            *expand, blocks, SHARES=shares, BLOCK_R=_TILE_R, BLOCK_Q=max(next_power(rank), 16), BLOCK_N=block_n
        )
    if y_there is not y_RN:
        y_RN.copy_(y_there)
