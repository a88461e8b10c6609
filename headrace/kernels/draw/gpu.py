"""Keyed draw on a GPU: the same function of a row as `reference.py`, by the Triton kernels of `gpu_kernel.py`.

Three launches whatever the rows ask for; a row's programs return where its parameters leave them nothing to do, so that
no parameter is read by the host and a step can be captured in a graph. Random words are those of the reference bit for
bit; noise and log-probs may differ from it in their last bits.
Letters: M output rows, V vocabulary, C chunks of a row, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.draw.gpu_kernel import GROUP, contest, finish, scan
from headrace.kernels.draw.reference import Drawn, DrawParams
from headrace.kernels.gpu_sizes import next_power

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of logits that the kernels know."""
CHUNK = 4096
"""Tokens of a program that goes through a part of a row."""
TILE = 1024
"""Tokens in flight; sums run in lanes of a tile, so results follow from it and from V only."""


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.contiguous() if tensor.dtype is dtype else tensor.to(dtype).contiguous()


def _rows_of(tensor_MV: Tensor) -> Tensor:
    """The same numbers with neighbouring tokens side by side."""
    return tensor_MV if tensor_MV.stride(1) == 1 else tensor_MV.contiguous()


def draw_gpu(
    logits_MV: Tensor,
    params: DrawParams,
    stream_M2: Tensor,
    t_out_M: Tensor,
    *,
    raw_MV: Tensor | None = None,
    nth: int | Tensor = 0,
    purpose: int = 0,
) -> Drawn:
    """See `headrace.kernels.draw.draw`, which has checked the shapes. Logits of a type of `TYPES`."""
    rows, vocab = logits_MV.shape
    f32, i32, f64 = torch.float32, torch.int32, torch.float64
    out_4M = torch.empty((4, rows), dtype=f32, device=logits_MV.device)
    id_M, logp_3M = out_4M[0].view(i32), out_4M[1:]
    if rows:
        logits_MV = _rows_of(logits_MV)
        if raw_MV is None:
            raw_MV = logits_MV
        raw_MV = _rows_of(raw_MV if raw_MV.dtype in TYPES else raw_MV.to(f32))
        filters = (
            _plain(params.temperature_M, f32),
            _plain(params.top_k_M, i32),
            _plain(params.top_p_M, f32),
            _plain(params.min_p_M, f32),
        )
        t_out_M = _plain(t_out_M, i32)
        nth_M = _plain(nth, i32) if isinstance(nth, Tensor) else t_out_M
        has_nth, nth = isinstance(nth, Tensor), 0 if isinstance(nth, Tensor) else nth
        place = (_plain(stream_M2, i32), t_out_M, nth_M, nth, purpose)
        n_chunks, n_groups = -(-vocab // CHUNK), -(-vocab // GROUP)

        def room(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((rows, columns), dtype=dtype, device=logits_MV.device)

        top_MG, list_MG = room(n_groups, f32), room(n_groups, i32)
        max_MC, raw_max_MC, score_MC = (room(n_chunks, f32) for _ in range(3))
        first_MC, bad_MC, winner_MC = (room(n_chunks, i32) for _ in range(3))
        raw_sum_MC, mass_MC = (room(n_chunks, f64) for _ in range(2))
        block_c = next_power(n_chunks)
        scan[(rows, n_chunks)](
            logits_MV,
            raw_MV,
            top_MG,
            max_MC,
            first_MC,
            bad_MC,
            raw_max_MC,
            raw_sum_MC,
            vocab,
            n_groups,
            logits_MV.stride(0),
            raw_MV.stride(0),
            CHUNK=CHUNK,
            TILE=TILE,
            num_warps=4,
        )
        contest[(rows, n_chunks)](
            logits_MV,
            *filters,
            *place,
            max_MC,
            raw_max_MC,
            bad_MC,
            mass_MC,
            score_MC,
            winner_MC,
            vocab,
            logits_MV.stride(0),
            CHUNK=CHUNK,
            TILE=TILE,
            BLOCK_C=block_c,
            HAS_NTH=has_nth,
            num_warps=4,
        )
        finish[(rows,)](
            logits_MV,
            raw_MV,
            *filters,
            *place,
            top_MG,
            list_MG,
            max_MC,
            first_MC,
            bad_MC,
            raw_max_MC,
            raw_sum_MC,
            mass_MC,
            score_MC,
            winner_MC,
            id_M,
            logp_3M,
            rows,
            vocab,
            n_groups,
            n_chunks,
            logits_MV.stride(0),
            raw_MV.stride(0),
            TILE=TILE,
            BLOCK_C=block_c,
            BLOCK_G=next_power(n_groups),
            HAS_NTH=has_nth,
            num_warps=8,
        )
    return Drawn(id_M, *logp_3M)
