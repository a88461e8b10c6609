"""Fixed-size states: what linear attention, state-space layers and short convolutions keep of a request.

A layer brings one function, its `scan` (see `headrace.step.Scan`): state and inputs of rows in, outputs of the rows and
the state behind them out. The store keeps the state at the last committed row. Between the body of a step and its
commit it holds the step's inputs and the state behind all rows; commit takes that state where every row was accepted,
and elsewhere scans the accepted rows again, from the state that was never touched. So rolling back is not advancing,
and a state that no draft could disturb costs one state a request instead of one a row (the inputs are kept and the
accepted ones replayed in The Mamba in the Llama, arXiv 2408.15237, too).

Letters: B requests of the step, R rows, L layers of a group, X the axes of a state, Bmax request indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.errors import ConfigError, InvariantError
from headrace.step import Commit, LayerState, Scan

TRASH = 0
"""The slot that ghosts read and write."""


@dataclass(frozen=True)
class StateGroup:
    """Layers whose states have one shape; they lie in one pool."""

    layers: tuple[int, ...]
    state: LayerState


def group_states(states: Sequence[LayerState], first: int = 0) -> list[StateGroup]:
    """One group for each distinct fixed state, in order of appearance; layers are counted from `first`.

    Layers of other kinds are passed over. Raises ConfigError for a shape or a ring that cannot be.
    """
    layers: dict[LayerState, list[int]] = {}
    for layer, state in enumerate(states, first):
        if state.kind != "fixed":
            continue
        if not state.state_shape or min(state.state_shape) < 1:
            raise ConfigError(
                f"layer {layer} keeps a state of shape {state.state_shape}; every axis must be at least 1"
            )
        if state.ring < 0:
            raise ConfigError(f"layer {layer} has a ring of {state.ring} rows; it must be at least 0")
        layers.setdefault(state, []).append(layer)
    return [StateGroup(tuple(members), state) for state, members in layers.items()]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the states of a model: sums over a whole sequence are not kept in less than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_bytes(groups: Sequence[StateGroup], max_reqs: int, dtype: torch.dtype) -> int:
    """Bytes of all pools for a model of type `dtype`."""
    elements = sum(len(group.layers) * torch.Size(group.state.state_shape).numel() for group in groups)
    return (max_reqs + 1) * elements * state_dtype(dtype).itemsize


def chains_only(groups: Sequence[StateGroup]) -> bool:
    """Whether rows of a request must follow one another: a scan knows of no branches."""
    return bool(groups)


def check_decoder(
    name: str, groups: Sequence[StateGroup], *, drafts: int, tree: bool, own: Sequence[LayerState] = ()
) -> None:
    """Refuse a decoder that the model's states cannot follow.

    Args:
        name: the decoder.
        groups: states of the model that decodes.
        drafts: rows of a request that a step may leave unaccepted.
        tree: whether rows may branch.
        own: layer states of the decoder's own models.

    Raises:
        ConfigError: says which two things do not fit, and the way out.
    """
    if any(state.kind == "fixed" for state in own):
        raise ConfigError(
            f"decoder {name!r} has a model of its own with fixed states, whose drafts could not be taken back: "
            "choose a draft model whose layers are all attention"
        )
    if tree and chains_only(groups):
        raise ConfigError(
            f"decoder {name!r} verifies trees, but layer {groups[0].layers[0]} keeps a fixed state that follows one "
            "chain of tokens: choose a decoder that drafts chains"
        )
    for group in groups:
        if drafts > group.state.ring:
            raise ConfigError(
                f"decoder {name!r} leaves up to {drafts} rows unaccepted, but layer {group.layers[0]} can take back "
                f"{group.state.ring}: set draft_tokens to at most {group.state.ring}, or choose another decoder"
            )


class StateBlob(NamedTuple):
    """The states of one request, in host memory."""

    tokens: int
    """Rows that the states have taken up."""
    states: tuple[Tensor, ...]
    """[L, *X] of each group."""


class StateStore:
    """Pools of fixed-size states, one slot a request index.

    A request needs exactly one slot a group from admission to release, so its slot is its index + 1 and the line of
    free indices is the line of free slots: there is nothing more to reserve, to lose or to run out of. A fork takes the
    child's own slot, and what is spilled lies in host memory, so neither asks for another rule. Slot 0 is the ghost's.

    Args:
        groups: see `group_states`.
        max_reqs: Bmax; index Bmax is the ghost.
        dtype: the model's type; states are kept in it, but in no less than float32.
        device: where the pools lie.
    """

    def __init__(
        self, groups: Sequence[StateGroup], *, max_reqs: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.groups = list(groups)
        self.max_reqs = max_reqs
        self._pools_LSX = [
            torch.zeros(
                len(group.layers), max_reqs + 1, *group.state.state_shape, dtype=state_dtype(dtype), device=device
            )
            for group in self.groups
        ]
        self.layers = {
            layer: pool_LSX[i]
            for group, pool_LSX in zip(self.groups, self._pools_LSX, strict=True)
            for i, layer in enumerate(group.layers)
        }
        """Pool [Bmax+1, *X] of each layer."""
        self._tokens_S = torch.zeros(max_reqs + 1, dtype=torch.int32, device=device)
        self._held: set[int] = set()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.numel() * pool.element_size() for pool in self._pools_LSX)

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request's states."""
        return self.allocated_bytes // (self.max_reqs + 1)

    def state(self, layer: int, index: int) -> Tensor:
        """State [*X] of a layer at the last committed row of a request; a view."""
        return self.layers[layer][index + 1]

    def admit(self, index: int) -> None:
        """A request takes `index`: its states are zero."""
        self._take(index)
        # Not by assignment: that copies a number from the host, and waits for the device.
        for pool_LSX in self._pools_LSX:
            pool_LSX[:, index + 1].zero_()
        self._tokens_S[index + 1].zero_()

    def release(self, index: int) -> None:
        """The request gives `index` back. Raises InvariantError if nobody holds it."""
        if index not in self._held:
            raise InvariantError(f"state slot {index + 1} is given back, but nobody holds it")
        self._held.remove(index)

    def fork(self, index: int, child: int) -> None:
        """A request takes `child` with a copy of the states of `index`."""
        if index not in self._held:
            raise InvariantError(f"state slot {index + 1} is copied, but nobody holds it")
        self._take(child)
        for pool_LSX in self._pools_LSX:
            pool_LSX[:, child + 1] = pool_LSX[:, index + 1]
        self._tokens_S[child + 1] = self._tokens_S[index + 1]

    def spill(self, index: int) -> StateBlob:
        """Copy the states of a request to host memory; it keeps its slot until `release`."""
        if index not in self._held:
            raise InvariantError(f"state slot {index + 1} is spilled, but nobody holds it")
        states = tuple(pool_LSX[:, index + 1].to("cpu", copy=True) for pool_LSX in self._pools_LSX)
        return StateBlob(int(self._tokens_S[index + 1]), states)

    def restore(self, index: int, blob: StateBlob) -> None:
        """A request takes `index` with the states of a blob. Raises ConfigError for a blob of another model."""
        shapes = [pool_LSX[:, TRASH].shape for pool_LSX in self._pools_LSX]
        if [state.shape for state in blob.states] != shapes:
            raise ConfigError(
                f"the spilled states have shapes {[tuple(state.shape) for state in blob.states]}, the model keeps "
                f"{[tuple(shape) for shape in shapes]}: restore them into the model that they were spilled from"
            )
        self._take(index)
        for pool_LSX, state_LX in zip(self._pools_LSX, blob.states, strict=True):
            pool_LSX[:, index + 1] = state_LX.to(pool_LSX)
        self._tokens_S[index + 1] = blob.tokens

    def step(self, reqs_B: Tensor, row_ptr: Tensor) -> StateStep:
        """Open a step over the rows [row_ptr[b], row_ptr[b+1]) of the request indices `reqs_B` (int32 [B], [B+1])."""
        return StateStep(self, reqs_B, row_ptr)

    def audit(self, n_done: Mapping[int, int]) -> None:
        """Raise InvariantError unless exactly these indices are held and their states stand at these clocks."""
        if self._held != set(n_done):
            raise InvariantError(f"state slots are held for the indices {self._held}; requests hold {set(n_done)}")
        tokens = self._tokens_S.tolist() if self.groups else []
        for index, done in n_done.items():
            if tokens and tokens[index + 1] != done:
                raise InvariantError(
                    f"the states of index {index} have taken up {tokens[index + 1]} tokens; {done} are committed"
                )

    def advance(self, slot_B: Tensor, n_kv_B: Tensor) -> None:
        """Count committed rows."""
        self._tokens_S.index_add_(0, slot_B, n_kv_B)

    def _take(self, index: int) -> None:
        if not 0 <= index < self.max_reqs or index in self._held:
            raise InvariantError(f"state slot {index + 1} is held already or does not exist")
        self._held.add(index)


class _Scanned(NamedTuple):
    """What is held of a layer until the commit."""

    scan: Scan
    inputs: Sequence[Tensor]
    end_BX: Tensor


class StateStep:
    """One step: every layer's scan, then one commit. Nothing is written before the commit, or without one."""

    def __init__(self, store: StateStore, reqs_B: Tensor, row_ptr: Tensor) -> None:
        self._store = store
        self._row_ptr = row_ptr
        self._reqs_B = reqs_B
        self._scanned: dict[int, _Scanned] = {}

    @cached_property
    def _slot_B(self) -> Tensor:
        return (self._reqs_B.long() + 1) % (self._store.max_reqs + 1)  # the ghost's is slot 0

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """See `StepContext.recur`. Raises InvariantError for a layer without fixed state, or a second call."""
        pool_SX = self._store.layers.get(layer)
        if pool_SX is None or layer in self._scanned:
            raise InvariantError(f"layer {layer} keeps no fixed state, or recurs twice in a step")
        out_R, end_BX = scan(pool_SX.index_select(0, self._slot_B), inputs, self._row_ptr)
        self._scanned[layer] = _Scanned(scan, inputs, end_BX)
        return out_R

    def commit(self, commit: Commit, n_kv_B: Tensor) -> None:
        """Advance every state by the accepted rows: `n_kv_B` of each request (int32 [B]), on the decoder's path.

        Waits for the device to say whether any row was refused, as the report of the step does anyway.
        """
        if not self._store.layers:
            return
        if len(self._scanned) != len(self._store.layers):
            raise InvariantError(f"layers {sorted(self._store.layers.keys() - self._scanned)} did not recur in a step")
        # Who has all rows accepted has them in order: a path leads from a row to later ones.
        whole_B = n_kv_B == self._row_ptr.diff()
        n_rows = next(iter(self._scanned.values())).inputs[0].shape[0]
        again = None if bool(whole_B.all()) else self._accepted(commit, torch.where(whole_B, 0, n_kv_B), n_rows)
        for layer, (scan, inputs, end_BX) in self._scanned.items():
            pool_SX = self._store.layers[layer]
            if again is not None:
                row_R, row_ptr = again
                picked = [x.index_select(0, row_R) for x in inputs]
                _, replayed_BX = scan(pool_SX.index_select(0, self._slot_B), picked, row_ptr)
                end_BX = torch.where(whole_B.view(-1, *[1] * (end_BX.dim() - 1)), end_BX, replayed_BX)
            pool_SX.index_copy_(0, self._slot_B, end_BX)
        self._store.advance(self._slot_B, n_kv_B)
        self._scanned.clear()

    def _accepted(self, commit: Commit, count_B: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """The first `count_B` accepted rows of each request: rows of the step, int64 [R], and their borders, [B+1].

        Rows behind the last border are padding.
        """
        row_ptr = torch.cat([count_B.new_zeros(1), count_B.cumsum(0, dtype=count_B.dtype)])
        j_R = torch.arange(n_rows, device=count_B.device)
        entry_R = torch.searchsorted(row_ptr[1:].long(), j_R, right=True).clamp_(max=count_B.shape[0] - 1)
        k_R = j_R - row_ptr[entry_R]
        if commit.path is not None:
            assert commit.path_from is not None
            behind_R = k_R - commit.path_from[entry_R]
            place_R = behind_R.clamp(0, commit.path.shape[1] - 1).long()
            k_R = torch.where(behind_R < 0, k_R, commit.path[entry_R, place_R])
        return (self._row_ptr[entry_R] + k_R).clamp_(0, n_rows - 1).long(), row_ptr
