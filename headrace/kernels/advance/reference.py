"""`advance` in plain torch: the definition that the compiled form is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.request import Finish


class Clocks(NamedTuple):
    """Tables by request index, int32 [Bmax+1] where nothing else is said; all are changed but the bounds."""

    n_tok: Tensor
    n_done: Tensor
    finish: Tensor
    hist: Tensor
    """[Bmax+1, max_len]"""
    kv_len: Tensor
    """[G, Bmax+1]"""
    limit: Tensor
    trigger: Tensor
    stop_ids: Tensor
    """[Bmax+1, stop ids], unused entries -1."""


class Advanced(NamedTuple):
    """What really happened, one entry a request of the step, int32 [B]."""

    n_kv_B: Tensor
    n_emit_B: Tensor
    finish_B: Tensor


def advance_reference(clocks: Clocks, reqs_B: Tensor, n_kv_B: Tensor, n_emit_B: Tensor, emit_BE: Tensor) -> Advanced:
    """See the package."""
    e_max, ghost = emit_BE.shape[1], clocks.n_tok.shape[0] - 1
    ended_B = clocks.finish[reqs_B]
    live_B = (ended_B == 0) & (reqs_B != ghost)
    n_kv_B, n_emit_B = (torch.where(live_B, x_B, 0) for x_B in (n_kv_B, n_emit_B))
    n_tok_B = clocks.n_tok[reqs_B]
    late_B = (clocks.n_done[reqs_B] + n_kv_B - clocks.trigger[reqs_B]).clamp_(min=0)
    wanted_B = (n_emit_B - late_B).clamp_(min=0)
    room_B = (clocks.limit[reqs_B] - n_tok_B).clamp_(min=0)
    kept_B = torch.minimum(wanted_B, room_B)

    step_E = torch.arange(e_max, dtype=torch.int32, device=emit_BE.device)
    live_BE = step_E < kept_B[:, None]
    bad_BE = live_BE & (emit_BE < 0)
    # Unused stop ids are -1 too: an id that could not be drawn must not look like one of them.
    stop_BE = live_BE & ~bad_BE & (emit_BE[:, :, None] == clocks.stop_ids[reqs_B][:, None, :]).any(dim=2)
    far_BE = torch.full_like(emit_BE, e_max)
    first_stop_B = torch.where(stop_BE, step_E, far_BE).amin(dim=1)
    first_bad_B = torch.where(bad_BE, step_E, far_BE).amin(dim=1)
    kept_B = torch.minimum(torch.minimum(kept_B, first_stop_B + 1), first_bad_B)

    at_limit_B = (wanted_B > 0) & (kept_B >= room_B)
    finish_B = torch.where(at_limit_B, int(Finish.LENGTH), 0)
    finish_B = torch.where(first_stop_B < torch.minimum(kept_B, first_bad_B), int(Finish.STOP), finish_B)
    finish_B = torch.where(first_bad_B < torch.minimum(first_stop_B, room_B), int(Finish.ERROR), finish_B).int()
    finish_B = torch.where(live_B, finish_B, ended_B)
    # What a trigger cuts beyond the tokens are rows of a prompt.
    rows_B = n_kv_B - torch.maximum(late_B, n_emit_B - kept_B)

    live_BE = step_E < kept_B[:, None]
    # Entries that are not emitted land on the ghost's row, which nobody reads.
    row_BE = torch.where(live_BE, reqs_B[:, None], ghost)
    index_BE = torch.where(live_BE, n_tok_B[:, None] + step_E, 0).long()
    clocks.hist[row_BE, index_BE] = torch.where(live_BE, emit_BE, 0)
    clocks.n_tok.index_add_(0, reqs_B, kept_B)
    clocks.n_done.index_add_(0, reqs_B, rows_B)
    clocks.kv_len.index_add_(1, reqs_B, rows_B.expand(clocks.kv_len.shape[0], -1).contiguous())
    clocks.finish.index_copy_(0, reqs_B, finish_B)
    return Advanced(rows_B, kept_B, finish_B)
