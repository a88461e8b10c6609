"""The contract of a decoder.

A decoder owns which rows are evaluated and which tokens come of them. It writes the rows and outputs of
its requests and a `Commit`; it never touches clocks, page tables or pages: the engine clamps what it
emits at the first stop id and at the limit, advances the clocks and appends to the history.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from headrace.registry import Registry
from headrace.step import Commit, OutTable, RowTable
from headrace.tables import RequestTable


class Demand(NamedTuple):
    """Rows a decoder can use for one request in the next step."""

    least: int
    most: int


class Decoder(Protocol):
    """Plans rows and resolves drawn tokens for the requests of a step. All tensors are on the device."""

    e_max: int
    """Most tokens that one step may emit for a request."""

    def demand(self, n_tok: int, n_done: int) -> Demand:
        """Rows wanted by a request with these clocks. Host, pure."""
        ...

    def plan(self, table: RequestTable, rows: RowTable, grant_B: Tensor) -> None:
        """Fill the rows of the step. `rows` are views of exactly the granted size; `rows.reqs` and
        `rows.row_ptr` are filled already; grant_B is int64 [B]. No host synchronisation."""
        ...

    def resolve(self, table: RequestTable, rows: RowTable, outs: OutTable, drawn_B: Tensor, grant_B: Tensor) -> Commit:
        """Decide what is committed and emitted, from the drawn ids, int32 [B]. No host synchronisation."""
        ...


DECODERS: Registry[Decoder] = Registry("decoder", "decoder")
