"""Paged attention row by row over the whole page table: any device and floating type, and it waits for nothing.

Every row gathers all slots that its request could ever have, so this is for types that have no kernel (float64 on a
GPU, where results are checked) and for nothing else. Letters: see `reference.py`; also m slots of a page-table row,
r rows taken at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.attention.reference import AttentionRows

MAX_ELEMENTS = 2**25
"""Elements of gathered keys and values held at once; more rows are taken in turn."""


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
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step; see the package for arguments and results."""
    n_rows, heads, size = q_RHD.shape
    kv_heads, _, page_size, v_size = v_pool_KPSD.shape
    n_slots = page_table_BP.shape[1] * page_size
    kind = torch.float64 if q_RHD.dtype == torch.float64 else torch.float32
    seen_Rm = _visible(rows, kv_len_B, window, n_slots)
    offset_S = torch.arange(page_size, device=page_table_BP.device)
    outs, lses = [], []
    step = max(1, MAX_ELEMENTS // (kv_heads * n_slots * (size + v_size)))
    for first in range(0, n_rows, step):
        mine = slice(first, first + step)
        seen_rm = seen_Rm[mine]
        pages_rP = page_table_BP[rows.req_R[mine].long()].long()
        place_rm = (pages_rP[:, :, None] * page_size + offset_S).flatten(1)
        # A slot that the row does not see may hold anything, and 0 * NaN is NaN.
        k_KrmD, v_KrmD = (
            pool.flatten(1, 2)[:, place_rm].to(kind).masked_fill(~seen_rm[None, :, :, None], 0.0)
            for pool in (k_pool_KPSD, v_pool_KPSD)
        )
        q_rKGD = q_RHD[mine].to(kind).unflatten(1, (kv_heads, heads // kv_heads))
        score_rKGm = torch.einsum("rkgd,krmd->rkgm", q_rKGD, k_KrmD) * scale
        if softcap > 0:
            score_rKGm = softcap * torch.tanh(score_rKGm / softcap)
        score_rKGm = score_rKGm.masked_fill(~seen_rm[:, None, None, :], float("-inf"))
        lse_rKG = torch.logsumexp(score_rKGm, dim=-1)
        if sinks_H is not None:
            sinks_KG = sinks_H.to(kind).view(kv_heads, heads // kv_heads)
            lse_rKG = torch.logaddexp(lse_rKG, sinks_KG.where(lse_rKG > float("-inf"), float("-inf")))
        # Rows that see nothing have lse = -inf, and -inf - -inf is NaN.
        p_rKGm = torch.exp(score_rKGm - lse_rKG.masked_fill(lse_rKG == float("-inf"), 0.0)[..., None])
        outs.append(torch.einsum("rkgm,krmd->rkgd", p_rKGm, v_KrmD).flatten(1, 2).to(q_RHD.dtype))
        lses.append(lse_rKG.flatten(1))
    if not outs:
        empty_RH = q_RHD.new_zeros(0, heads, dtype=kind)
        return q_RHD.new_zeros(0, heads, v_size), empty_RH if need_lse else None
    return torch.cat(outs), torch.cat(lses) if need_lse else None


def _visible(rows: AttentionRows, kv_len_B: Tensor, window: int, n_slots: int) -> Tensor:
    """Which slots each row sees, bool [R, m]."""
    n_rows = rows.req_R.shape[0]
    place_R = torch.arange(n_rows, dtype=torch.int32, device=rows.req_R.device)
    entry_R = torch.searchsorted(rows.row_ptr_B1, place_R, right=True) - 1
    n_reqs = rows.reqs_B.shape[0]
    owner_R = rows.reqs_B[entry_R.clamp(0, max(n_reqs - 1, 0))] if n_reqs else torch.full_like(rows.req_R, -1)
    mine_R = (entry_R < n_reqs) & (owner_R == rows.req_R)
    n_R1 = kv_len_B[rows.req_R.long()][:, None]
    s_m = torch.arange(n_slots, dtype=torch.int32, device=place_R.device)
    second_Rm = (s_m >= n_R1 + rows.b_R[:, None]) & (s_m < n_R1 + rows.c_R[:, None])
    if rows.bits_R is not None and rows.words_W is not None:
        masked_Rm = second_Rm & (rows.bits_R[:, None] >= 0)
        j_Rm = s_m - (n_R1 + rows.b_R[:, None])
        # Where no mask is asked, a word in front of the table is read.
        words_W = torch.cat([rows.words_W.new_zeros(1), rows.words_W])
        word_Rm = words_W[torch.where(masked_Rm, 1 + rows.bits_R[:, None] + j_Rm // 32, 0).long()]
        second_Rm &= ~masked_Rm | ((word_Rm >> (j_Rm % 32)) & 1).bool()
    seen_Rm = (s_m < n_R1 + rows.a_R[:, None]) | second_Rm
    if window > 0:
        seen_Rm &= s_m > rows.t_R[:, None] - window
    return seen_Rm & mine_R[:, None]
