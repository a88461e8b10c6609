"""The tables of one step: rows, outputs, grants, and what one layer keeps.

A step is one forward pass over rows. A row is one token position to evaluate for one request. Integers
are int32; slot fields are offsets from the committed length n, so that one row table serves cache groups
of different lengths. Letters: R rows, B requests of the step, Bmax request indices (index Bmax is the
ghost that padding points at), G cache groups, A position axes, M output rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

NONE = -(2**30)
"""Value of `a` that empties a row's first interval of visible slots."""

FAR = 2**30
"""A bound that is never reached."""


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps for a request. The engine never asks what a layer is."""

    kind: str
    """`paged`: keys and values of all tokens; `window`: of the last `window` tokens."""
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int = 0


class StepContext(Protocol):
    """What a layer sees of the step: the rows' positions and the one attention operation."""

    @property
    def pos_AR(self) -> Tensor:
        """RoPE positions, int32 [A, R]."""
        ...

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the rows' keys and values into the layer's cache, then attend. Returns [R, H, Dv]."""
        ...


@dataclass
class RowTable:
    """The rows of a step, at fixed addresses; a step uses the first R rows and B requests."""

    tok: Tensor
    req: Tensor
    t: Tensor
    pos: Tensor
    dst: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    bits: Tensor
    row_ptr: Tensor
    reqs: Tensor

    @classmethod
    def allocate(cls, max_rows: int, max_reqs: int, ghost: int, axes: int, device: torch.device) -> RowTable:
        """Tables filled with ghost rows: request `ghost`, nothing visible but the row itself."""

        def ints(*shape: int, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        return cls(
            tok=ints(max_rows),
            req=ints(max_rows, fill=ghost),
            t=ints(max_rows),
            pos=ints(axes, max_rows),
            dst=ints(max_rows),
            a=ints(max_rows, fill=NONE),
            b=ints(max_rows),
            c=ints(max_rows, fill=1),
            bits=ints(max_rows, fill=-1),
            row_ptr=ints(max_reqs + 1),
            reqs=ints(max_reqs, fill=ghost),
        )

    def first(self, n_rows: int, n_reqs: int) -> RowTable:
        """Views of the first `n_rows` rows and `n_reqs` requests."""
        return RowTable(
            tok=self.tok[:n_rows],
            req=self.req[:n_rows],
            t=self.t[:n_rows],
            pos=self.pos[:, :n_rows],
            dst=self.dst[:n_rows],
            a=self.a[:n_rows],
            b=self.b[:n_rows],
            c=self.c[:n_rows],
            bits=self.bits[:n_rows],
            row_ptr=self.row_ptr[: n_reqs + 1],
            reqs=self.reqs[:n_reqs],
        )


@dataclass
class OutTable:
    """Rows whose logits are wanted. The first B are draws, one a request; the rest are given (scored) tokens."""

    row: Tensor
    """Row of the step, int64 [M]."""
    t_out: Tensor
    """Index of the token that the output decides, int32 [M]."""
    n_draw: int
    """Outputs that are draws; output i < n_draw belongs to request i of the step."""
    target: Tensor
    """Token ids of the given outputs, int64 [M - n_draw]."""


@dataclass
class Commit:
    """What a decoder resolved, one entry a request of the step."""

    n_kv: Tensor
    """Rows whose keys and values become committed, int32 [B]."""
    n_emit: Tensor
    """Tokens emitted, int32 [B]."""
    emit: Tensor
    """Emitted token ids, int32 [B, e_max]; entries from n_emit on are not read."""


class Mirror:
    """A device table with a host copy, written by rows of its request axis and uploaded on `flush`.

    On the CPU both are the same memory and `flush` has nothing to do.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, fill: Any, axis: int = 0):
        self.device_table = torch.full(shape, fill, dtype=dtype, device=device)
        self._shared = device.type == "cpu"
        self.host: np.ndarray[Any, Any] = (
            self.device_table.numpy() if self._shared else torch.full(shape, fill, dtype=dtype).numpy()
        )
        self.axis = axis
        self._dirty: set[int] = set()

    def touch(self, index: int) -> None:
        """Mark the host row as changed."""
        if not self._shared:
            self._dirty.add(index)

    def flush(self) -> None:
        """Upload the changed rows."""
        if self._dirty:
            rows = sorted(self._dirty)
            where = torch.tensor(rows, dtype=torch.int64, device=self.device_table.device)
            source = torch.from_numpy(np.ascontiguousarray(self.host.take(rows, axis=self.axis)))
            self.device_table.index_copy_(self.axis, where, source.to(self.device_table.device))
            self._dirty.clear()
