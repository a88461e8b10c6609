"""Products with weights that are codes in memory, on a GPU: which of a form's three kernels runs, over which blocks.

Up to `FEW_ROWS` rows a program multiplies its block of outputs as it decodes it, with the tensor cores or, for one row,
without. More rows: blocks of outputs are decoded into memory and multiplied by the library, so that decoding is paid
once and not by every tile of rows. Weights are rounded to the type of x, sums are float32. Letters: R rows, E inputs, N
outputs, B outputs of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.kernels.gpu_sizes import next_power, processors

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernels know."""
FEW_ROWS = 64
"""Rows up to which weights are multiplied as they are decoded. Not yet timed on a GPU."""
DENSE_BYTES = 2**26
"""Bytes of the block of dense weights that many rows are multiplied with."""
BLOCK_N = 64
"""Outputs of a block at most, where there are several rows."""


class Coded(NamedTuple):
    """Launches of the kernels of a form, for one map."""

    row: Callable[[tuple[int, int], Tensor, Tensor, int], object]
    """grid, x [1, E], y [1, N], outputs of a block: one row."""
    tile: Callable[[tuple[int, int], Tensor, Tensor, int, int], object]
    """grid, x, y, rows and outputs of a tile: few rows."""
    dense: Callable[[int, int], Tensor]
    """First output and number of them: their weights [E, B] in the type of x."""
    row_block_n: int
    """Outputs of a block at most, for one row."""


def multiply_coded(x_RE: Tensor, outputs: int, coded: Coded) -> Tensor:
    """x W, [R, N]; `coded` has checked the tensors."""
    rows, inputs = x_RE.shape
    y_RN = x_RE.new_empty(rows, outputs)
    if not y_RN.numel():
        return y_RN
    x = x_RE if x_RE.stride(1) == 1 else x_RE.contiguous()
    if rows <= FEW_ROWS:
        block_n = coded.row_block_n if rows == 1 else BLOCK_N
        while block_n > 16 and -(-outputs // block_n) < 2 * processors(x.device):
            block_n //= 2
        blocks = -(-outputs // block_n)
        if rows == 1:
            coded.row((blocks, 1), x, y_RN, block_n)
        else:
            block_r = max(next_power(rows), 16)
            coded.tile((blocks, -(-rows // block_r)), x, y_RN, block_r, block_n)
        return y_RN
    width = max(DENSE_BYTES // (inputs * x.element_size()) // 64 * 64, 64)
    for start in range(0, outputs, width):
        size = min(width, outputs - start)
        y_RN[:, start : start + size] = x @ coded.dense(start, size)
    return y_RN
