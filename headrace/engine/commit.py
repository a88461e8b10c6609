"""Commit: the only place where clocks advance.

What a decoder resolved is clamped at the first stop token and at the request's limit, so that drafting can
never change where an output ends; then keys and values become committed by advancing the clocks. Rolling
back is not advancing them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.request import Finish
from headrace.step import Commit, RowTable
from headrace.tables import RequestTable


class Committed(NamedTuple):
    """What really happened, one entry a request of the step, int32."""

    n_kv_B: Tensor
    n_emit_B: Tensor
    emit_BE: Tensor
    finish_B: Tensor


def apply_commit(table: RequestTable, rows: RowTable, commit: Commit) -> Committed:
    """Clamp, append to the history, advance the clocks, set `finish`. No host synchronisation.

    An emitted id of -1 (nothing could be drawn) ends the request with ERROR and emits nothing.
    """
    reqs_B = rows.reqs.long()
    emit_BE = commit.emit
    e_max = emit_BE.shape[1]
    n_tok_B = table.n_tok[reqs_B]
    room_B = (table.limit[reqs_B] - n_tok_B).clamp_(min=0)
    n_emit_B = torch.minimum(commit.n_emit, room_B)

    step_E = torch.arange(e_max, dtype=torch.int32, device=emit_BE.device)
    live_BE = step_E < n_emit_B[:, None]
    bad_BE = live_BE & (emit_BE < 0)
    # Unused stop ids are -1 too: an id that could not be drawn must not look like one of them.
    stop_BE = live_BE & ~bad_BE & (emit_BE[:, :, None] == table.stop_ids[reqs_B][:, None, :]).any(dim=2)
    far_BE = torch.full_like(emit_BE, e_max)
    first_stop_B = torch.where(stop_BE, step_E, far_BE).amin(dim=1)
    first_bad_B = torch.where(bad_BE, step_E, far_BE).amin(dim=1)
    n_emit_B = torch.minimum(torch.minimum(n_emit_B, first_stop_B + 1), first_bad_B)

    at_limit_B = (commit.n_emit > 0) & (n_emit_B >= room_B)
    finish_B = torch.where(at_limit_B, int(Finish.LENGTH), 0)
    finish_B = torch.where(first_stop_B < torch.minimum(n_emit_B, first_bad_B), int(Finish.STOP), finish_B)
    finish_B = torch.where(first_bad_B < torch.minimum(first_stop_B, room_B), int(Finish.ERROR), finish_B).int()
    n_kv_B = commit.n_kv - (commit.n_emit - n_emit_B)

    live_BE = step_E < n_emit_B[:, None]
    # Entries that are not emitted land on the ghost's row, which nobody reads.
    row_BE = torch.where(live_BE, reqs_B[:, None], table.ghost)
    index_BE = torch.where(live_BE, n_tok_B[:, None] + step_E, 0).long()
    table.hist[row_BE, index_BE] = torch.where(live_BE, emit_BE, 0)
    table.n_tok.index_add_(0, reqs_B, n_emit_B)
    table.n_done.index_add_(0, reqs_B, n_kv_B)
    table.kv_len.index_add_(1, reqs_B, n_kv_B.expand(table.kv_len.shape[0], -1).contiguous())
    table.finish.index_copy_(0, reqs_B, finish_B)
    return Committed(n_kv_B, n_emit_B, emit_BE, finish_B)
