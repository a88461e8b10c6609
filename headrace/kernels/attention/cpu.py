"""Paged attention over rows on the CPU: what `reference.py` defines, by a compiled kernel and torch's fused attention.

Requests with few rows (decode, drafts) read their pages in place, in the kernel of `cpu_kernel.py`. Requests with many
rows (prompt chunks) gather their pages (PagedAttention, arXiv 2309.06180) and go to torch. What depends on the step
only is prepared once, in `CpuPlan`, and shared by all layers.

Letters: see `reference.py`; also N items of the kernel, T threads, X rows whose slots more than one item visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.attention import reference
from headrace.kernels.attention.cpu_kernel import BLOCK_ROWS, CHUNK_SLOTS, TILE_SLOTS, attend_narrow, write_rows
from headrace.kernels.attention.reference import AttentionRows, Span
from headrace.kernels.cpu_runtime import use_torch_threads

WIDE_FROM = 9
"""Rows from which a request is gathered and given to torch. Two cores, H 6, K 2, D 64, float32, kernel against torch:
8 rows 0.76 to 0.87 ms over 1024 slots and 3.4 to 3.9 ms over 4096 (four requests), 12 rows 1.14 to 1.00 and 5.2 to 4.3.
"""
WIDE_FROM_SHORT = 24
"""The same for a request of at most `SHORT_SLOTS` slots, where gathering costs more than computing."""
SHORT_SLOTS = 128
NOWHERE = 2**40
"""A slot behind all slots."""

_TYPES: dict[torch.dtype, tuple[np.ndarray, np.ndarray]] = {
    # the element as the kernel reads it, and the type it computes in; bfloat16 is the upper half of a float32
    torch.float32: (np.zeros(1, np.float32), np.zeros(1, np.float32)),
    torch.float64: (np.zeros(1, np.float64), np.zeros(1, np.float64)),
    torch.bfloat16: (np.zeros(1, np.uint16), np.zeros(1, np.float32)),
}
_PLACE_TYPE = np.zeros(1, np.int64)


class _Narrow(NamedTuple):
    """Work of the compiled kernel under one window."""

    sees_R5: np.ndarray
    """By row: request index and two intervals of slots, as [begin, end) twice."""
    items_N5: np.ndarray
    """First row, rows, begin and end of the slots, first partial result or -1 where the item gives the result."""
    joins_X4: np.ndarray
    """Row, first partial result, number of them, step from one to the next."""
    n_parts: int
    bounds: dict[tuple[int, int], np.ndarray]
    """By (kv heads, threads): where the share of each thread begins."""
    parts: dict[tuple[int, int, np.dtype], tuple[np.ndarray, np.ndarray]]
    """By (heads, Dv, type): room for partial results; layers run one after the other and share it."""


class _Wide(NamedTuple):
    """One request whose pages are gathered, under one window."""

    rows: slice
    pages: Tensor
    slots: slice
    """The slots in question, within the gathered pages."""
    seen_rm: Tensor
    bias: dict[torch.dtype, Tensor | None]
    """By type: 0 where a row sees a slot and -inf elsewhere; None where all see all."""
    causal: bool
    """Row i sees slots 0 to i and there are no others."""
    stale_m1: Tensor | None
    """Slots that no row sees, if any."""
    blind_r: Tensor | None
    """Rows that see nothing, if any."""


class _Work(NamedTuple):
    narrow: _Narrow | None
    wide: list[_Wide]


class CpuPlan:
    """What all layers of a step share. Work depends on the layer's window and is listed when first asked for."""

    def __init__(
        self,
        rows: AttentionRows,
        page_table_BP: Tensor,
        kv_len_B: Tensor,
        page_size: int,
        lens: Sequence[tuple[int, int, int]],
        wide_from: int | None,
    ) -> None:
        self.rows, self.page_size = rows, page_size
        self.page_table_BP, self.kv_len_B = page_table_BP, kv_len_B
        self.table_BP: np.ndarray = page_table_BP.contiguous().numpy()
        self.first_B, self.count_B, self.visible_B = np.array(lens, np.int64).reshape(-1, 3).T
        self.visible_B = np.clip(self.visible_B, 0, page_table_BP.shape[1] * page_size)
        if wide_from is None:
            self.is_wide_B = self.count_B >= np.where(self.visible_B <= SHORT_SLOTS, WIDE_FROM_SHORT, WIDE_FROM)
        else:
            self.is_wide_B = self.count_B >= wide_from
        self.has_loose_rows = int(self.count_B.sum()) != rows.req_R.shape[0]
        self._work: dict[int, _Work] = {}

    def work(self, window: int) -> _Work:
        """The work of a layer with this window."""
        if window not in self._work:
            wide = [self._wide(int(index), window) for index in np.flatnonzero(self.is_wide_B)]
            self._work[window] = _Work(None if self.is_wide_B.all() else self._narrow(window), wide)
        return self._work[window]

    def _sees(self, window: int) -> np.ndarray:
        """Slots that each row sees: int32 [R, 5], see `_Narrow`."""
        req_R, t_R, a_R, b_R, c_R, _, reqs_B = (x.numpy() for x in self.rows)
        count_B = self.count_B
        entry = np.repeat(np.arange(len(count_B)), count_B)
        row = np.arange(len(entry)) + np.repeat(self.first_B - (np.cumsum(count_B) - count_B), count_B)
        limit_R = np.zeros(len(req_R), np.int64)
        limit_R[row] = np.where(req_R[row] == reqs_B[entry], self.visible_B[entry], 0)
        n_R = self.kv_len_B.numpy()[req_R].astype(np.int64)
        low_R = np.maximum(t_R.astype(np.int64) - window + 1, 0) if window > 0 else np.zeros_like(limit_R)
        end_R = np.clip(n_R + a_R, 0, limit_R)
        sees_R5 = np.empty((len(req_R), 5), np.int32)
        sees_R5[:, 0] = req_R
        sees_R5[:, 1] = low_R
        sees_R5[:, 2] = end_R
        sees_R5[:, 3] = np.maximum(np.maximum(n_R + b_R, low_R), end_R)
        sees_R5[:, 4] = np.minimum(n_R + c_R, limit_R)
        return sees_R5

    def _narrow(self, window: int) -> _Narrow:
        """Cut the rows of narrow requests into blocks, and what a block sees into chunks."""
        sees_R5 = self._sees(window)
        lo_RI, hi_RI = sees_R5[:, 1::2].astype(np.int64), sees_R5[:, 2::2].astype(np.int64)
        empty_RI = hi_RI <= lo_RI
        begin_R = np.append(np.where(empty_RI, np.int64(NOWHERE), lo_RI).min(1), 0)
        end_R = np.append(np.where(empty_RI, 0, hi_RI).max(1), 0)

        mine_B = ~self.is_wide_B & (self.count_B > 0)
        n_blocks_B = -(-self.count_B[mine_B] // BLOCK_ROWS)
        skip_N = (np.arange(n_blocks_B.sum()) - np.repeat(np.cumsum(n_blocks_B) - n_blocks_B, n_blocks_B)) * BLOCK_ROWS
        first_N = np.repeat(self.first_B[mine_B], n_blocks_B) + skip_N
        count_N = np.minimum(np.repeat(self.count_B[mine_B], n_blocks_B) - skip_N, BLOCK_ROWS)
        ranges = np.stack([first_N, first_N + count_N], 1).ravel()
        end_N = np.maximum.reduceat(end_R, ranges)[::2]
        begin_N = np.minimum(np.minimum.reduceat(begin_R, ranges)[::2], end_N)
        begin_N -= begin_N % TILE_SLOTS
        chunk_N = begin_N // CHUNK_SLOTS
        n_chunks_N = np.maximum(-(-end_N // CHUNK_SLOTS) - chunk_N, 1)
        n_parts_N = np.where(n_chunks_N > 1, n_chunks_N * count_N, 0)
        first_part_N = np.cumsum(n_parts_N) - n_parts_N

        block = np.repeat(np.arange(len(first_N)), n_chunks_N)
        i = np.arange(len(block)) - np.repeat(np.cumsum(n_chunks_N) - n_chunks_N, n_chunks_N)
        items_N5 = np.empty((len(block), 5), np.int64)
        items_N5[:, 0] = first_N[block]
        items_N5[:, 1] = count_N[block]
        items_N5[:, 2] = np.maximum((chunk_N[block] + i) * CHUNK_SLOTS, begin_N[block])
        items_N5[:, 3] = np.minimum((chunk_N[block] + i + 1) * CHUNK_SLOTS, end_N[block])
        items_N5[:, 4] = np.where(n_chunks_N[block] > 1, first_part_N[block] + i * count_N[block], -1)
        joins = [
            (first_N[b] + r, first_part_N[b] + r, n_chunks_N[b], count_N[b])
            for b in np.flatnonzero(n_chunks_N > 1)
            for r in range(count_N[b])
        ]
        joins_X4 = np.array(joins, np.int64).reshape(-1, 4)
        return _Narrow(sees_R5, items_N5, joins_X4, int(n_parts_N.sum()), {}, {})

    def _wide(self, index: int, window: int) -> _Wide:
        """What a wide request gathers, and its mask."""
        span = Span(int(self.first_B[index]), int(self.count_B[index]), int(self.visible_B[index]))
        rows = slice(span.first, span.first + span.rows)
        page, end = 0, span.visible
        if window > 0 and end > 0:
            low = int(self.rows.t_R[rows].min()) - window + 1
            page = min(max(low, 0), end - 1) // self.page_size
        begin = page * self.page_size
        pages = self.page_table_BP[int(self.rows.reqs_B[index]), page : -(-end // self.page_size)]
        seen_rm = reference.visible_slots(self.rows, index, span, self.kv_len_B, window, range(begin, end))
        stale_m1, blind_r = ~seen_rm.any(0)[:, None], ~seen_rm.any(1)
        causal = span.rows == end and not begin and torch.equal(seen_rm, torch.ones_like(seen_rm).tril())
        return _Wide(
            rows=rows,
            pages=pages.contiguous(),
            slots=slice(0, end - begin),
            seen_rm=seen_rm,
            bias={},
            causal=causal,
            stale_m1=stale_m1 if bool(stale_m1.any()) else None,
            blind_r=blind_r if bool(blind_r.any()) else None,
        )


def plan_attention(
    rows: AttentionRows,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    page_size: int,
    lens: Sequence[tuple[int, int, int]] | None = None,
    wide_from: int | None = None,
) -> CpuPlan:
    """The plan of a step.

    Requests with `wide_from` rows or more are gathered and given to torch, all others are left to the kernel. None is
    the fastest choice by measurement; a number larger than any request makes every row's bits a function of its
    request alone, whatever else is in the step and however a prompt is cut.
    """
    found = reference.find_spans(rows, kv_len_B) if lens is None else lens
    return CpuPlan(rows, page_table_BP, kv_len_B, page_size, found, wide_from)


def attend(
    q_RHD: Tensor,
    rows: AttentionRows,
    k_pool_KPSD: Tensor,
    v_pool_KPSD: Tensor,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    need_lse: bool = False,
    plan: CpuPlan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step; see the package for arguments and results."""
    plan = plan or plan_attention(rows, page_table_BP, kv_len_B, k_pool_KPSD.shape[2])
    dtype = q_RHD.dtype
    if dtype not in _TYPES or k_pool_KPSD.dtype != dtype or v_pool_KPSD.dtype != dtype:
        raise ValueError(
            f"queries are {dtype}, pools {k_pool_KPSD.dtype} and {v_pool_KPSD.dtype}: "
            f"attention on the CPU takes one type for all, of {', '.join(map(str, _TYPES))}"
        )
    work = plan.work(window)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (q_RHD.shape[0], q_RHD.shape[1], v_pool_KPSD.shape[3])
    out_RHD = torch.zeros(shape, dtype=kind) if plan.has_loose_rows else torch.empty(shape, dtype=kind)
    lse_RH = torch.full(shape[:2], float("-inf"), dtype=kind) if need_lse else None
    if sinks_H is not None:
        sinks_H = sinks_H.to(kind).contiguous()
    if work.narrow is not None:
        _run_narrow(q_RHD, k_pool_KPSD, v_pool_KPSD, plan, work.narrow, scale, softcap, sinks_H, out_RHD, lse_RH)
    for part in work.wide:
        _run_wide(q_RHD, k_pool_KPSD, v_pool_KPSD, part, scale, softcap, sinks_H, out_RHD, lse_RH)
    return (out_RHD if kind == dtype else out_RHD.to(dtype)), lse_RH


def _run_narrow(
    q_RHD: Tensor,
    k_pool_KPSD: Tensor,
    v_pool_KPSD: Tensor,
    plan: CpuPlan,
    work: _Narrow,
    scale: float,
    softcap: float,
    sinks_H: Tensor | None,
    out_RHD: Tensor,
    lse_RH: Tensor | None,
) -> None:
    if q_RHD.stride(2) != 1:
        q_RHD = q_RHD.contiguous()
    _, heads, size = q_RHD.shape
    kv_heads, v_size = k_pool_KPSD.shape[0], v_pool_KPSD.shape[3]
    like, acc_like = _TYPES[q_RHD.dtype]
    threads = use_torch_threads()
    bounds_T1 = work.bounds.get((kv_heads, threads))
    if bounds_T1 is None:
        bounds_T1 = work.bounds[kv_heads, threads] = _share_out(work.items_N5, kv_heads, threads)
    parts = work.parts.get((heads, v_size, acc_like.dtype))
    if parts is None:
        room = work.n_parts * heads
        parts = np.empty(room * v_size, acc_like.dtype), np.empty(room * 2, acc_like.dtype)
        work.parts[heads, v_size, acc_like.dtype] = parts
    io = (
        q_RHD.data_ptr(),
        k_pool_KPSD.data_ptr(),
        v_pool_KPSD.data_ptr(),
        out_RHD.data_ptr(),
        0 if lse_RH is None else lse_RH.data_ptr(),
        0 if sinks_H is None else sinks_H.data_ptr(),
        parts[0].ctypes.data,
        parts[1].ctypes.data,
    )
    strides = (q_RHD.stride(0), q_RHD.stride(1), _head_stride(k_pool_KPSD), _head_stride(v_pool_KPSD))
    shape = (*strides, heads, heads // kv_heads, size, v_size, plan.page_size)
    attend_narrow(
        io, shape, like, acc_like, scale, softcap, work.sees_R5, plan.table_BP, work.items_N5, work.joins_X4, bounds_T1
    )


def _share_out(items_N5: np.ndarray, kv_heads: int, threads: int) -> np.ndarray:
    """Where the share of each thread begins, by visited slots, counted by item and key/value head."""
    cost_N = (items_N5[:, 3] - items_N5[:, 2]) * items_N5[:, 1] + 8
    cost_U1 = np.append(0, np.cumsum(np.repeat(cost_N, kv_heads)))
    return np.searchsorted(cost_U1, cost_U1[-1] * np.arange(threads + 1) // threads)


def _head_stride(pool_KPSD: Tensor) -> int:
    """Elements from one head to the next of a pool whose heads are contiguous."""
    slots, size = pool_KPSD.shape[2:]
    if pool_KPSD.stride()[1:] != (slots * size, size, 1) and not pool_KPSD[0].is_contiguous():
        raise ValueError(f"pool strides are {pool_KPSD.stride()}: all but the first must be those of [P, S, D]")
    return pool_KPSD.stride(0)


def _run_wide(
    q_RHD: Tensor,
    k_pool_KPSD: Tensor,
    v_pool_KPSD: Tensor,
    work: _Wide,
    scale: float,
    softcap: float,
    sinks_H: Tensor | None,
    out_RHD: Tensor,
    lse_RH: Tensor | None,
) -> None:
    q_rHD = q_RHD[work.rows]
    k_KmD, v_KmD = (
        pool.index_select(1, work.pages).flatten(1, 2)[:, work.slots] for pool in (k_pool_KPSD, v_pool_KPSD)
    )
    if softcap > 0 or sinks_H is not None or lse_RH is not None:
        out_rHD, lse_rH = reference.attend_dense(
            q_rHD, k_KmD, v_KmD, work.seen_rm, scale=scale, softcap=softcap, sinks_H=sinks_H
        )
        out_RHD[work.rows] = out_rHD
        if lse_RH is not None:
            lse_RH[work.rows] = lse_rH
        return
    if work.stale_m1 is not None:
        # What no row sees may be NaN, and 0 * NaN is NaN.
        k_KmD.masked_fill_(work.stale_m1, 0.0)
        v_KmD.masked_fill_(work.stale_m1, 0.0)
    if not work.causal and q_RHD.dtype not in work.bias:
        bias_rm = torch.zeros(work.seen_rm.shape, dtype=q_RHD.dtype).masked_fill_(~work.seen_rm, float("-inf"))
        work.bias[q_RHD.dtype] = None if bool(work.seen_rm.all()) else bias_rm
    out_1HrD = F.scaled_dot_product_attention(
        q_rHD.transpose(0, 1)[None],
        k_KmD[None],
        v_KmD[None],
        attn_mask=None if work.causal else work.bias[q_RHD.dtype],
        is_causal=work.causal,
        scale=scale,
        enable_gqa=True,
    )
    out_RHD[work.rows] = out_1HrD[0].transpose(0, 1)
    if work.blind_r is not None:
        out_RHD[work.rows].masked_fill_(work.blind_r[:, None, None], 0.0)


def write_kv(k_RKD: Tensor, v_RKD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Store the rows' keys and values at physical slots `place_R`, int64."""
    dtype = k_pool_KPSD.dtype
    if dtype not in _TYPES or v_pool_KPSD.dtype != dtype:
        raise ValueError(
            f"pools are {dtype} and {v_pool_KPSD.dtype}: known are {', '.join(map(str, _TYPES))}, the same"
        )
    k_RKD, v_RKD = (x if x.dtype == dtype and x.stride(2) == 1 else x.to(dtype).contiguous() for x in (k_RKD, v_RKD))
    place_R = place_R.contiguous()
    shape = (
        k_RKD.shape[0],
        k_RKD.shape[1],
        k_RKD.stride(0),
        k_RKD.stride(1),
        v_RKD.stride(0),
        v_RKD.stride(1),
        _head_stride(k_pool_KPSD),
        _head_stride(v_pool_KPSD),
        k_RKD.shape[2],
        v_RKD.shape[2],
    )
    write_rows(
        k_RKD.data_ptr(),
        v_RKD.data_ptr(),
        k_pool_KPSD.data_ptr(),
        v_pool_KPSD.data_ptr(),
        place_R.data_ptr(),
        shape,
        _TYPES[dtype][0],
        _PLACE_TYPE,
    )
