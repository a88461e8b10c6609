"""`walk` on a GPU: one program a request."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.gpu_sizes import next_power
from headrace.kernels.walk.reference import Drafts, Walked, Walks


@triton.jit(do_not_specialize=["n_reqs"])
def _walk(
    n_tok,
    n_done,
    reqs_B,
    grant_B,
    n_out_B,
    out_first_B,
    id_M,
    token_BK,
    count_B,
    out,
    n_reqs,
    width,
    token_row,
    BLOCK_W: tl.constexpr,
    HAS_DRAFTS: tl.constexpr,
):
    i = tl.program_id(0)
    r = tl.load(reqs_B + i)
    pending = tl.load(n_tok + r) - tl.load(n_done + r)
    grant = tl.load(grant_B + i).to(tl.int32)
    n_out = tl.load(n_out_B + i).to(tl.int32)
    start = pending - 1 - (grant - n_out)
    w_W = tl.arange(0, BLOCK_W)
    here_W = w_W < width
    at_W = tl.maximum(start + w_W, 0)
    place_W = tl.load(out_first_B + i).to(tl.int32) + tl.minimum(at_W, n_out - 1)
    id_W = tl.load(id_M + place_W, mask=here_W, other=0)
    accepted = tl.zeros([], tl.int32)
    if HAS_DRAFTS:
        # Whether the draft behind draw w is there, has a draw of its own, and is what draw w says.
        drafted_W = (w_W + 1 < width) & (tl.maximum(start + w_W + 1, 0) < n_out) & (w_W < tl.load(count_B + r))
        draft_W = tl.load(token_BK + r * token_row + w_W, mask=w_W + 1 < width, other=-1)
        hit_W = drafted_W & (id_W == draft_W)
        accepted = tl.min(tl.where(hit_W, BLOCK_W, w_W), 0)
    complete = grant >= pending
    tl.store(out + i, tl.where(complete, pending + accepted, grant))
    tl.store(out + n_reqs + i, tl.where(complete, accepted + 1, 0))
    emit = out + 2 * n_reqs + i * width
    tl.store(emit + w_W, id_W, mask=here_W)
    tl.store(emit + n_reqs * width + w_W, place_W, mask=here_W)


def walk_gpu(walks: Walks, id_M: Tensor, drafts: Drafts | None = None) -> Walked:
    """See the package."""
    n_reqs, width = walks.reqs_B.shape[0], 1 if drafts is None else drafts.token_BK.shape[1] + 1
    out = torch.empty(2 * n_reqs * (1 + width), dtype=torch.int32, device=id_M.device)
    if n_reqs:
        # A kernel wants a tensor for what it does not read.
        token_BK, count_B = (id_M, id_M) if drafts is None else drafts
        _walk[(n_reqs,)](
            *walks,
            id_M,
            token_BK,
            count_B,
            out,
            n_reqs,
            width,
            0 if drafts is None else token_BK.stride(0),
            BLOCK_W=next_power(width),
            HAS_DRAFTS=drafts is not None,
            num_warps=1,
        )
    n_kv_B, n_emit_B, emit, priced_by = out.split([n_reqs, n_reqs, n_reqs * width, n_reqs * width])
    return Walked(n_kv_B, n_emit_B, emit.view(n_reqs, width), priced_by.view(n_reqs, width))
