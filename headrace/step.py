"""The tables of one step: rows, outputs, grants, and what one layer keeps.

A step is one forward pass over rows. A row is one token position to evaluate for one request. Integers
are int32; slot fields are offsets from the committed length n, so that one row table serves cache groups
of different lengths. Letters: R rows, B requests of the step, Bmax request indices (index Bmax is the
ghost that padding points at), G cache groups, A position axes, M output rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.staging import upload

MASK_WORDS = 2
"""Words of 32 bits in the mask of a row over the rows of its request in this step."""

NONE = -(2**30)
"""Value of `a` that empties a row's first interval of visible slots."""

FAR = 2**30
"""A bound that is never reached."""


@dataclass(frozen=True)
class LayerState:
    """What one layer keeps for a request. The engine never asks what a layer is."""

    kind: str
    """`paged`: keys and values of all tokens; `window`: of the last `window` tokens; `fixed`: one state."""
    kv_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    window: int = 0
    values_in_keys: bool = False
    """Values are the first `v_head_dim` numbers of the keys, so that they need not be kept twice."""
    state_shape: tuple[int, ...] = ()
    """Axes of a fixed state, those of one request."""
    ring: int = 0
    """Rows of a request that a step may evaluate and not accept; a decoder that drafts more is refused."""


@dataclass(frozen=True)
class Plane:
    """One array of a class of pages: an entry for each slot, [L, K, P, S, *shape], or for each page, [L, K, P, *shape].

    Letters: L layers of a group, K key/value heads, P pages, S slots in a page.
    """

    name: str
    shape: tuple[int, ...]
    """Axes of one entry."""
    dtype: torch.dtype
    by_page: bool = False
    """One entry a page; such planes can only be sealed, not written slot by slot."""
    within: str = ""
    """Another plane of the class, of whose entries these are the first part: it has no memory of its own."""


@dataclass(frozen=True)
class PageClass:
    """What the pages of one pool hold."""

    name: str
    planes: tuple[Plane, ...]

    def bytes_per_page(self, kv_heads: int, page_size: int) -> int:
        """Bytes of one page in one layer."""
        own = [plane for plane in self.planes if not plane.within]
        entries = sum((1 if p.by_page else page_size) * math.prod(p.shape) * p.dtype.itemsize for p in own)
        return kv_heads * entries


class PageCodec(Protocol):
    """What the cache manager asks of a codec (headrace/codecs/base.py says more)."""

    @property
    def open_pages(self) -> int:
        """Most pages of the first class that a request holds, 0 if there is no other."""
        ...

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        """The classes of a layer's pages: the open one, to which rows are written, and the sealed one if there is."""
        ...

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [..., P, S, D] of pages of a class, from its planes [..., P, S, *] or [..., P, *]."""
        ...

    def seal(self, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        """The planes of sealed pages, from those of the open ones."""
        ...

    def sealed(self, n_tokens: int) -> int:
        """Slots that are sealed when so many are committed, in whole pages."""
        ...


class Scan(Protocol):
    """A layer's recurrence over the rows of a step. Letters: B requests, R rows, X the axes of a state."""

    def __call__(self, state_BX: Tensor, inputs: Sequence[Tensor], row_ptr: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [R, ...] of all rows, and the states [B, *X] behind the last row of each request.

        Bit for bit a request's results depend on its own state and rows, and not on how its rows are cut into calls;
        otherwise they would depend on the schedule. A scan row by row is so; one by chunks is not, unless the cuts are.

        Args:
            state_BX: states before the first row, float32 or float64; a copy that may be overwritten and returned.
            inputs: at least one tensor [R, ...], rows in order; not to be changed, they may be scanned again.
            row_ptr: borders, int32 [B+1]: the rows of request b are [row_ptr[b], row_ptr[b+1]), possibly none, which
                leaves its state as it is. Rows behind the last border belong to nobody: their outputs are not read.
        """
        ...


class Turn(NamedTuple):
    """What happens to queries and keys between their product and attention."""

    qkv_RND: Tensor
    """The product, [R, H + 2 K, D]: queries, keys, values."""
    heads: int
    """H"""
    kv_heads: int
    """K"""
    norm: tuple[Tensor, float] | None
    """RMS norm of every query and key head before the rotation: weights [H + K, D] and eps."""
    cos_PD: Tensor
    """Cosines by position, float32 (float64 for float64), [positions, D/2]; cast to the product's type."""
    sin_PD: Tensor
    """Sines likewise."""
    pos_R: Tensor
    """Positions of the rows, int32."""


class StepContext(Protocol):
    """What a layer sees of the step: the rows' positions and the one attention operation."""

    @property
    def turns(self) -> bool:
        """Whether `attend` is given queries and keys as the product left them, with a `turn`."""
        ...

    @property
    def pos_AR(self) -> Tensor:
        """RoPE positions, int32 [A, R]."""
        ...

    @property
    def soft_SE(self) -> Tensor | None:
        """Inputs that are no tokens, in the model's type: a row with tok < 0 reads entry -1 - tok."""
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
        turn: Turn | None = None,
    ) -> Tensor:
        """Write the rows' keys and values into the layer's cache, then attend. Returns [R, H, Dv].

        With a `turn`, which only a context with `turns` takes, queries, keys and values are parts of its product, and
        they are turned in place first.
        """
        ...

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Scan the rows from the layer's fixed states, once a step. Returns the scan's outputs, [R, ...].

        The state advances at the commit, by the accepted rows. A block with two states (a short convolution before a
        recurrence) is two layers to the step.
        """
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
    """First word of the row's mask over its second interval of slots, or -1: all of them are visible."""
    words: Tensor
    """Masks, bit j of word w for slot 32 w + j of the interval, int32 [R, MASK_WORDS]."""
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
            words=ints(max_rows, MASK_WORDS),
            row_ptr=ints(max_reqs + 1),
            reqs=ints(max_reqs, fill=ghost),
        )

    def first(self, n_rows: int, n_reqs: int) -> RowTable:
        """Views of the first `n_rows` rows and `n_reqs` requests."""
        return self.part(range(n_rows), range(n_reqs))

    def part(self, rows: range, reqs: range) -> RowTable:
        """Views of some rows and requests; `row_ptr` keeps counting from the first row of the step."""
        r, b = slice(rows.start, rows.stop), slice(reqs.start, reqs.stop)
        return RowTable(
            tok=self.tok[r],
            req=self.req[r],
            t=self.t[r],
            pos=self.pos[:, r],
            dst=self.dst[r],
            a=self.a[r],
            b=self.b[r],
            c=self.c[r],
            bits=self.bits[r],
            words=self.words[r],
            row_ptr=self.row_ptr[reqs.start : reqs.stop + 1],
            reqs=self.reqs[b],
        )

    def clear(self, ghost: int) -> None:
        """Make every row a ghost: it belongs to nobody, writes to the trash page and sees itself alone."""
        for column, value in (
            (self.tok, 0),
            (self.req, ghost),
            (self.t, 0),
            (self.pos, 0),
            (self.dst, 0),
            (self.a, NONE),
            (self.b, 0),
            (self.c, 1),
            (self.bits, -1),
        ):
            column.fill_(value)


@dataclass
class OutTable:
    """Rows whose hidden states are wanted: the draws of every request, in the order of the step, then given tokens."""

    row: Tensor
    """Row of the step, int64 [M]."""
    n_draw: int
    """Outputs that are draws."""
    target: Tensor
    """Token ids of the given outputs, int64 [M - n_draw]."""


@dataclass
class Commit:
    """What a decoder resolved, one entry a request, all int32."""

    n_kv: Tensor
    """Rows whose keys and values become committed, [B]."""
    n_emit: Tensor
    """Tokens emitted, [B]."""
    emit: Tensor
    """Emitted token ids, [B, e_max]; entries from n_emit on are not read."""
    priced_by: Tensor
    """The draw that each emitted token came from, counted from the decoder's first one, [B, e_max]."""
    path: Tensor | None = None
    """Row offsets of the accepted rows, [B, e_max]; None: accepted rows lie where they belong already.

    Row path[i] of a request becomes slot n + path_from + i; the rows before `path_from` stay in their places.
    """
    path_from: Tensor | None = None
    """Rows that stay, [B]."""


class Mirror:
    """A device table with a host copy, written by rows of its request axis and uploaded by `flush`.

    On the CPU both are the same memory, and there is nothing to upload.
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

    def take_changes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Indices and contents of the rows that changed since the last call; None: there are none."""
        if not self._dirty:
            return None
        rows = np.array(sorted(self._dirty))
        self._dirty.clear()
        return rows, np.ascontiguousarray(self.host.take(rows, axis=self.axis))


def flush(mirrors: Iterable[Mirror]) -> None:
    """Upload the changed rows of all, in one copy. Nobody waits for it."""
    changed = [(mirror, changes) for mirror in mirrors if (changes := mirror.take_changes())]
    if not changed:
        return
    device = changed[0][0].device_table.device
    arrived = iter(upload([array for _, changes in changed for array in changes], device))
    for mirror, _ in changed:
        mirror.device_table.index_copy_(mirror.axis, next(arrived), next(arrived))
