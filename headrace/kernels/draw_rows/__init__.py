"""The operation `draw_rows`: what the draws of a step are made with, gathered from the tables.

Draw m comes from row out_row[m]: its request says parameters and noise key, its token index and `shift` which token it
decides. Letters: R rows, M draws, Bmax request indices.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.draw_rows.reference import DrawRows, DrawTables, draw_rows_reference

__all__ = ["DrawRows", "DrawTables", "draw_rows"]


def draw_rows(tables: DrawTables, req_R: Tensor, t_R: Tensor, out_row_M: Tensor, shift: int) -> DrawRows:
    """The CPU and a GPU run compiled forms. No host synchronisation.

    Args:
        tables: by request index.
        req_R, t_R: request index and token index of the rows, int32 [R].
        out_row_M: the row of each draw, int64 [M].
        shift: index of the token that a row decides, minus the row's own.
    """
    if req_R.device.type == "cpu":
        from headrace.kernels.draw_rows.cpu import draw_rows_cpu  # numba is loaded where it is used

        return draw_rows_cpu(tables, req_R, t_R, out_row_M, shift)
    if req_R.device.type == "cuda":
        from headrace.kernels.draw_rows.gpu import draw_rows_gpu  # Triton is loaded where it is used

        return draw_rows_gpu(tables, req_R, t_R, out_row_M, shift)
    return draw_rows_reference(tables, req_R, t_R, out_row_M, shift)
