"""Room for adapters: low-rank changes of linear maps, chosen row by row (LoRA, arXiv 2106.09685).

A model that is built with a bank has room for the factors of `max_adapters` adapters in each linear map, taken once:
loading writes into it, and addresses stay, so that recorded steps hold. Place 0 means no adapter. Before a step the
runner says which place each row has; a step without adapters says nothing, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from headrace.errors import InvariantError
from headrace.kernels.adapt import Factors, adapt_


class AdapterRoom:
    """The factors of all adapters for one linear map, whose projections stand side by side.

    Letters: R rows, E inputs, N outputs, S places, Q rank, K the ranks of all projections.
    """

    def __init__(
        self, bank: AdapterBank, inputs: int, outputs: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.bank, self.inputs, self.outputs = bank, inputs, tuple(outputs)
        self.names: tuple[str, ...] = ()
        """Names of the projections' modules in the checkpoint, or the one of all stored as one; empty: nobody has named
        them."""
        borders = tuple(accumulate(outputs, initial=0))
        places, rank = 1 + bank.max_adapters, bank.max_rank
        self.factors = Factors(
            torch.zeros(places, inputs, rank * len(outputs), device=device, dtype=dtype),
            torch.zeros(places, rank, borders[-1], device=device, dtype=dtype),
            borders,
            torch.tensor(borders, dtype=torch.int32, device=device),
        )
        self._changed: set[int] = set()

    @property
    def used(self) -> bool:
        """Whether some loaded adapter changes this map."""
        return bool(self._changed)

    @property
    def active(self) -> bool:
        """Whether this step's rows have adapters that may change this map."""
        return bool(self._changed) and self.bank.in_step

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(x.numel() * x.element_size() for x in (self.factors.a_SEK, self.factors.b_SQN))

    def parts(self, name: str) -> range:
        """The projections that a name stands for."""
        if len(self.names) == 1:
            return range(len(self.outputs))
        return range(self.names.index(name), self.names.index(name) + 1)

    def width(self, name: str) -> int:
        """Outputs of the projections that a name stands for."""
        return sum(self.outputs[part] for part in self.parts(name))

    def write(self, slot: int, name: str, a_QE: Tensor, b_NQ: Tensor) -> None:
        """Put the factors of a name, the second one scaled, into a place. Ranks beyond theirs stay zeros.

        Projections stored as one have the first factor in common, and each gets it.
        """
        rank, parts, borders = a_QE.shape[0], self.parts(name), self.factors.borders
        for part in parts:
            first = part * self.bank.max_rank
            self.factors.a_SEK[slot, :, first : first + rank].copy_(a_QE.t())
        self.factors.b_SQN[slot, :rank, borders[parts.start] : borders[parts.stop]].copy_(b_NQ.t())
        self._changed.add(slot)

    def clear(self, slot: int) -> None:
        """Make a place change nothing."""
        if slot in self._changed:
            self.factors.a_SEK[slot].zero_()
            self.factors.b_SQN[slot].zero_()
            self._changed.remove(slot)

    def adapt_(self, y_RN: Tensor, x_RE: Tensor) -> None:
        """Add the change of each row to what the map gave for it, in place."""
        adapt_(y_RN, x_RE, self.bank.slots_of(x_RE.shape[0]), self.factors)


class AdapterBank:
    """The rooms of a model, and which place each row of the running step has.

    Args:
        max_adapters: places, not counting the one that changes nothing.
        max_rank: the largest rank of a factor.
    """

    def __init__(self, max_adapters: int, max_rank: int) -> None:
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.rooms: list[AdapterRoom] = []
        self._slots: dict[int, Tensor] = {}

    def room(self, inputs: int, outputs: Sequence[int], device: torch.device, dtype: torch.dtype) -> AdapterRoom:
        """Room for the adapters of one more linear map."""
        self.rooms.append(AdapterRoom(self, inputs, outputs, device, dtype))
        return self.rooms[-1]

    @property
    def pattern(self) -> frozenset[int]:
        """The rooms that some loaded adapter changes, by number: a recorded step holds as long as this stays."""
        return frozenset(i for i, room in enumerate(self.rooms) if room.used)

    @property
    def nbytes(self) -> int:
        """Bytes of all rooms."""
        return sum(room.nbytes for room in self.rooms)

    def clear(self, slot: int) -> None:
        """Make a place change nothing in any map."""
        for room in self.rooms:
            room.clear(slot)

    def warm_up(self, rows: int) -> None:
        """Run the kernels once over rows that change nothing."""
        for room in self.rooms[:1]:
            x_RE = room.factors.a_SEK.new_zeros(rows, room.inputs)
            slot_R = torch.zeros(rows, dtype=torch.int32, device=x_RE.device)
            adapt_(x_RE.new_zeros(rows, sum(room.outputs)), x_RE, slot_R, room.factors)

    @property
    def in_step(self) -> bool:
        """Whether a step with adapters runs now."""
        return bool(self._slots)

    @contextmanager
    def step(self, slot_R: Tensor, wanted_M: Tensor | None = None) -> Iterator[None]:
        """The rows of the forward pass within have these places, int32 [R].

        Maps are told apart by their number of rows: all of them, or those `wanted_M` (int64 [M], M other than R) to
        which a model cuts its rows once nobody reads the others.
        """
        self._slots = {slot_R.shape[0]: slot_R}
        if wanted_M is not None:
            self._slots = {wanted_M.shape[0]: slot_R.index_select(0, wanted_M), **self._slots}
        try:
            yield
        finally:
            self._slots = {}

    def slots_of(self, rows: int) -> Tensor:
        """Places of the rows of a map, int32 [rows]. Raises InvariantError for rows that nobody has announced."""
        if rows not in self._slots:
            raise InvariantError(f"a linear map got {rows} rows; the step's adapters are known for {[*self._slots]}")
        return self._slots[rows]
