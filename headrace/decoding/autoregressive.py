"""Plain decoding: every pending token is a row, and the last pending row draws the next token.

A prompt chunk and a decode step are the same path: a request has n_tok tokens known and n_done committed;
row k is the token at index n_done + k, writes slot n + k, and sees the slots [0, n + k].
"""

from __future__ import annotations

from torch import Tensor

from headrace.decoding.base import DECODERS, Clocks, Decoder, Demand, Segment
from headrace.kernels.chain_rows import History, chain_rows
from headrace.kernels.walk import Walks, walk
from headrace.step import Commit


def plan_known(seg: Segment) -> None:
    """Rows of a chunk. Token ids are read from the history, whatever lies there behind the known tokens."""
    table = seg.table
    chain_rows(seg.rows, History(table.hist, table.n_done, table.pos_off), seg.entry_R, seg.k_R)


def walks(seg: Segment) -> Walks:
    """What a walk has to know of the step."""
    table = seg.table
    return Walks(table.n_tok, table.n_done, seg.reqs_B, seg.grant_B, seg.n_out_B, seg.out_first_B)


@DECODERS.register(
    "autoregressive",
    label="exact",
    summary="Plain decoding; prompt chunks and decode rows are one path.",
)
class Autoregressive(Decoder):
    """One token a step and request."""

    steady = True
    causal = True

    def demand(self, clocks: Clocks) -> Demand:
        """All pending tokens; one is enough for progress."""
        return Demand(1, clocks.n_tok - clocks.n_done)

    def foresee(self, clocks: Clocks, rows: int) -> Clocks:
        """All rows are committed, and the last pending one brings a token."""
        done = clocks.n_done + rows
        return Clocks(clocks.n_tok + (done == clocks.n_tok), done, 0, clocks.limit)

    def captures(self, prompts: bool) -> bool:
        """Any step: chunks and decode rows are one path."""
        return True

    def plan(self, seg: Segment) -> None:
        """Pending tokens in order."""
        plan_known(seg)

    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        """All rows are committed; a token is emitted where the last pending one was among them."""
        return Commit(*walk(walks(seg), id_M))
