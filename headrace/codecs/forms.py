"""How the attention of a step writes and reads the planes of a codec.

`Direct` is for planes that are keys and values in the model's type: the attention kernels read them through the page
table. `Gathered` is right for every codec: in each layer the pages that the step's requests can see are decoded into a
dense pool of the model's type, and the ordinary attention reads that. Its price is one pass over those pages a layer.

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

from headrace.kernels.attention import AttentionPlan, AttentionRows, attend, plan_attention, write_kv

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
    spans: Sequence[tuple[int, int, int]]
    """By request: first row, number of rows, bound on the slots that they see."""


class Coding(Protocol):
    """What `Gathered` needs of a codec."""

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        """See Codec."""
        ...

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See Codec."""
        ...


class Form(ABC):
    """Attention over the planes of a codec."""

    @abstractmethod
    def plan(self, step: GroupStep) -> Any:
        """Prepare a step of one group; all its layers use the result."""

    @abstractmethod
    def attend(
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
    ) -> Tensor:
        """Write the rows' keys and values into the layer's planes, by class, then attend. Returns [R, H, Dv]."""


class _DirectPlan(NamedTuple):
    step: GroupStep
    page_table_BP: Tensor
    attention: AttentionPlan


class Direct(Form):
    """The planes of the one class are keys [K, P, S, D] and values [K, P, S, Dv] as attention takes them."""

    def plan(self, step: GroupStep) -> _DirectPlan:
        """The attention's own plan."""
        (table_BP,) = step.tables
        return _DirectPlan(
            step, table_BP, plan_attention(step.rows, table_BP, step.kv_len_B, step.page_size, step.spans)
        )

    def attend(
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
    ) -> Tensor:
        """Write, then read the pages where they lie."""
        ((k_KPSD, v_KPSD),) = planes
        step = plan.step
        write_kv(k_RKD, v_RKD, k_KPSD, v_KPSD, step.place_R)
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

    def plan(self, step: GroupStep) -> _GatheredPlan:
        """List the pages. With two classes of pages the device is waited for."""
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

    def read(self, plan: _GatheredPlan, planes: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """The dense pools [K, 1 + T, S, D], [K, 1 + T, S, Dv]."""
        parts = [
            self.codec.decode(number, [plane.index_select(1, page_T) for plane in mine])
            for number, (mine, page_T) in enumerate(zip(planes, plan.pages, strict=True))
        ]
        if len(parts) == 1:
            return parts[0]
        k_KTSD, v_KTSD = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return k_KTSD, v_KTSD

    def write(self, plan: _GatheredPlan, planes: Sequence[Sequence[Tensor]], k_RKD: Tensor, v_RKD: Tensor) -> None:
        """Encode the rows into the open class."""
        for plane_KPSX, rows_RKX in zip(planes[0], self.codec.encode(k_RKD, v_RKD), strict=True):
            plane_KPSX.flatten(1, 2).index_copy_(1, plan.step.place_R, rows_RKX.transpose(0, 1))

    def attend(
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
    ) -> Tensor:
        """Write, decode, attend."""
        self.write(plan, planes, k_RKD, v_RKD)
        k_KTSD, v_KTSD = self.read(plan, planes)
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
        )
        return out_RHD
