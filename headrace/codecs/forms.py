"""How the attention of a step writes and reads the planes of a codec.

`Direct` is for planes that are keys and values in the model's type: the attention kernels read them through the page
table. `Gathered` is right for every codec: in each layer the pages that the step's requests can see are decoded into a
dense pool of the model's type, and the ordinary attention reads that. Its price is one pass over those pages a layer.

A form writes the rows of a layer first, which depends on nothing but the rows and their places, and then reads, which
depends on the requests of the step: so writing can be recorded with what the model does before it, whatever reads.

Letters: R rows, B requests of the step (of a table: request indices), H query heads, K key/value heads, P pages of a
pool, S slots in a page, D and Dv head sizes, T pages gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.attention import AttentionPlan, AttentionRows, Chain, attend, plan_attention, write_kv
from headrace.kernels.attention.squares import LEAST
from headrace.kernels.turn import turn as turn_and_write
from headrace.step import Turn

TRASH = 0
"""The page that ghosts write to; no request holds it."""


class GroupStep(NamedTuple):
    """What all layers of a cache group share in a step."""

    rows: AttentionRows
    place_R: Tensor
    """Physical slots in the open class that the rows are written to, int64."""
    tables: Sequence[Tensor]
    """By class the page tables, int32 [Bmax+1, Pmax]. A page of a request is in exactly one of them."""
    kv_len_B: Tensor
    page_size: int
    window: int
    spans: Sequence[tuple[int, int, int]] | None
    """By request: first row, number of rows, bound on the slots that they see. None: the step is to be recorded."""
    prompt_len_B: Tensor
    """Tokens of the prompt by request index, int32 [Bmax+1]."""
    chains: Sequence[Chain] = ()
    """Requests with several rows that each see all slots before them; none where the step is to be recorded."""
    parity: bool = False
    """Whether a row's bits have to be a function of that row and of what it sees; a form with `parity` only."""


class Selection(Protocol):
    """What `Selected` needs of a selector."""

    pages: int
    interval: int

    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        """See Selector."""
        ...


class Coding(Protocol):
    """What `Gathered` needs of a codec."""

    @property
    def captures(self) -> bool:
        """See Codec."""
        ...

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        """See Codec."""
        ...

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Codec."""
        ...


class Form(ABC):
    """Attention over the planes of a codec."""

    captures = False
    """Whether a step may be recorded and replayed with other sizes: nothing waits for the device or reads `spans`."""
    parity = False
    """Whether it knows how to keep a row's bits from following from the other rows of the step."""
    captures_writes = True
    """Whether `write` may be recorded and replayed: it waits for nothing, and of the host it reads shapes alone."""
    uncaptured_rows: int | None = None
    """Rows of a request from which `read` has a faster way that cannot be recorded with other sizes; None: never."""
    turns = False
    """Whether `write` takes queries and keys as the product left them, with a `turn`."""

    @abstractmethod
    def plan(self, step: GroupStep) -> Any:
        """Prepare a step of one group; all its layers use the result."""

    @abstractmethod
    def write(
        self,
        place_R: Tensor,
        planes: Sequence[Sequence[Tensor]],
        k_RKD: Tensor,
        v_RKD: Tensor,
        turn: Turn | None = None,
    ) -> None:
        """Write the rows' keys and values into the layer's planes, by class, at physical slots of the open one, int64.

        `turn`: see StepContext; only a form with `turns` is given one.
        """

    @abstractmethod
    def read(
        self,
        plan: Any,
        planes: Sequence[Sequence[Tensor]],
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float,
        sinks_H: Tensor | None,
        out_RHD: Tensor | None = None,
    ) -> Tensor:
        """Attend, once the rows are written. Returns [R, H, Dv].

        `out_RHD`: where the result may be put, contiguous; a form that has no use for it returns another tensor.
        """


class _DirectPlan(NamedTuple):
    step: GroupStep
    page_table_BP: Tensor
    attention: AttentionPlan


class Direct(Form):
    """The planes of the one class are keys [K, P, S, D] and values [K, P, S, Dv] as attention takes them."""

    captures = True
    parity = True

    def __init__(self, device: torch.device) -> None:
        # On the CPU three operations over the rows of a step are faster than one that goes head by head.
        self.turns = device.type == "cuda"
        self.uncaptured_rows = LEAST if device.type == "cuda" else None

    def plan(self, step: GroupStep) -> _DirectPlan:
        """The attention's own plan."""
        (table_BP,) = step.tables
        return _DirectPlan(
            step,
            table_BP,
            plan_attention(step.rows, table_BP, step.kv_len_B, step.page_size, step.spans, step.chains, step.parity),
        )

    def write(
        self,
        place_R: Tensor,
        planes: Sequence[Sequence[Tensor]],
        k_RKD: Tensor,
        v_RKD: Tensor,
        turn: Turn | None = None,
    ) -> None:
        """As they are, or as they are turned."""
        ((k_KPSD, v_KPSD),) = planes
        if turn is None:
            write_kv(k_RKD, v_RKD, k_KPSD, v_KPSD, place_R)
        else:
            turn_and_write(turn, k_KPSD, v_KPSD, place_R)

    def read(
        self,
        plan: _DirectPlan,
        planes: Sequence[Sequence[Tensor]],
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float,
        sinks_H: Tensor | None,
        out_RHD: Tensor | None = None,
    ) -> Tensor:
        """Read the pages where they lie."""
        ((k_KPSD, v_KPSD),) = planes
        step = plan.step
        out_RHD, _ = attend(
            q_RHD,
            step.rows,
            k_KPSD,
            v_KPSD,
            plan.page_table_BP,
            step.kv_len_B,
            scale=scale,
            window=step.window,
            softcap=softcap,
            sinks_H=sinks_H,
            plan=plan.attention,
            own=(k_RKD, v_RKD),
            out_RHD=out_RHD,
        )
        return out_RHD


class _GatheredPlan(NamedTuple):
    step: GroupStep
    pages: list[Tensor]
    """By class the pages to decode, int64; the first of the first class is trash."""
    page_table_BP: Tensor
    """Where each of them stands in the dense pool, int32."""
    attention: AttentionPlan


class Gathered(Form):
    """Decodes what the step can see, layer by layer."""

    def __init__(self, codec: Coding) -> None:
        self.codec = codec
        self.captures_writes = codec.captures

    def plan(self, step: GroupStep) -> _GatheredPlan:
        """List the pages. With two classes of pages the device is waited for."""
        assert step.spans is not None
        most = step.tables[0].shape[1]
        pages_B = [min(-(-seen // step.page_size), most) if rows else 0 for _, rows, seen in step.spans]
        device = step.kv_len_B.device
        owner = np.repeat(np.arange(len(pages_B)), pages_B)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(pages_B) - pages_B, pages_B)
        req_T = step.rows.reqs_B.long()[torch.from_numpy(owner).to(device)]
        place_T = torch.from_numpy(place).to(device)
        pages = [table_BP[req_T, place_T].long() for table_BP in step.tables]
        if len(pages) > 1:
            open_T = pages[0] != TRASH
            where = [open_T.nonzero()[:, 0], (~open_T).nonzero()[:, 0]]
            pages = [page_T[mine] for page_T, mine in zip(pages, where, strict=True)]
            order = torch.cat(where)
            req_T, place_T = req_T[order], place_T[order]
        pages[0] = torch.cat([pages[0].new_full((1,), TRASH), pages[0]])
        page_table_BP = step.tables[0].new_zeros(step.tables[0].shape[0], max(pages_B, default=0) or 1)
        page_table_BP[req_T, place_T] = torch.arange(1, 1 + len(req_T), dtype=torch.int32, device=device)
        attention = plan_attention(step.rows, page_table_BP, step.kv_len_B, step.page_size, step.spans)
        return _GatheredPlan(step, pages, page_table_BP, attention)

    def decode(self, plan: _GatheredPlan, planes: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """The dense pools [K, 1 + T, S, D], [K, 1 + T, S, Dv]."""
        parts = [
            self.codec.decode(number, [plane.index_select(1, page_T) for plane in mine])
            for number, (mine, page_T) in enumerate(zip(planes, plan.pages, strict=True))
        ]
        if len(parts) == 1:
            return parts[0]
        k_KTSD, v_KTSD = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return k_KTSD, v_KTSD

    def write(
        self,
        place_R: Tensor,
        planes: Sequence[Sequence[Tensor]],
        k_RKD: Tensor,
        v_RKD: Tensor,
        turn: Turn | None = None,
    ) -> None:
        """Encode the rows into the open class."""
        for plane_KPSX, rows_RKX in zip(planes[0], self.codec.encode(k_RKD, v_RKD), strict=True):
            plane_KPSX.flatten(1, 2).index_copy_(1, place_R, rows_RKX.transpose(0, 1))

    def read(
        self,
        plan: _GatheredPlan,
        planes: Sequence[Sequence[Tensor]],
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float,
        sinks_H: Tensor | None,
        out_RHD: Tensor | None = None,
    ) -> Tensor:
        """Decode, attend."""
        pools = self.decode(plan, planes)
        return self.attend_to(plan, *pools, q_RHD, scale=scale, softcap=softcap, sinks_H=sinks_H, out_RHD=out_RHD)

    def attend_to(
        self,
        plan: _GatheredPlan,
        k_KTSD: Tensor,
        v_KTSD: Tensor,
        q_RHD: Tensor,
        *,
        scale: float,
        softcap: float,
        sinks_H: Tensor | None,
        out_RHD: Tensor | None = None,
    ) -> Tensor:
        """Attention over the dense pools."""
        step = plan.step
        out_RHD, _ = attend(
            q_RHD,
            step.rows,
            k_KTSD,
            v_KTSD,
            plan.page_table_BP,
            step.kv_len_B,
            scale=scale,
            window=step.window,
            softcap=softcap,
            sinks_H=sinks_H,
            plan=plan.attention,
            out_RHD=out_RHD,
        )
        return out_RHD


class _Choices(NamedTuple):
    """The rows of a step that choose what they read."""

    row_X: Tensor
    rows: AttentionRows
    """Each as a request of its own."""
    page_XP: Tensor
    """The pages of their requests as places in the dense pool, int64."""
    front_X: Tensor
    """Pages among which they choose: the first ones."""
    kept_X: Tensor
    """Pages that they choose."""
    kv_len_X: Tensor


class _SelectedPlan(NamedTuple):
    gathered: _GatheredPlan
    choices: _Choices | None
    """None: no row has anything to choose."""


class Selected(Form):
    """Rows behind the prompt read some of their older pages only: right for every codec and selector, and not fast.

    A row that chooses is a request of its own whose page table leaves out what it passes over; slots are offsets from
    the length, so what it sees besides stays as it was. All rows attend to everything first.
    """

    def __init__(self, codec: Coding, selector: Selection) -> None:
        self.gathered, self.selector = Gathered(codec), selector
        self.captures_writes = self.gathered.captures_writes

    def plan(self, step: GroupStep) -> _SelectedPlan:
        """Find the rows that choose. Waits for the device."""
        gathered = self.gathered.plan(step)
        rows = step.rows
        req_R = rows.req_R.long()
        base_R = rows.t_R - rows.t_R % self.selector.interval
        front_R = torch.minimum(base_R, step.kv_len_B[req_R]) // step.page_size
        front_R = torch.where(rows.t_R >= step.prompt_len_B[req_R], front_R, 0)
        row_X = front_R.nonzero()[:, 0]
        if not len(row_X):
            return _SelectedPlan(gathered, None)
        number_X = torch.arange(len(row_X) + 1, dtype=torch.int32, device=row_X.device)
        own = AttentionRows(
            number_X[:-1],
            rows.t_R[row_X],
            rows.a_R[row_X],
            rows.b_R[row_X],
            rows.c_R[row_X],
            number_X,
            number_X[:-1],
            None if rows.bits_R is None else rows.bits_R[row_X],
            rows.words_W,
            rows.joined,
            few=True,
        )
        front_X = front_R[row_X]
        kept_X = front_X.clamp(max=self.selector.pages)
        kv_len_X = step.kv_len_B[req_R[row_X]] - (front_X - kept_X) * step.page_size
        page_XP = gathered.page_table_BP[req_R[row_X]].long()
        return _SelectedPlan(gathered, _Choices(row_X, own, page_XP, front_X, kept_X, kv_len_X))

    def write(
        self,
        place_R: Tensor,
        planes: Sequence[Sequence[Tensor]],
        k_RKD: Tensor,
        v_RKD: Tensor,
        turn: Turn | None = None,
    ) -> None:
        """As without a selector."""
        self.gathered.write(place_R, planes, k_RKD, v_RKD)

    def read(
        self,
        plan: _SelectedPlan,
        planes: Sequence[Sequence[Tensor]],
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float,
        sinks_H: Tensor | None,
        out_RHD: Tensor | None = None,
    ) -> Tensor:
        """Decode, attend, and once more for the rows that choose."""
        k_KTSD, v_KTSD = self.gathered.decode(plan.gathered, planes)
        out_RHD = self.gathered.attend_to(
            plan.gathered, k_KTSD, v_KTSD, q_RHD, scale=scale, softcap=softcap, sinks_H=sinks_H, out_RHD=out_RHD
        )
        choices = plan.choices
        if choices is None:
            return out_RHD
        q_XHD = q_RHD[choices.row_X]
        out_RHD[choices.row_X], _ = attend(
            q_XHD,
            choices.rows,
            k_KTSD,
            v_KTSD,
            self._tables(choices, self.selector.score(q_XHD, k_KTSD, choices.page_XP)),
            choices.kv_len_X,
            scale=scale,
            softcap=softcap,
            sinks_H=sinks_H,
        )
        return out_RHD

    def _tables(self, choices: _Choices, score_XP: Tensor) -> Tensor:
        """By row the chosen pages and all that stand behind those it chose from, in the order of slots, int32."""
        place_P = torch.arange(score_XP.shape[1], device=score_XP.device)
        behind_XP = place_P >= choices.front_X[:, None]
        best_XP = score_XP.masked_fill(behind_XP, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        rank_XP = torch.empty_like(best_XP).scatter_(1, best_XP, place_P.expand_as(best_XP))
        reads_XP = behind_XP | (rank_XP < choices.kept_X[:, None])
        order_XP = torch.where(reads_XP, place_P, place_P + len(place_P)).sort(dim=1).indices
        return choices.page_XP.gather(1, order_XP).int()
