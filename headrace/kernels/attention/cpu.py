"""Paged attention over rows on the CPU: what `reference.py` defines, by a compiled kernel and torch's fused attention.

Requests with few rows (decode, drafts) read their pages in place, in the kernel of `cpu_kernel.py`. Requests with many
rows (prompt chunks) gather their pages (PagedAttention, arXiv 2309.06180) and go to torch, unless a row has a mask: the
kernel reads the set bits only. What depends on the step only is prepared once, in `CpuPlan`, and shared by all layers.

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
from headrace.kernels.attention.cpu_kernel import attend_narrow, write_rows
from headrace.kernels.attention.cpu_work import list_items, list_seen, share_out
from headrace.kernels.attention.pools import pool_strides
from headrace.kernels.attention.reference import AttentionRows
from headrace.kernels.cpu_runtime import use_torch_threads

WIDE_FROM = 10
"""Rows from which a request is gathered and given to torch.

Kernel against torch in ms, 8 requests, two cores, H 6, K 2, D 64, float32: 8 rows over 128 slots 0.22 to 0.23, over 256
slots 0.40 to 0.42; 12 rows 0.32 to 0.26 and 0.57 to 0.51.
"""
MAX_GROUP_SCORES = 2**19
"""Rows times slots of the wide requests that go to torch together: beyond it the calls no longer cost more."""
MAX_PADDING = 1.3
"""Padded size of such a group over the sizes of its requests."""
NOWHERE = 2**40
"""A slot behind all slots."""

_TYPES: dict[torch.dtype, tuple[np.ndarray, np.ndarray]] = {
    # the element as the kernel reads it, and the type it computes in; bfloat16 is the upper half of a float32
    torch.float32: (np.zeros(1, np.float32), np.zeros(1, np.float32)),
    torch.float64: (np.zeros(1, np.float64), np.zeros(1, np.float64)),
    torch.bfloat16: (np.zeros(1, np.uint16), np.zeros(1, np.float32)),
}
_PLACE_TYPE = np.zeros(1, np.int64)
_NO_BITS = np.zeros(0, np.int32)


class _Narrow(NamedTuple):
    """Work of the compiled kernel under one window."""

    sees_R7: np.ndarray
    """By row: request index, two intervals of slots as [begin, end), and the mask over the second: see `list_seen`."""
    items_N5: np.ndarray
    """First row, rows, begin and end of the slots, first partial result or -1 where the item gives the result."""
    joins_X4: np.ndarray
    """Row, first partial result, number of them, step from one to the next."""
    n_parts: int
    bounds: dict[tuple[int, int], np.ndarray]
    """By (kv heads, threads): where the share of each thread begins."""
    parts: dict[tuple[int, int, np.dtype], tuple[np.ndarray, np.ndarray]]
    """By (heads, Dv, type): room for partial results; layers run one after the other and share it."""


class _Wide:
    """Some requests whose pages are gathered and padded to one shape, under one window.

    Letters here: B requests of the group, r rows, m slots. Padding rows repeat the last row of their request; padding
    slots are seen by no row.
    """

    def __init__(
        self, rows_Br: np.ndarray, counts: list[int], pages_BP: np.ndarray, m: int, sees_Br4: np.ndarray
    ) -> None:
        self.shape = rows_Br.shape
        self.counts, self.m = counts, m
        self.pages = torch.from_numpy(pages_BP.reshape(-1))
        self.firsts: list[int] = rows_Br[:, 0].tolist()
        together = np.array_equal(rows_Br.reshape(-1), np.arange(rows_Br.size) + rows_Br[0, 0])
        self.rows: Tensor | None = None if together else torch.from_numpy(rows_Br.reshape(-1))
        real_X = (np.arange(rows_Br.shape[1]) < np.array(counts)[:, None]).reshape(-1)
        self.real: Tensor | None = None if real_X.all() else torch.from_numpy(np.flatnonzero(real_X))
        self._sees_Br4 = sees_Br4
        covered_B = [_covered(sees_r4, m) for sees_r4 in sees_Br4]
        self.stale_B1m1 = None
        if not all(covered.all() for covered in covered_B):
            self.stale_B1m1 = torch.from_numpy(~np.stack(covered_B))[:, None, :, None]
        # Row i sees slots 0 to i, and there are no others.
        lo_r, hi_r, lo2_r, hi2_r = sees_Br4[0].T
        alone = np.where(hi_r > lo_r, (lo_r == 0) & ((hi2_r <= lo2_r) | (lo2_r == hi_r)), lo2_r == 0)
        end_r = np.maximum(hi_r, np.where(hi2_r > lo2_r, hi2_r, 0))
        self.causal = self.shape == (1, m) and bool((alone & (end_r == np.arange(1, m + 1))).all())
        self._bias: dict[torch.dtype, Tensor | None] = {}

    def is_whole(self, n_rows: int) -> bool:
        """Whether the group is all rows of the step, in their order."""
        return self.rows is None and self.shape[0] * self.shape[1] == n_rows

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """0 where a row sees a slot and -inf elsewhere, [B, 1, r, m]; None if torch needs no mask."""
        if self.causal:
            return None
        if dtype not in self._bias:
            bias_Brm = np.full((*self.shape, self.m), -np.inf, np.float64 if dtype == torch.float64 else np.float32)
            for row_m, (lo, hi, lo2, hi2) in zip(
                bias_Brm.reshape(-1, self.m), self._sees_Br4.reshape(-1, 4).tolist(), strict=True
            ):
                row_m[lo:hi] = 0
                row_m[lo2:hi2] = 0
            self._bias[dtype] = torch.from_numpy(bias_Brm)[:, None].to(dtype) if bias_Brm.any() else None
        return self._bias[dtype]

    def seen(self, i: int) -> Tensor:
        """The mask of request i without its padding rows, bool [r, m]."""
        s_m = np.arange(self.m)
        lo_r1, hi_r1, lo2_r1, hi2_r1 = self._sees_Br4[i, : self.counts[i]].T[..., None]
        return torch.from_numpy(((s_m >= lo_r1) & (s_m < hi_r1)) | ((s_m >= lo2_r1) & (s_m < hi2_r1)))


def _covered(sees_r4: np.ndarray, m: int) -> np.ndarray:
    """Which of m slots some row sees."""
    edges_m1 = np.zeros(m + 1, np.int64)
    for lo_r, hi_r in (sees_r4[:, :2].T, sees_r4[:, 2:].T):
        mine_r = hi_r > lo_r
        np.add.at(edges_m1, lo_r[mine_r], 1)
        np.add.at(edges_m1, hi_r[mine_r], -1)
    return np.cumsum(edges_m1[:m]) > 0


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
        wide_from: int,
    ) -> None:
        self.rows, self.page_size = rows, page_size
        self.page_table_BP, self.kv_len_B = page_table_BP, kv_len_B
        self.table_BP: np.ndarray = page_table_BP.contiguous().numpy()
        self.lens_B3 = np.array(lens, np.int64).reshape(-1, 3)
        np.clip(self.lens_B3[:, 2], 0, page_table_BP.shape[1] * page_size, out=self.lens_B3[:, 2])
        self.first_B, self.count_B, self.visible_B = self.lens_B3.T
        self.words_W: Tensor | None = None
        self.wide_B: np.ndarray = self.count_B >= wide_from
        if rows.bits_R is not None and rows.words_W is not None:
            self.words_W = rows.words_W.contiguous()
            masks_R1 = np.concatenate([[0], np.cumsum(rows.bits_R.numpy() >= 0)])
            self.wide_B &= masks_R1[self.first_B + self.count_B] == masks_R1[self.first_B]
        self.has_narrow = bool(((self.count_B > 0) & ~self.wide_B).any())
        self.has_loose_rows = int(self.count_B.sum()) != rows.req_R.shape[0]
        self._work: dict[int, _Work] = {}

    def work(self, window: int) -> _Work:
        """The work of a layer with this window."""
        if window not in self._work:
            rows = tuple(x.numpy() for x in self.rows[:7])
            bits_R, n_words = _NO_BITS, 0
            if self.rows.bits_R is not None and self.words_W is not None:
                bits_R, n_words = self.rows.bits_R.contiguous().numpy(), len(self.words_W)
            sees_R7 = list_seen(rows, bits_R, n_words, self.lens_B3, self.kv_len_B.numpy(), window)
            narrow = None
            if self.has_narrow:
                items_N5, joins_X4, n_parts = list_items(sees_R7, self.lens_B3, self.wide_B)
                narrow = _Narrow(sees_R7, items_N5, joins_X4, n_parts, {}, {})
            self._work[window] = _Work(narrow, [self._wide(group, sees_R7) for group in self._groups()])
        return self._work[window]

    def _groups(self) -> list[list[int]]:
        """Wide requests that go to torch together: of similar size, and small enough that calls cost more than work."""
        size = {int(i): (int(self.count_B[i]), int(self.visible_B[i])) for i in np.flatnonzero(self.wide_B)}
        groups: list[list[int]] = []
        used = rows = slots = 0
        for i in sorted(size, key=lambda i: size[i][::-1]):
            count, visible = size[i]
            rows, slots, used = max(rows, count), max(slots, visible), used + count * visible
            padded = (len(groups[-1]) + 1) * rows * slots if groups else 0
            if groups and padded <= MAX_GROUP_SCORES and padded <= MAX_PADDING * used:
                groups[-1].append(i)
            else:
                groups.append([i])
                rows, slots, used = count, visible, count * visible
        return [sorted(group) for group in groups]

    def _wide(self, group: list[int], sees_R7: np.ndarray) -> _Wide:
        """What a group of wide requests gathers, and its masks, from the first page that a row of it sees."""
        counts = [int(self.count_B[i]) for i in group]
        last_B1 = np.array([[self.first_B[i] + self.count_B[i] - 1] for i in group])
        rows_Br = np.minimum(self.first_B[group][:, None] + np.arange(max(counts)), last_B1)
        sees_Br4 = sees_R7[rows_Br, 1:5].astype(np.int64)
        lo_B, hi_B = sees_Br4[..., ::2].reshape(len(group), -1), sees_Br4[..., 1::2].reshape(len(group), -1)
        seen_B = hi_B > lo_B
        page_B = np.where(seen_B, lo_B, NOWHERE).min(1) // self.page_size
        end_B = np.where(seen_B, hi_B, 0).max(1)
        page_B = np.minimum(page_B, end_B // self.page_size)
        begin_B = page_B * self.page_size
        m = max(int((end_B - begin_B).max()), 1)
        reqs_B = self.rows.reqs_B.numpy()
        pages_BP = np.zeros((len(group), -(-m // self.page_size)), np.int64)
        for pages_P, i, page, end in zip(pages_BP, group, page_B, end_B, strict=True):
            mine_P = self.table_BP[reqs_B[i], page : -(-end // self.page_size)]
            pages_P[: len(mine_P)] = mine_P
        sees_Br4 = np.clip(sees_Br4 - begin_B[:, None, None], 0, m)
        return _Wide(rows_Br, counts, pages_BP, m, sees_Br4)


def plan_attention(
    rows: AttentionRows,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    page_size: int,
    lens: Sequence[tuple[int, int, int]] | None = None,
    wide_from: int = WIDE_FROM,
) -> CpuPlan:
    """The plan of a step.

    Requests with `wide_from` rows or more and no masks are gathered and given to torch, all others are left to the
    kernel. With a number larger than any request, every row's bits are a function of its request alone, however a
    prompt is cut.
    """
    reference.check_bits(rows)
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
    plain = softcap == 0 and sinks_H is None and not need_lse
    if plain and work.narrow is None and len(work.wide) == 1 and work.wide[0].is_whole(shape[0]):
        return _fused(q_RHD, k_pool_KPSD, v_pool_KPSD, work.wide[0], scale).reshape(shape), None
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
        bounds_T1 = work.bounds[kv_heads, threads] = share_out(work.items_N5, kv_heads, threads)
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
        0 if plan.words_W is None else plan.words_W.data_ptr(),
    )
    (k_head, _), (v_head, v_slot) = pool_strides(k_pool_KPSD), pool_strides(v_pool_KPSD)
    strides = q_RHD.stride(0), q_RHD.stride(1), k_head, v_head
    shape = (*strides, heads, heads // kv_heads, size, v_size, plan.page_size, v_slot)
    attend_narrow(
        io, shape, like, acc_like, scale, softcap, work.sees_R7, plan.table_BP, work.items_N5, work.joins_X4, bounds_T1
    )


def _gather(q_RHD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, work: _Wide) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, r, H, D] of a group, and its keys and values [B, K, m, D]."""
    requests, count = work.shape
    first = work.firsts[0]
    q_XHD = q_RHD[first : first + requests * count] if work.rows is None else q_RHD.index_select(0, work.rows)
    k_BKmD, v_BKmD = (
        pool.index_select(1, work.pages)
        .view(pool.shape[0], requests, -1, pool.shape[3])[:, :, : work.m]
        .transpose(0, 1)
        for pool in (k_pool_KPSD, v_pool_KPSD)
    )
    return q_XHD.view(requests, count, *q_RHD.shape[1:]), k_BKmD, v_BKmD


def _fused(q_RHD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, work: _Wide, scale: float) -> Tensor:
    """Outputs [B, r, H, Dv] of a group by torch's fused attention. A row that sees nothing gets zeros from torch."""
    q_BrHD, k_BKmD, v_BKmD = _gather(q_RHD, k_pool_KPSD, v_pool_KPSD, work)
    if work.stale_B1m1 is not None:
        # What no row sees may be NaN, and 0 * NaN is NaN.
        k_BKmD.masked_fill_(work.stale_B1m1, 0.0)
        v_BKmD.masked_fill_(work.stale_B1m1, 0.0)
    return F.scaled_dot_product_attention(
        q_BrHD.transpose(1, 2),
        k_BKmD,
        v_BKmD,
        attn_mask=work.bias(q_RHD.dtype),
        is_causal=work.causal,
        scale=scale,
        enable_gqa=True,
    ).transpose(1, 2)


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
    if softcap > 0 or sinks_H is not None or lse_RH is not None:
        # Fused attention has neither of them.
        q_BrHD, k_BKmD, v_BKmD = _gather(q_RHD, k_pool_KPSD, v_pool_KPSD, work)
        for i, (first, count) in enumerate(zip(work.firsts, work.counts, strict=True)):
            out_rHD, lse_rH = reference.attend_dense(
                q_BrHD[i, :count], k_BKmD[i], v_BKmD[i], work.seen(i), scale=scale, softcap=softcap, sinks_H=sinks_H
            )
            out_RHD[first : first + count] = out_rHD
            if lse_RH is not None:
                lse_RH[first : first + count] = lse_rH
        return
    out_BrHD = _fused(q_RHD, k_pool_KPSD, v_pool_KPSD, work, scale)
    if work.rows is None:
        first = work.firsts[0]
        out_RHD[first : first + out_BrHD.shape[0] * out_BrHD.shape[1]].view(out_BrHD.shape).copy_(out_BrHD)
        return
    out_XHD = out_BrHD.flatten(0, 1).to(out_RHD.dtype)
    if work.real is None:
        out_RHD.index_copy_(0, work.rows, out_XHD)
    else:
        out_RHD.index_copy_(0, work.rows[work.real], out_XHD.index_select(0, work.real))


def write_kv(k_RKD: Tensor, v_RKD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Store the rows' keys and values at physical slots `place_R`, int64."""
    dtype = k_pool_KPSD.dtype
    if dtype not in _TYPES or v_pool_KPSD.dtype != dtype:
        raise ValueError(
            f"pools are {dtype} and {v_pool_KPSD.dtype}: known are {', '.join(map(str, _TYPES))}, the same"
        )
    k_RKD, v_RKD = (x if x.dtype == dtype and x.stride(2) == 1 else x.to(dtype).contiguous() for x in (k_RKD, v_RKD))
    place_R = place_R.contiguous()
    v_head, v_slot = pool_strides(v_pool_KPSD)
    shape = (
        k_RKD.shape[0],
        k_RKD.shape[1],
        k_RKD.stride(0),
        k_RKD.stride(1),
        v_RKD.stride(0),
        v_RKD.stride(1),
        pool_strides(k_pool_KPSD)[0],
        v_head,
        k_RKD.shape[2],
        v_RKD.shape[2],
        v_slot,
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
