"""Plain decoding: every pending token is a row, and the last pending row draws the next token.

A prompt chunk and a decode step are the same path: a request has n_tok tokens known and n_done committed;
row k is the token at index n_done + k, writes slot n + k, and sees the slots [0, n + k].
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.decoding.base import DECODERS, Demand
from headrace.step import Commit, OutTable, RowTable
from headrace.tables import RequestTable


@DECODERS.register(
    "autoregressive",
    label="exact",
    summary="Plain decoding; prompt chunks and decode rows are one path.",
)
class Autoregressive:
    """One token a step and request."""

    e_max = 1

    def demand(self, n_tok: int, n_done: int) -> Demand:
        """All pending tokens; one is enough for progress."""
        return Demand(1, n_tok - n_done)

    def plan(self, table: RequestTable, rows: RowTable, grant_B: Tensor) -> None:
        """Rows of a chunk: a = 0 (everything committed), and the step's own slots up to the row itself."""
        n_rows = rows.req.shape[0]
        req_R = torch.repeat_interleave(rows.reqs, grant_B, output_size=n_rows).long()
        first_R = torch.repeat_interleave(rows.row_ptr[:-1], grant_B, output_size=n_rows)
        k_R = torch.arange(n_rows, dtype=torch.int32, device=first_R.device) - first_R
        t_R = table.n_done[req_R] + k_R
        rows.req.copy_(req_R)
        rows.t.copy_(t_R)
        rows.tok.copy_(table.hist[req_R, t_R.long()])
        rows.pos.copy_(t_R + table.pos_off[req_R])
        rows.dst.copy_(k_R)
        rows.a.zero_()
        rows.b.zero_()
        torch.add(k_R, 1, out=rows.c)

    def resolve(self, table: RequestTable, rows: RowTable, outs: OutTable, drawn_B: Tensor, grant_B: Tensor) -> Commit:
        """All rows are committed; a token is emitted where the last pending one was among them."""
        reqs_B = rows.reqs.long()
        complete_B = table.n_done[reqs_B] + grant_B == table.n_tok[reqs_B]
        return Commit(n_kv=grant_B.int(), n_emit=complete_B.int(), emit=drawn_B[:, None])
