"""The request table: one row a request index, at fixed addresses on the device.

The host writes a row when a request is admitted; from then on commits on the device advance the clocks
(`n_tok`, `n_done`, `kv_len`), append to `hist` and set `finish`. Row Bmax is the ghost's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.request import Request
from headrace.step import FAR, Mirror, flush

MAX_STOP_IDS = 32
"""Stop token ids a request may have, the model's own end tokens included."""


class RowClocks(NamedTuple):
    """What the device knows of a request's cache beside `n_done`; the lists are by group."""

    kv_len: list[int]
    ro_len: list[int]
    hold: int


class RequestTable:
    """Clocks, history, noise keys and parameters of all requests that hold a request index.

    Shapes: [Bmax+1] where nothing else is said.
    """

    def __init__(self, max_reqs: int, max_len: int, groups: Sequence[int], device: torch.device) -> None:
        """`groups` counts the cache groups of the model, and after it those of each decoder's own models."""
        self.ghost = max_reqs
        self._ends = list(accumulate(groups, initial=0))
        self.device = device
        self._mirrors: dict[str, Mirror] = {}
        rows = max_reqs + 1
        self.n_tok = self._table("n_tok", (rows,))  # tokens known
        self.n_done = self._table("n_done", (rows,))  # tokens whose cache is committed
        self.prompt_len = self._table("prompt_len", (rows,))  # tokens of the prompt
        self.pos_off = self._table("pos_off", (rows,))  # RoPE position of a token minus its index
        self.limit = self._table("limit", (rows,), fill=FAR)  # bound on n_tok
        self.trigger = self._table("trigger", (rows,), fill=FAR)  # token index at which a cache policy acts next
        self.finish = self._table("finish", (rows,))  # 0, or the finish reason
        self.hold = self._table("hold", (rows,))  # provisional slots that survive the step
        self.kv_len = self._table("kv_len", (self._ends[-1], rows), axis=1)  # committed slots by group
        self.ro_len = self._table("ro_len", (self._ends[-1], rows), axis=1)  # slots below are shared, hence read-only
        self.hist = self._table("hist", (rows, max_len))  # token ids by index
        self.stop_ids = self._table("stop_ids", (rows, MAX_STOP_IDS), fill=-1)
        self.stream = self._table("stream", (rows, 2))  # key of the noise, bit patterns of two u32
        self.temperature = self._table("temperature", (rows,), torch.float32)
        self.top_k = self._table("top_k", (rows,))
        self.top_p = self._table("top_p", (rows,), torch.float32, fill=1.0)
        self.min_p = self._table("min_p", (rows,), torch.float32)
        self.adapter = self._table("adapter", (rows,))  # place of the request's adapter; 0: none

    def _table(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32, fill: float = 0, axis: int = 0
    ) -> Tensor:
        mirror = self._mirrors[name] = Mirror(shape, dtype, self.device, fill, axis)
        return mirror.device_table

    def kv_len_of(self, model: int) -> Tensor:
        """The committed slots in the groups of a model, int32 [groups, Bmax+1]; model 0 is the one that decodes."""
        return self.kv_len[self._ends[model] : self._ends[model + 1]]

    def clocks(self, index: int) -> RowClocks:
        """The lengths of a request's cache. Waits for the device."""
        ro_len = self._mirrors["ro_len"].host[:, index].tolist()
        return RowClocks(self.kv_len[:, index].tolist(), ro_len, int(self.hold[index]))

    def admit(self, request: Request, index: int, clocks: RowClocks | None = None) -> None:
        """Write the row of a request that takes `index`, its clocks standing at `request.n_done`, or where it left
        them."""
        params = request.params
        stops = np.full(MAX_STOP_IDS, -1, dtype=np.int32)
        stops[: len(request.stop_ids)] = request.stop_ids
        values: dict[str, Any] = {
            "n_tok": request.n_tok,
            "n_done": request.n_done,
            "prompt_len": request.prompt_len,
            "pos_off": 0,
            "limit": request.limit,
            "trigger": request.trigger,
            "finish": 0,
            "hold": 0,
            "kv_len": request.n_done,
            "ro_len": request.n_done,
            "stop_ids": stops,
            "stream": request.stream,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "adapter": request.adapter,
        }
        if clocks is not None:
            values.update(clocks._asdict())
        for name, value in values.items():
            mirror = self._mirrors[name]
            mirror.host[(slice(None), index) if mirror.host.ndim == 2 and mirror.axis else index] = value
            mirror.touch(index)
        history = self._mirrors["hist"]
        history.host[index, : request.n_tok] = request.tokens
        history.touch(index)

    def release(self, index: int) -> None:
        """Make the row a ghost's: nothing committed, finished."""
        for name in ("n_tok", "n_done", "kv_len", "ro_len"):
            mirror = self._mirrors[name]
            mirror.host[(slice(None), index) if mirror.axis else index] = 0
            mirror.touch(index)

    def set_read_only(self, index: int, slots: int) -> None:
        """Raise ro_len after a publication, in every group."""
        mirror = self._mirrors["ro_len"]
        mirror.host[:, index] = slots
        mirror.touch(index)

    def set_trigger(self, index: int, trigger: int) -> None:
        """The token index at which the cache is compacted next."""
        mirror = self._mirrors["trigger"]
        mirror.host[index] = trigger
        mirror.touch(index)

    def set_lengths(self, index: int, group: int, slots: int, read_only: int) -> None:
        """Committed and read-only slots of a group after a compaction, which moved the others."""
        self.kv_len[group, index] = slots  # the device's clock; its host copy is only good at admission
        mirror = self._mirrors["ro_len"]
        mirror.host[group, index] = read_only
        mirror.touch(index)

    def flush(self) -> None:
        """Upload what changed since the last step."""
        flush(self._mirrors.values())
