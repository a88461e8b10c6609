"""`draw_rows` on a GPU: one kernel, a block of draws a program."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.draw.reference import DrawParams
from headrace.kernels.draw_rows.reference import DrawRows, DrawTables
from headrace.kernels.gpu_runtime import tl, triton

_BLOCK = 128
"""Draws of a program."""


@triton.jit(do_not_specialize=["n_draws", "shift"])
def _gather(
    temperature,
    top_k,
    top_p,
    min_p,
    stream,
    req_R,
    t_R,
    out_row_M,
    reals_3M,
    ints_4M,
    n_draws,
    shift,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = m < n_draws
    row = tl.load(out_row_M + m, mask=here, other=0)
    r = tl.load(req_R + row, mask=here, other=0)
    tl.store(reals_3M + m, tl.load(temperature + r, mask=here, other=0.0), mask=here)
    tl.store(reals_3M + n_draws + m, tl.load(top_p + r, mask=here, other=0.0), mask=here)
    tl.store(reals_3M + 2 * n_draws + m, tl.load(min_p + r, mask=here, other=0.0), mask=here)
    tl.store(ints_4M + m, tl.load(top_k + r, mask=here, other=0), mask=here)
    tl.store(ints_4M + n_draws + m, tl.load(t_R + row, mask=here, other=0) + shift, mask=here)
    stream_M2 = ints_4M + 2 * n_draws
    tl.store(stream_M2 + 2 * m, tl.load(stream + 2 * r, mask=here, other=0), mask=here)
    tl.store(stream_M2 + 2 * m + 1, tl.load(stream + 2 * r + 1, mask=here, other=0), mask=here)


def draw_rows_gpu(tables: DrawTables, req_R: Tensor, t_R: Tensor, out_row_M: Tensor, shift: int) -> DrawRows:
    """See the package. `stream` is contiguous."""
    n_draws = out_row_M.shape[0]
    reals_3M = torch.empty((3, n_draws), dtype=torch.float32, device=req_R.device)
    ints_4M = torch.empty((4, n_draws), dtype=torch.int32, device=req_R.device)
    if n_draws:
        _gather[(-(-n_draws // _BLOCK),)](
            *tables, req_R, t_R, out_row_M, reals_3M, ints_4M, n_draws, shift, BLOCK=_BLOCK, num_warps=4
        )
    temperature_M, top_p_M, min_p_M = reals_3M
    return DrawRows(DrawParams(temperature_M, ints_4M[0], top_p_M, min_p_M), ints_4M[2:].view(n_draws, 2), ints_4M[1])
