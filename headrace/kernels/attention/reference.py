"""Paged attention over rows, as a dense mask in plain torch: the definition that every fast form is compared with.

Row i of request r, with n = kv_len[r] committed slots, sees slot s of its request if and only if
    (s < n + a_i  or  n + b_i <= s < n + c_i and bit(i, s - n - b_i))  and  s >= low_i,
    low_i = t_i - window + 1, or 0 without a window,
    bit(i, j) = (words[bits_i + j // 32] >> (j % 32)) & 1, or 1 for all j if bits_i < 0,
and out_i = sum_s p_s v_s with p = softmax of scale * q_i k_s over the seen slots (arXiv 1706.03762; pages: arXiv
2309.06180; sinks: arXiv 2309.17453). Slot s lies in page page_table[r, s // S] at offset s % S.

Letters: R rows, B requests of the step (of a table: request indices), H query heads, K key/value heads, G = H / K,
D and Dv head sizes, P pages, S slots in a page, m slots of one request, r rows of one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

FEW_ROWS = 16
"""Rows of a request from which it counts as a prompt."""
MAX_SCORES = 2**25
"""Scores held at once; more rows are taken in turn."""


class AttentionRows(NamedTuple):
    """Which rows a step has and what they see; int32 tensors on the pools' device."""

    req_R: Tensor
    """Request index of the row. A row whose index is not that of its entry in `reqs_B` is padding and sees nothing."""
    t_R: Tensor
    """Token index of the row; only windows read it."""
    a_R: Tensor
    """End of the first interval of visible slots, as an offset from n; NONE empties the interval."""
    b_R: Tensor
    """Begin of the second interval, as an offset from n."""
    c_R: Tensor
    """End of the second interval, as an offset from n."""
    row_ptr_B1: Tensor
    """Rows [row_ptr[i], row_ptr[i + 1]) belong to the i-th request of the step."""
    reqs_B: Tensor
    """Request index of the i-th request of the step."""
    bits_R: Tensor | None = None
    """-1, or the index in `words_W` of the first word of the row's mask over its second interval (tree drafts: a
    row's ancestors, SpecInfer, arXiv 2305.09781). None: no row has a mask."""
    words_W: Tensor | None = None
    """Words of all masks, 32 slots each, the first slot in the lowest bit. Bits behind the interval's end are not
    read. Given if and only if `bits_R` is."""
    joined: bool = False
    """Whether the host knows that the visible slots of each row, and those of all rows of a request together, are one
    interval each: c <= b or b <= a everywhere, and no masks. A GPU may then take a faster way."""
    few: bool = False
    """Whether the host knows that no request has FEW_ROWS rows, ghosts aside."""


class Span(NamedTuple):
    """What the host knows of one request of a step."""

    first: int
    """Its first row."""
    rows: int
    """Its number of rows."""
    visible: int
    """A bound on the slots that its rows see: n + max(a, c) or more."""


class ReferencePlan(NamedTuple):
    """What all layers of a step share."""

    spans: tuple[Span, ...]


def check_bits(rows: AttentionRows) -> None:
    """Raise ValueError unless masks and words come together, as int32 [R] and int32 [W]."""
    if (rows.bits_R is None) != (rows.words_W is None):
        name, other = ("words_W", "bits_R") if rows.bits_R is None else ("bits_R", "words_W")
        raise ValueError(f"rows have {name} but no {other}: give both, or neither if no row has a mask")
    if rows.bits_R is None or rows.words_W is None:
        return
    if rows.bits_R.dtype != torch.int32 or rows.bits_R.shape != rows.req_R.shape:
        is_, rows_R = f"{rows.bits_R.dtype} {list(rows.bits_R.shape)}", list(rows.req_R.shape)
        raise ValueError(f"bits_R is {is_}: it is torch.int32, one a row, {rows_R}")
    if rows.words_W.dtype != torch.int32 or rows.words_W.dim() != 1:
        is_ = f"{rows.words_W.dtype} {list(rows.words_W.shape)}"
        raise ValueError(f"words_W is {is_}: words of masks are torch.int32 [W]")


def find_spans(rows: AttentionRows, kv_len_B: Tensor) -> list[Span]:
    """The spans of a step, read from its tables. Waits for the device."""
    ptr = rows.row_ptr_B1.tolist()
    last_R = torch.maximum(rows.a_R, rows.c_R)
    n_B = kv_len_B.index_select(0, rows.reqs_B).tolist()
    return [
        Span(first, end - first, max(0, n + int(last_R[first:end].max())) if end > first else 0)
        for (first, end), n in zip(pairwise(ptr), n_B, strict=True)
    ]


def plan_attention(
    rows: AttentionRows, kv_len_B: Tensor, lens: Sequence[tuple[int, int, int]] | None = None
) -> ReferencePlan:
    """The plan of a step. `lens` holds the spans if the host knows them; without it the device is waited for."""
    check_bits(rows)
    found = find_spans(rows, kv_len_B) if lens is None else lens
    return ReferencePlan(tuple(Span(*span) for span in found))


def visible_slots(rows: AttentionRows, index: int, span: Span, kv_len_B: Tensor, window: int, slots: range) -> Tensor:
    """Which of `slots` the rows of the step's request `index` see: bool [r, m].

    A mask that reaches behind the end of `words_W` raises IndexError on the CPU.
    """
    req_1 = rows.reqs_B[index : index + 1]
    n_1 = kv_len_B.index_select(0, req_1)
    a_r1, b_r1, c_r1, t_r1, req_r1 = (
        x[span.first : span.first + span.rows, None] for x in (rows.a_R, rows.b_R, rows.c_R, rows.t_R, rows.req_R)
    )
    s_m = torch.arange(slots.start, slots.stop, dtype=torch.int32, device=n_1.device)
    second_rm = (s_m >= n_1 + b_r1) & (s_m < n_1 + c_r1)
    if rows.bits_R is not None and rows.words_W is not None:
        bits_r1 = rows.bits_R[span.first : span.first + span.rows, None]
        masked_rm = second_rm & (bits_r1 >= 0)
        j_rm = s_m - (n_1 + b_r1)
        # Where no mask is asked, a word in front of the table is read.
        words_W = torch.cat([rows.words_W.new_zeros(1), rows.words_W])
        word_rm = words_W[torch.where(masked_rm, 1 + bits_r1 + j_rm // 32, 0).long()]
        second_rm &= ~masked_rm | ((word_rm >> (j_rm % 32)) & 1).bool()
    seen_rm = (s_m < n_1 + a_r1) | second_rm
    if window > 0:
        seen_rm &= s_m > t_r1 - window
    return seen_rm & (req_r1 == req_1)


def attend_dense(
    q_rHD: Tensor,
    k_KmD: Tensor,
    v_KmD: Tensor,
    seen_rm: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one request's rows over its gathered slots, in float32 (float64 for float64).

    Returns out [r, H, Dv] and lse [r, H] in that type: the logarithm of the softmax denominator, sink included. A row
    that sees nothing has out 0 and lse -inf, sink or not.
    """
    kind = torch.float64 if q_rHD.dtype == torch.float64 else torch.float32
    rows, heads, size = q_rHD.shape
    if rows > 1 and rows * heads * k_KmD.shape[1] > MAX_SCORES:
        step = max(1, MAX_SCORES // (heads * k_KmD.shape[1]))
        parts = [
            attend_dense(q, k_KmD, v_KmD, seen, scale=scale, softcap=softcap, sinks_H=sinks_H)
            for q, seen in zip(q_rHD.split(step), seen_rm.split(step), strict=True)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    kv_heads = k_KmD.shape[0]
    q_rKGD = q_rHD.to(kind).view(rows, kv_heads, heads // kv_heads, size)
    # A slot that no row sees may hold anything, and 0 * NaN is NaN.
    stale_m1 = ~seen_rm.any(0)[:, None]
    k_KmD, v_KmD = (x.to(kind).masked_fill(stale_m1, 0.0) for x in (k_KmD, v_KmD))
    scores_rKGm = torch.einsum("rkgd,kmd->rkgm", q_rKGD, k_KmD) * scale
    if softcap > 0:
        scores_rKGm = softcap * torch.tanh(scores_rKGm / softcap)
    scores_rKGm = scores_rKGm.masked_fill(~seen_rm[:, None, None, :], float("-inf"))
    lse_rKG = torch.logsumexp(scores_rKGm, dim=-1)
    if sinks_H is not None:
        sinks_KG = sinks_H.to(kind).view(kv_heads, heads // kv_heads)
        lse_rKG = torch.logaddexp(lse_rKG, sinks_KG.where(lse_rKG > float("-inf"), float("-inf")))
    # Rows that see nothing have lse = -inf, and -inf - -inf is NaN.
    p_rKGm = torch.exp(scores_rKGm - lse_rKG.masked_fill(lse_rKG == float("-inf"), 0.0)[..., None])
    out_rKGD = torch.einsum("rkgm,kmd->rkgd", p_rKGm, v_KmD)
    return out_rKGD.reshape(rows, heads, v_KmD.shape[-1]), lse_rKG.reshape(rows, heads)


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
    plan: ReferencePlan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step; see the package for arguments and results. Any device and floating type."""
    plan = plan or plan_attention(rows, kv_len_B)
    n_rows, heads, _ = q_RHD.shape
    page_size = k_pool_KPSD.shape[2]
    out_RHD = q_RHD.new_zeros(n_rows, heads, v_pool_KPSD.shape[3])
    kind = torch.float64 if q_RHD.dtype == torch.float64 else torch.float32
    lse_RH = q_RHD.new_full((n_rows, heads), float("-inf"), dtype=kind) if need_lse else None
    for index, span in enumerate(plan.spans):
        slots = min(span.visible, page_table_BP.shape[1] * page_size)
        if not span.rows or not slots:
            continue  # the rows of this request see nothing
        table_1p = page_table_BP.index_select(0, rows.reqs_B[index : index + 1])
        pages = table_1p[0, : -(-slots // page_size)]
        k_KmD, v_KmD = (x.index_select(1, pages).flatten(1, 2)[:, :slots] for x in (k_pool_KPSD, v_pool_KPSD))
        seen_rm = visible_slots(rows, index, span, kv_len_B, window, range(slots))
        mine = slice(span.first, span.first + span.rows)
        out_rHD, lse_rH = attend_dense(
            q_RHD[mine], k_KmD, v_KmD, seen_rm, scale=scale, softcap=softcap, sinks_H=sinks_H
        )
        out_RHD[mine] = out_rHD
        if lse_RH is not None:
            lse_RH[mine] = lse_rH
    return out_RHD, lse_RH


def write_kv(k_RKD: Tensor, v_RKD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Store the rows' keys and values at physical slots `place_R` = page * S + offset, int64 in [0, P * S)."""
    for rows_RKD, pool_KPSD in ((k_RKD, k_pool_KPSD), (v_RKD, v_pool_KPSD)):
        slots_KND = pool_KPSD.view(pool_KPSD.shape[0], -1, pool_KPSD.shape[3])
        slots_KND.index_copy_(1, place_R, rows_RKD.transpose(0, 1).to(pool_KPSD.dtype))
