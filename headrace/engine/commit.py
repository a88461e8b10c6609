"""Commit: the only place where clocks advance.

What a decoder resolved is clamped at the first stop token and at the request's limit, so that drafting can
never change where an output ends; then keys and values become committed by advancing the clocks. Rolling
back is not advancing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.request import Finish
from headrace.step import Commit, RowTable
from headrace.tables import RequestTable


class Committed(NamedTuple):
    """What really happened, one entry a request of the step, int32."""

    n_kv_B: Tensor
    n_emit_B: Tensor
    finish_B: Tensor


def join(commits: Sequence[Commit], firsts: Sequence[int]) -> Commit:
    """One commit of all segments of a step, in their order. `firsts` are the first draws of the segments."""
    if len(commits) == 1:
        return commits[0]
    width = max(commit.emit.shape[1] for commit in commits)

    def wide(x_BE: Tensor) -> Tensor:
        return F.pad(x_BE, (0, width - x_BE.shape[1]))

    joined = Commit(
        n_kv=torch.cat([c.n_kv for c in commits]),
        n_emit=torch.cat([c.n_emit for c in commits]),
        emit=torch.cat([wide(c.emit) for c in commits]),
        priced_by=torch.cat([wide(c.priced_by + first) for c, first in zip(commits, firsts, strict=True)]),
    )
    if any(commit.path is not None for commit in commits):
        # Without a path every row stays: nothing lies behind `path_from`.
        joined.path = torch.cat([wide(torch.zeros_like(c.emit) if c.path is None else c.path) for c in commits])
        joined.path_from = torch.cat([c.n_kv if c.path_from is None else c.path_from for c in commits])
    return joined


def apply_commit(table: RequestTable, reqs_B: Tensor, commit: Commit) -> Committed:
    """Clamp, append to the history, advance the clocks, set `finish`. No host synchronisation.

    A request emits nothing behind its first stop token, its limit or its trigger: rows behind a trigger would see
    what a cache policy is about to change. Fewer emitted tokens commit fewer rows. An emitted id of -1 (nothing could
    be drawn) ends the request with ERROR and emits nothing.

    Args:
        reqs_B: request indices of the step, int64.
    """
    emit_BE = commit.emit
    e_max = emit_BE.shape[1]
    n_tok_B = table.n_tok[reqs_B]
    late_B = (table.n_done[reqs_B] + commit.n_kv - table.trigger[reqs_B]).clamp_(min=0)
    wanted_B = (commit.n_emit - late_B).clamp_(min=0)
    room_B = (table.limit[reqs_B] - n_tok_B).clamp_(min=0)
    n_emit_B = torch.minimum(wanted_B, room_B)

    step_E = torch.arange(e_max, dtype=torch.int32, device=emit_BE.device)
    live_BE = step_E < n_emit_B[:, None]
    bad_BE = live_BE & (emit_BE < 0)
    # Unused stop ids are -1 too: an id that could not be drawn must not look like one of them.
    stop_BE = live_BE & ~bad_BE & (emit_BE[:, :, None] == table.stop_ids[reqs_B][:, None, :]).any(dim=2)
    far_BE = torch.full_like(emit_BE, e_max)
    first_stop_B = torch.where(stop_BE, step_E, far_BE).amin(dim=1)
    first_bad_B = torch.where(bad_BE, step_E, far_BE).amin(dim=1)
    n_emit_B = torch.minimum(torch.minimum(n_emit_B, first_stop_B + 1), first_bad_B)

    at_limit_B = (wanted_B > 0) & (n_emit_B >= room_B)
    finish_B = torch.where(at_limit_B, int(Finish.LENGTH), 0)
    finish_B = torch.where(first_stop_B < torch.minimum(n_emit_B, first_bad_B), int(Finish.STOP), finish_B)
    finish_B = torch.where(first_bad_B < torch.minimum(first_stop_B, room_B), int(Finish.ERROR), finish_B).int()
    # Each token less is a row less; what a trigger cuts beyond the tokens are rows of a prompt.
    n_kv_B = commit.n_kv - torch.maximum(late_B, commit.n_emit - n_emit_B)

    live_BE = step_E < n_emit_B[:, None]
    # Entries that are not emitted land on the ghost's row, which nobody reads.
    row_BE = torch.where(live_BE, reqs_B[:, None], table.ghost)
    index_BE = torch.where(live_BE, n_tok_B[:, None] + step_E, 0).long()
    table.hist[row_BE, index_BE] = torch.where(live_BE, emit_BE, 0)
    table.n_tok.index_add_(0, reqs_B, n_emit_B)
    table.n_done.index_add_(0, reqs_B, n_kv_B)
    for kv_len_B in table.kv_len_of(0):
        kv_len_B.index_add_(0, reqs_B, n_kv_B)
    table.finish.index_copy_(0, reqs_B, finish_B)
    return Committed(n_kv_B, n_emit_B, finish_B)


def moves(table: RequestTable, rows: RowTable, commit: Commit, n_kv_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where accepted rows lie and where they belong, after the clocks have advanced by `n_kv_B`.

    Returns request indices, sources and targets, int64 [B * E]; sources and targets are slots counted back from the
    end of the request's committed ones, so that they hold in every group. Entries that move nothing name the ghost.
    """
    assert commit.path is not None
    assert commit.path_from is not None
    step_E = torch.arange(commit.path.shape[1], device=commit.path.device)
    to_BE = commit.path_from[:, None].long() + step_E
    row_BE = rows.row_ptr[:-1, None].long() + commit.path
    live_BE = to_BE < n_kv_B[:, None]
    from_BE = rows.dst[torch.where(live_BE, row_BE, 0)].long()
    owner_BE = torch.where(live_BE, rows.reqs[:, None].long(), table.ghost)
    back_BE = n_kv_B[:, None].long()
    return owner_BE.flatten(), (from_BE - back_BE).flatten(), (to_BE - back_BE).flatten()
