"""Steps whose model runs in recorded pieces: what lies between two attentions is replayed, attention is launched.

Most of a model depends on nothing but the number of rows: embedding, norms, products, and the writing of keys and
values to slots that are data. Only how attention reads depends on the step's requests. So for a number of rows the
model's forward is recorded once as a chain of CUDA graphs, cut where it reads, and a step of this size replays the
pieces and launches the reads between them, whatever its requests are. Everything around the model runs as it is.

A step is padded up to the next size with rows that nobody reads: they hold what earlier steps left there, and write to
the trash page. The first step of a size runs as it is; the second one is recorded, then replayed. As in `graphs.py` the
CPU records nothing, but replays as strictly: it calls the forward of the first step again, on the tensors that step
brought, and gives attention the tensors of the first call.

Letters: R rows of the size, n rows of the step, M rows whose hidden states are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from headrace.codecs.forms import Form
from headrace.engine.graphs import WIDEST, Pool, Recent, sizes
from headrace.errors import InvariantError
from headrace.step import RowTable, Scan, Turn

WANTED = (64, 512)
"""Numbers of wanted rows that the last layer is cut to; for more of them it computes all rows."""


class Shape(NamedTuple):
    """How a step is padded."""

    rows: int
    """R"""
    wanted: int
    """M; 0: hidden states of all rows."""


class Call(NamedTuple):
    """One reading of attention between two pieces. Its tensors stay at their addresses."""

    layer: int
    """As the cache counts."""
    q_RHD: Tensor
    k_RKD: Tensor
    v_RKD: Tensor
    out_RHD: Tensor
    """Where the next piece looks for the result."""
    scale: float
    softcap: float
    sinks_H: Tensor | None

    def first(self, n: int) -> Call:
        """Of the first n rows."""
        if n == self.q_RHD.shape[0]:
            return self
        return self._replace(q_RHD=self.q_RHD[:n], k_RKD=self.k_RKD[:n], v_RKD=self.v_RKD[:n], out_RHD=self.out_RHD[:n])


Reader = Callable[[Call], None]
"""Attends for the step's rows, and puts the result where it belongs."""


class Places(Protocol):
    """What the pieces ask of the cache."""

    def group_of(self, layer: int) -> int:
        """Group of a layer."""
        ...

    def layer_planes(self, layer: int) -> tuple[tuple[Tensor, ...], ...]:
        """All planes of one layer by class."""
        ...


class PieceContext:
    """What the layers see while they are recorded: rows and places at fixed addresses, and reads that are cuts."""

    def __init__(self, pieces: StepPieces, form: Form, cache: Places, rows: RowTable, soft_SE: Tensor | None) -> None:
        self._pieces, self._form, self._cache = pieces, form, cache
        self.turns = form.turns
        self.pos_AR, self.soft_SE = rows.pos, soft_SE
        self.cut: Reader = lambda call: None
        """Ends a piece, and begins the next."""

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
        """Write the rows as part of the piece, and leave the reading to the step."""
        place_R = self._pieces.place[self._cache.group_of(layer)][: len(q_RHD)]
        self._form.write(place_R, self._cache.layer_planes(layer), k_RKD, v_RKD, turn)
        out_RHD = self._pieces.room(q_RHD, v_RKD.shape[2])
        self.cut(Call(layer, q_RHD, k_RKD, v_RKD, out_RHD, scale, softcap, sinks_H))
        return out_RHD

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Never called: the runner asks before."""
        raise InvariantError(f"layer {layer} has a fixed state, and its step is recorded in pieces")


Body = Callable[[PieceContext], Tensor]
"""The model's forward over rows at fixed addresses: hidden states, [R, E] or those of the wanted rows."""


class Recording(Protocol):
    """A model's forward for one shape."""

    def play(self, read: Reader) -> Tensor:
        """Hidden states. Read them before the next play of any recording."""
        ...


class StepPieces:
    """Recorded forwards by key, and the tensors that all of them use.

    Args:
        most_rows: bounds the rows of a step.
        n_groups: cache groups of the model.
        pool: on a GPU the memory that recordings share.
    """

    def __init__(self, device: torch.device, most_rows: int, n_groups: int, pool: Pool | None = None) -> None:
        self.device, self.most = device, min(most_rows, WIDEST)
        self.sizes = sizes(self.most)
        self.place = [torch.zeros(self.most, dtype=torch.int64, device=device) for _ in range(n_groups)]
        """By group the physical slots that rows are written to; those behind the step's rows are trash."""
        self.wanted = torch.zeros(WANTED[-1], dtype=torch.int64, device=device)
        self.replays = 0
        self.recent: Recent[Recording] = Recent(device)
        self._rooms: dict[tuple[int, torch.dtype], Tensor] = {}
        self.pool = pool

    def shape(self, n_rows: int, n_wanted: int | None) -> Shape | None:
        """What a step of so many rows is padded to; None: it is too wide. `n_wanted`: None for all in their order."""
        rows = next((size for size in self.sizes if size >= n_rows), None)
        if rows is None:
            return None
        # As many wanted rows as there are could not be told from all.
        fits = (m for m in WANTED if n_wanted is not None and n_wanted <= m < rows)
        return Shape(rows, next(fits, 0))

    def room(self, q_RHD: Tensor, v_size: int) -> Tensor:
        """Where results of attention go, [R, H, Dv]: the same memory for all layers and sizes."""
        rows, heads, _ = q_RHD.shape
        key = (heads * v_size, q_RHD.dtype)
        if key not in self._rooms:
            # Zeros: rows behind those of the step are computed with, and NaN would be slow on some devices.
            self._rooms[key] = q_RHD.new_zeros(self.most, key[0])
        return self._rooms[key][:rows].view(rows, heads, v_size)

    def find(self, key: Hashable, make: Callable[[], tuple[Body, PieceContext]]) -> Recording | None:
        """What is recorded by a key; if it was met often enough, it is recorded now. None: the step runs as it is."""
        recording = self.recent.get(key)
        if recording is None and self.recent.is_due(key):
            for place_R in (*self.place, self.wanted):
                place_R.zero_()  # whatever is written while a forward is tried is trash
            body, context = make()
            recording = _Again(body, context) if self.pool is None else _record(body, context, self.pool)
            self.recent.put(key, recording)
        return recording

    def fill(self, shape: Shape, place_by_group: Sequence[Tensor], wanted_M: Tensor | None) -> None:
        """Bring the data of a step: int64 [n] by group, and int64 [m], if there are wanted rows."""
        for place_R, mine_n in zip(self.place, place_by_group, strict=True):
            place_R[: len(mine_n)].copy_(mine_n)
            if len(mine_n) < shape.rows:
                place_R[len(mine_n) : shape.rows].zero_()
        if wanted_M is not None and shape.wanted:
            self.wanted[: len(wanted_M)].copy_(wanted_M)
            if len(wanted_M) < shape.wanted:
                self.wanted[len(wanted_M) : shape.wanted].zero_()

    def play(self, recording: Recording, read: Reader) -> Tensor:
        """Hidden states, see `Recording`."""
        self.replays += 1
        return recording.play(read)


class _Again:
    """A recording on the CPU: the same forward again, its attention on the tensors of the first time."""

    def __init__(self, body: Body, context: PieceContext) -> None:
        self._body, self._context = body, context
        self._calls: list[Call] = []
        self._is_whole = False

    def play(self, read: Reader) -> Tensor:
        """See Recording."""
        number = 0

        def cut(call: Call) -> None:
            nonlocal number
            if self._is_whole:
                first, number = self._calls[number], number + 1
                if (first.layer, first.scale, first.softcap) != (call.layer, call.scale, call.softcap):
                    raise InvariantError(f"layer {call.layer} attends in another way than when it was recorded")
                for old, new in zip(first[1:4], call[1:4], strict=True):
                    if old is not new:
                        old.copy_(new)
                call = first
            else:
                self._calls.append(call)
            read(call)

        self._context.cut = cut
        hidden = self._body(self._context)
        self._is_whole = True
        return hidden


class _Graphs(NamedTuple):
    """A recording on a GPU."""

    pieces: list[tuple[torch.cuda.CUDAGraph, Call | None]]
    """Each with the reading behind it; the last one has none."""
    hidden: Tensor

    def play(self, read: Reader) -> Tensor:
        """See Recording. Nobody waits."""
        for graph, call in self.pieces:
            graph.replay()
            if call is not None:
                read(call)
        return self.hidden


def _record(body: Body, context: PieceContext, pool: Pool) -> _Graphs:
    """Run a forward whose attention reads nothing, which loads and tunes its kernels; then record it.

    A recording holds its graphs and bare addresses, no tensors: once it is made its memory is free for the next one,
    and within it that of a layer for the next layer, as when the forward runs as it is. That is right because forwards
    run one after the other, each begins with nothing, and what is launched between pieces has its memory elsewhere.
    """
    context.cut = lambda call: None
    body(context)
    done: list[tuple[torch.cuda.CUDAGraph, Call | None]] = []
    with pool.recording():
        graph = pool.begin()

        def cut(call: Call) -> None:
            nonlocal graph
            graph.capture_end()
            q_RHD, k_RKD, v_RKD = (_at_same_address(x) for x in call[1:4])
            done.append((graph, call._replace(q_RHD=q_RHD, k_RKD=k_RKD, v_RKD=v_RKD)))
            graph = pool.begin()

        context.cut = cut
        try:
            hidden = body(context)
        finally:
            graph.capture_end()
    done.append((graph, None))
    return _Graphs(done, _at_same_address(hidden))


class _Address:
    """Memory on a GPU that belongs to somebody else, as torch takes it (the CUDA array interface, version 2)."""

    def __init__(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes(),),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 2,
        }


def _at_same_address(x: Tensor) -> Tensor:
    """The same elements, without holding their memory."""
    whole = torch.as_tensor(_Address(x), device=x.device)
    return whole.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
