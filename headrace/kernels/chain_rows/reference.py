"""`chain_rows` in plain torch: the definition that the compiled form is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.step import NONE, RowTable


class History(NamedTuple):
    """Tables by request index, int32."""

    hist: Tensor
    """Token ids, [Bmax+1, max_len]."""
    n_done: Tensor
    """[Bmax+1]"""
    pos_off: Tensor
    """RoPE position of a token minus its index, [Bmax+1]."""


def chain_rows_reference(rows: RowTable, history: History, entry_R: Tensor, k_R: Tensor) -> None:
    """See the package."""
    req_R = rows.reqs.long()[entry_R]
    ghost_R = req_R == history.n_done.shape[0] - 1
    k_R = k_R.masked_fill(ghost_R, 0)
    t_R = (history.n_done[req_R] + k_R).masked_fill(ghost_R, 0)
    rows.req.copy_(req_R)
    rows.t.copy_(t_R)
    rows.tok.copy_(history.hist[req_R, t_R.long()].masked_fill(ghost_R, 0))
    rows.pos.copy_((t_R + history.pos_off[req_R]).masked_fill(ghost_R, 0))
    rows.dst.copy_(k_R)
    rows.a.zero_().masked_fill_(ghost_R, NONE)
    rows.b.zero_()
    torch.add(k_R, 1, out=rows.c)
    rows.bits.fill_(-1)
