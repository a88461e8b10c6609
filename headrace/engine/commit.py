"""Commit: the only place where clocks advance.

What a decoder resolved is clamped at the first stop token and at the request's limit, so that drafting can
never change where an output ends; then keys and values become committed by advancing the clocks. Rolling
back is not advancing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.advance import Advanced, Clocks, advance
from headrace.step import Commit, RowTable
from headrace.tables import RequestTable


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


def apply_commit(table: RequestTable, reqs_B: Tensor, commit: Commit) -> Advanced:
    """Clamp, append to the history, advance the clocks, set `finish`. No host synchronisation.

    `reqs_B` are the request indices of the step, int64. The rules stand with the operation `advance`.
    """
    clocks = Clocks(
        n_tok=table.n_tok,
        n_done=table.n_done,
        finish=table.finish,
        hist=table.hist,
        kv_len=table.kv_len_of(0),
        limit=table.limit,
        trigger=table.trigger,
        stop_ids=table.stop_ids,
    )
    return advance(clocks, reqs_B, commit.n_kv, commit.n_emit, commit.emit)


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
