"""`advance` on a GPU: one program a request, what `reference.py` computes for it.

Nothing is stored for the ghost, so that padding may name it in many programs at once, and for requests that ended.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.advance.reference import Advanced, Clocks
from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.gpu_sizes import next_power
from headrace.request import Finish

_LENGTH = tl.constexpr(int(Finish.LENGTH))
_STOP = tl.constexpr(int(Finish.STOP))
_ERROR = tl.constexpr(int(Finish.ERROR))


@triton.jit(do_not_specialize=["n_reqs"])
def _advance(
    n_tok,
    n_done,
    finish,
    hist,
    kv_len,
    limit,
    trigger,
    stop_ids,
    reqs_B,
    n_kv_B,
    n_emit_B,
    emit_BE,
    out_3B,
    n_reqs,
    ghost,
    e_max,
    n_stops,
    n_groups,
    hist_row,
    kv_len_row,
    stop_ids_row,
    emit_row,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    i = tl.program_id(0)
    r = tl.load(reqs_B + i).to(tl.int64)
    ended = tl.load(finish + r)
    live = (r != ghost) & (ended == 0)
    n_kv = tl.where(live, tl.load(n_kv_B + i), 0)
    n_emit = tl.where(live, tl.load(n_emit_B + i), 0)
    known, done = tl.load(n_tok + r), tl.load(n_done + r)
    late = tl.maximum(done + n_kv - tl.load(trigger + r), 0)
    wanted = tl.maximum(n_emit - late, 0)
    room = tl.maximum(tl.load(limit + r) - known, 0)
    most = tl.minimum(wanted, room)

    e_E = tl.arange(0, BLOCK_E)
    live_E = (e_E < e_max) & (e_E < most)
    token_E = tl.load(emit_BE + i.to(tl.int64) * emit_row + e_E, mask=live_E, other=0)
    s_S = tl.arange(0, BLOCK_S)
    stop_S = tl.load(stop_ids + r * stop_ids_row + s_S, mask=s_S < n_stops, other=-1)
    # Unused stop ids are -1 too: an id that could not be drawn must not look like one of them.
    bad_E = live_E & (token_E < 0)
    hits_E = tl.sum((token_E[:, None] == stop_S[None, :]).to(tl.int32), 1)
    stop_E = live_E & (token_E >= 0) & (hits_E > 0)
    first_stop = tl.min(tl.where(stop_E, e_E, e_max), 0)
    first_bad = tl.min(tl.where(bad_E, e_E, e_max), 0)
    kept = tl.minimum(tl.minimum(most, first_stop + 1), first_bad)

    reason = tl.where((wanted > 0) & (kept >= room), _LENGTH, 0)
    reason = tl.where(first_stop < tl.minimum(kept, first_bad), _STOP, reason)
    reason = tl.where(first_bad < tl.minimum(first_stop, room), _ERROR, reason)
    # What a trigger cuts beyond the tokens are rows of a prompt.
    rows = n_kv - tl.maximum(late, n_emit - kept)
    tl.store(out_3B + i, rows)
    tl.store(out_3B + n_reqs + i, kept)
    tl.store(out_3B + 2 * n_reqs + i, tl.where(live, reason, ended))

    if live:
        tl.store(hist + r * hist_row + known + e_E, token_E, mask=e_E < kept)
        tl.store(n_tok + r, known + kept)
        tl.store(n_done + r, done + rows)
        tl.store(finish + r, reason)
        g_G = tl.arange(0, BLOCK_G)
        kv_at = kv_len + g_G * kv_len_row + r
        has_group = g_G < n_groups
        tl.store(kv_at, tl.load(kv_at, mask=has_group, other=0) + rows, mask=has_group)


def advance_gpu(clocks: Clocks, reqs_B: Tensor, n_kv_B: Tensor, n_emit_B: Tensor, emit_BE: Tensor) -> Advanced:
    """See the package. All tables have neighbouring entries along their last axis."""
    n_reqs, e_max = emit_BE.shape
    out_3B = torch.empty((3, n_reqs), dtype=torch.int32, device=emit_BE.device)
    if emit_BE.stride(1) != 1:
        emit_BE = emit_BE.contiguous()
    if n_reqs:
        n_groups, n_stops = clocks.kv_len.shape[0], clocks.stop_ids.shape[1]
        _advance[(n_reqs,)](
            *clocks,
            reqs_B.contiguous(),
            n_kv_B.contiguous(),
            n_emit_B.contiguous(),
            emit_BE,
            out_3B,
            n_reqs,
            clocks.n_tok.shape[0] - 1,
            e_max,
            n_stops,
            n_groups,
            clocks.hist.stride(0),
            clocks.kv_len.stride(0),
            clocks.stop_ids.stride(0),
            emit_BE.stride(0),
            BLOCK_E=next_power(e_max),
            BLOCK_S=next_power(n_stops),
            BLOCK_G=next_power(n_groups),
            num_warps=1,
        )
    return Advanced(*out_3B)
