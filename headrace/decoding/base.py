"""The contract of a decoder.

A decoder owns which rows are evaluated and which tokens come of them. It writes the rows of its requests and a
`Commit`; it never touches clocks, page tables or pages: the engine clamps what it emits at the first stop id and at
the limit, moves accepted keys and values, advances the clocks and appends to the history.

A step through a decoder: `demand` says on the host how many rows a request can use; `plan` fills the rows; the engine
evaluates them and draws a token for the last `n_outputs` rows of each request, with noise keyed by the index of the
token that the row decides; `resolve` says what is committed and emitted; `draft` prepares the next step.

Drawing the target's own token at every row and following the drafts as long as they hold that token (the coupled
walk) makes the emitted tokens equal those of plain decoding, whatever was drafted: row noise depends on nothing but
the position, so a right draft changes when a token is found, never which.

Letters: B requests of the segment, R their rows, M their draws, E tokens emitted at most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.models.base import CausalLM
from headrace.registry import Registry
from headrace.request import Request
from headrace.step import MASK_WORDS, Commit, RowTable
from headrace.tables import RequestTable


class Clocks(NamedTuple):
    """What `demand` may know of a request."""

    n_tok: int
    n_done: int
    drafted: int
    """What `draft` returned for the request after its last step; 0 after an admission."""
    limit: int


class Demand(NamedTuple):
    """Rows a decoder can use for one request in the next step."""

    least: int
    most: int
    scratch: int = 0
    """Slots behind the rows that `draft` may write."""


Span = tuple[int, int, int]
"""First row, number of rows, and a bound on the slots that they see."""


class OwnModel(NamedTuple):
    """How a decoder runs a model of its own."""

    evaluate: Callable[[RowTable, Sequence[Span], Tensor], Tensor]
    """Hidden states [M, E] of the given rows (int64 [M]); the model's cache is written on the way."""
    kv_len: Sequence[Tensor]
    """Its clock: committed slots in each of its cache groups, int32 [Bmax+1]. The decoder advances it."""


class SoftRows(NamedTuple):
    """A decoder's inputs that are no tokens; it may write them at any time."""

    table_SE: Tensor
    first: int
    """A row reads entry i of the table if its `tok` is -1 - (first + i)."""


@dataclass(frozen=True)
class Setup:
    """What a decoder is made from."""

    config: EngineConfig
    model: CausalLM
    """The model that decodes: embedding and head may be used."""
    max_reqs: int
    max_len: int
    device: torch.device


@dataclass
class Segment:
    """The requests of one decoder in a step. Tensors of the step are views; nothing here waits for the device."""

    table: RequestTable
    rows: RowTable
    """Exactly the granted rows; `reqs` and `row_ptr` are filled."""
    grants: list[int]
    """Rows of each request."""
    outputs: list[int]
    """Draws of each request: its last rows."""
    prompts: list[bool]
    """Whether more than one token was pending before the step."""
    ghosts: int = 0
    """The last so many requests are padding: the ghost, whose rows all stand at its first place."""

    @cached_property
    def reqs_B(self) -> Tensor:
        """Request indices, int64 [B]."""
        return self.rows.reqs.long()

    @cached_property
    def grant_B(self) -> Tensor:
        """Rows of each request, int64 [B]."""
        return self._tensor("grant_B")

    @cached_property
    def first_B(self) -> Tensor:
        """First row of each request within the segment, int64 [B]."""
        return self._tensor("first_B")

    @cached_property
    def entry_R(self) -> Tensor:
        """Request of each row, as a place in the segment, int64 [R]."""
        return self._tensor("entry_R")

    @cached_property
    def k_R(self) -> Tensor:
        """Offset of each row within its request, int32 [R]."""
        return self._tensor("k_R")

    @cached_property
    def n_out_B(self) -> Tensor:
        """Draws of each request, int64 [B]."""
        return self._tensor("n_out_B")

    @cached_property
    def out_first_B(self) -> Tensor:
        """First draw of each request within the segment, int64 [B]."""
        return self._tensor("out_first_B")

    @cached_property
    def out_entry_M(self) -> Tensor:
        """Request of each draw, as a place in the segment, int64 [M]."""
        return self._tensor("out_entry_M")

    @cached_property
    def out_row_M(self) -> Tensor:
        """Row of each draw within the segment, int64 [M]."""
        return self._tensor("out_row_M")

    # Sizes are known to the host: what follows from them alone is made there and uploaded.

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(SIZES[name](self)).to(self.table.device)

    def arrays(self) -> dict[str, np.ndarray]:
        """What the index tensors hold, by name."""
        return {name: make(self) for name, make in SIZES.items()}

    def use(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the index tensors, by name, from somewhere else: they hold what `arrays` says, or will when read."""
        vars(self).update(tensors)

    @cached_property
    def grants_B(self) -> np.ndarray:
        """`grants` on the host."""
        return np.array(self.grants, np.int64)

    @cached_property
    def outputs_B(self) -> np.ndarray:
        """`outputs` on the host."""
        return np.array(self.outputs, np.int64)

    def mask_rows(self, where_X: Tensor, sees_Xk: Tensor) -> None:
        """Let rows of the segment see only some slots of their second interval.

        where_X: rows of the segment, int64. sees_Xk: bool [X, k], by slot from n + b on, k <= 32 * MASK_WORDS.
        """
        words = torch.zeros(len(where_X), MASK_WORDS, dtype=torch.int64, device=where_X.device)
        for offset in range(sees_Xk.shape[1]):
            words[:, offset // 32] |= sees_Xk[:, offset].long() << (offset % 32)
        # The sign bit of an int32 is bit 31.
        self.rows.words[where_X] = torch.where(words >= 2**31, words - 2**32, words).int()
        self.rows.bits[where_X] = ((self.rows.row_ptr[0] + where_X) * MASK_WORDS).int()


def _before(counts: np.ndarray) -> np.ndarray:
    """Sums of all counts before each."""
    return np.cumsum(counts) - counts


def _offsets(seg: Segment) -> np.ndarray:
    first_R = np.repeat(_before(seg.grants_B), seg.grants_B)
    k_R = (np.arange(len(first_R)) - first_R).astype(np.int32)
    if seg.ghosts:
        # The ghost's first slot exists in any table; so many rows behind it might not.
        k_R[len(k_R) - sum(seg.grants[-seg.ghosts :]) :] = 0
    return k_R


def _out_rows(seg: Segment) -> np.ndarray:
    begin_B = _before(seg.grants_B) + seg.grants_B - seg.outputs_B - _before(seg.outputs_B)
    return np.repeat(begin_B, seg.outputs_B) + np.arange(seg.outputs_B.sum())


SIZES: dict[str, Callable[[Segment], np.ndarray]] = {
    "grant_B": lambda seg: seg.grants_B,
    "first_B": lambda seg: _before(seg.grants_B),
    "entry_R": lambda seg: np.repeat(np.arange(len(seg.grants)), seg.grants_B),
    "n_out_B": lambda seg: seg.outputs_B,
    "out_first_B": lambda seg: _before(seg.outputs_B),
    "out_entry_M": lambda seg: np.repeat(np.arange(len(seg.outputs)), seg.outputs_B),
    "out_row_M": _out_rows,
    "k_R": _offsets,
}
"""The index tensors of a segment."""


class Decoder(ABC):
    """Plans rows and resolves draws for its requests. Device work only where tensors are named; no synchronisation."""

    e_max = 1
    """Most tokens that one step may emit for a request."""
    shift = 1
    """Index of the token that a row decides, minus the row's own."""
    steady = False
    """Whether a request with one token pending and nothing drafted gets one row in every step until it ends, and each
    brings one token: such steps need not be composed."""
    causal = False
    """Whether row k of a request writes slot n + k and sees the slots [0, n + k], and no others, in every step.
    Long prompts of such a decoder may be evaluated in a faster way. A decoder with `tree` is not taken at its word."""
    tree = False
    """Whether rows of a request may see other rows of the step than all before them."""
    models: Sequence[CausalLM] = ()
    """Models of the decoder's own. Their layers get cache beside the target's; `bind` brings the means to run them."""
    n_soft = 0
    """Inputs of the decoder's own that are no tokens."""

    def __init__(self, setup: Setup) -> None:
        """Raises ConfigError for options that the decoder cannot work with."""
        self.setup = setup

    def bind(self, own: Sequence[OwnModel], soft: SoftRows) -> None:
        """The means to run each of `models`, and room for the soft rows."""
        return

    def admit(self, request: Request) -> None:
        """The request has taken `request.index`: forget what the index meant before."""
        return

    def release(self, request: Request) -> None:
        """The request gives `request.index` back."""
        return

    @abstractmethod
    def demand(self, clocks: Clocks) -> Demand:
        """Rows wanted in the next step. Host, pure."""

    def n_outputs(self, rows: int) -> int:
        """Draws for a request that was granted so many rows: its last ones. Host, pure."""
        return 1

    def foresee(self, clocks: Clocks, rows: int) -> Clocks | None:
        """The clocks after a step of so many rows, if nothing ends in it; None: only its report can tell. Host, pure.

        What can be foreseen is planned while the step before is still running.
        """
        return None

    def captures(self, prompts: bool) -> bool:
        """Whether a step, with or without prompts among its requests, may be captured and replayed with other sizes:
        whether `plan`, `resolve` and `draft` read of `grants`, `outputs` and `prompts` lengths and sums alone, and wait
        for nothing. Host, pure."""
        return False

    @abstractmethod
    def plan(self, seg: Segment) -> None:
        """Fill the rows of the step."""

    def paths(self, seg: Segment) -> Tensor | None:
        """Tokens between the history and each draw, int64 [M, L], unused entries -1; None: there are none.

        Penalties count them. Asked for only if a request of the step has a processor.
        """
        return None

    @abstractmethod
    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        """What is committed and emitted, given the drawn ids, int32 [M], and the hidden states they came from."""

    def draft(self, seg: Segment) -> Tensor | None:
        """Prepare the next step, after the commit. Returns what `Clocks.drafted` will be, int32 [B]; None: zeros."""
        return None


DECODERS: Registry[Decoder] = Registry("decoder", "decoder")
