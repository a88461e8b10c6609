"""`draw_rows` on the CPU, compiled: one pass instead of eight gathers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu_runtime import njit_serial
from headrace.kernels.draw.reference import DrawParams
from headrace.kernels.draw_rows.reference import DrawRows, DrawTables


@njit_serial()
def _gather(
    tables: Any, req_R: Any, t_R: Any, out_row_M: Any, shift: int, reals_3M: Any, ints_2M: Any, s_M2: Any
) -> None:
    temperature, top_k, top_p, min_p, stream = tables
    for m in range(len(out_row_M)):
        row = out_row_M[m]
        r = req_R[row]
        reals_3M[0, m], reals_3M[1, m], reals_3M[2, m] = temperature[r], top_p[r], min_p[r]
        ints_2M[0, m], ints_2M[1, m] = top_k[r], t_R[row] + shift
        s_M2[m, 0], s_M2[m, 1] = stream[r, 0], stream[r, 1]


def draw_rows_cpu(tables: DrawTables, req_R: Tensor, t_R: Tensor, out_row_M: Tensor, shift: int) -> DrawRows:
    """See the package."""
    n_draws = len(out_row_M)
    reals_3M, ints_2M = np.empty((3, n_draws), np.float32), np.empty((2, n_draws), np.int32)
    stream_M2 = np.empty((n_draws, 2), np.int32)
    arrays = tuple([x.numpy() for x in tables])
    _gather(arrays, req_R.numpy(), t_R.numpy(), out_row_M.numpy(), shift, reals_3M, ints_2M, stream_M2)
    # Rows of an array cost less to take than rows of a tensor.
    temperature_M, top_p_M, min_p_M = map(torch.from_numpy, reals_3M)
    top_k_M, t_out_M = map(torch.from_numpy, ints_2M)
    return DrawRows(DrawParams(temperature_M, top_k_M, top_p_M, min_p_M), torch.from_numpy(stream_M2), t_out_M)
