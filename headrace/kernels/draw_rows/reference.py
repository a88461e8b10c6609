"""`draw_rows` in plain torch: the definition that the compiled forms are compared with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headrace.kernels.draw.reference import DrawParams


class DrawTables(NamedTuple):
    """By request index, [Bmax+1] where nothing else is said."""

    temperature: Tensor
    """float32"""
    top_k: Tensor
    """int32"""
    top_p: Tensor
    """float32"""
    min_p: Tensor
    """float32"""
    stream: Tensor
    """Noise keys, int32 [Bmax+1, 2]."""


class DrawRows(NamedTuple):
    """By draw."""

    params: DrawParams
    stream_M2: Tensor
    """int32 [M, 2]"""
    t_out_M: Tensor
    """Index of the token that the draw decides, int32 [M]."""


def draw_rows_reference(tables: DrawTables, req_R: Tensor, t_R: Tensor, out_row_M: Tensor, shift: int) -> DrawRows:
    """See the package."""
    req_M = req_R[out_row_M].long()
    *filters, stream_M2 = (table[req_M] for table in tables)
    return DrawRows(DrawParams(*filters), stream_M2, t_R[out_row_M] + shift)
