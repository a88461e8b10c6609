"""`walk` in plain torch: the definition that the compiled forms are compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Walks(NamedTuple):
    """What the step did: clocks by request index, and by request of the step its rows and draws."""

    n_tok: Tensor
    """Tokens known, int32 [Bmax+1]."""
    n_done: Tensor
    """Tokens committed, int32 [Bmax+1]."""
    reqs_B: Tensor
    """Request indices, int64 [B]."""
    grant_B: Tensor
    """Rows, int64 [B]."""
    n_out_B: Tensor
    """Draws, int64 [B]: those of the last rows."""
    out_first_B: Tensor
    """First draw, int64 [B]."""


class Drafts(NamedTuple):
    """Drafts by request index, int32."""

    token_BK: Tensor
    """[Bmax+1, K]"""
    count_B: Tensor
    """[Bmax+1]"""


class Walked(NamedTuple):
    """By request of the step, int32."""

    n_kv_B: Tensor
    """Rows that become committed."""
    n_emit_B: Tensor
    """Tokens emitted."""
    emit_BW: Tensor
    """The tokens; those behind the last one emitted mean nothing."""
    priced_by_BW: Tensor
    """The draw that each token came from."""


def walk_reference(walks: Walks, id_M: Tensor, drafts: Drafts | None = None) -> Walked:
    """See the package."""
    n_tok, n_done, reqs_B, grant_B, n_out_B, out_first_B = walks
    width = 1 if drafts is None else drafts.token_BK.shape[1] + 1
    step_W = torch.arange(width, device=id_M.device)
    pending_B = (n_tok[reqs_B] - n_done[reqs_B]).long()
    # Draw `start` is that of the last pending row; draw start + i comes after i drafts.
    start_B = pending_B - 1 - (grant_B - n_out_B)
    at_BW = (start_B[:, None] + step_W).clamp_(min=0)
    place_BW = out_first_B[:, None] + at_BW.minimum(n_out_B[:, None] - 1)
    id_BW = id_M[place_BW]
    accepted_B = torch.zeros_like(pending_B)
    if drafts is not None:
        drawn_BK = at_BW[:, 1:] < n_out_B[:, None]
        drafted_BK = drawn_BK & (step_W[:-1] < drafts.count_B[reqs_B][:, None])
        hit_BK = drafted_BK & (id_BW[:, :-1] == drafts.token_BK[reqs_B])
        accepted_B = hit_BK.long().cumprod(1).sum(1)
    complete_B = grant_B >= pending_B
    return Walked(
        torch.where(complete_B, pending_B + accepted_B, grant_B).int(),
        torch.where(complete_B, accepted_B + 1, 0).int(),
        id_BW,
        place_BW.int(),
    )
