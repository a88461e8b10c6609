"""Rotation of heads on the CPU, compiled: what `reference.py` defines, in one pass and without a copy.

Letters: R rows, N heads, D head size, h = D/2.
"""

from __future__ import annotations

from typing import Any

import numba
from torch import Tensor

from headrace.kernels.cpu_elements import LIKE, apart, narrow, shares_of, vector, widen
from headrace.kernels.cpu_runtime import njit_parallel, njit_serial

# Below this many elements a second thread costs more to wake than it saves.
_SERIAL_BELOW = 49_152


@njit_serial(fastmath={"contract"})
def _rotate_rows(first: Any, last: Any, io: Any, shape: Any, like: Any) -> None:
    """Rows [first, last). `io`: addresses of x, cos and sin; `shape`: heads, half of a head, strides of x."""
    apart()
    x, cos, sin = io
    heads, half, x_row, x_head = shape
    for r in range(first, last):
        cos_h, cos2_h = vector(cos, 2 * r * half, half, like), vector(cos, (2 * r + 1) * half, half, like)
        sin_h, sin2_h = vector(sin, 2 * r * half, half, like), vector(sin, (2 * r + 1) * half, half, like)
        for n in range(heads):
            x_h = vector(x, r * x_row + n * x_head, half, like)
            x2_h = vector(x, r * x_row + n * x_head + half, half, like)
            for i in range(half):
                a, b = widen(x_h[i]), widen(x2_h[i])
                # A product that is rounded to the element type first, then the sum: the order of the reference.
                x_h[i] = narrow(widen(narrow(a * widen(cos_h[i]), like)) + b * widen(sin_h[i]), like)
                x2_h[i] = narrow(widen(narrow(b * widen(cos2_h[i]), like)) + a * widen(sin2_h[i]), like)


@njit_parallel()
def _rotate(shares: Any, rows: Any, io: Any, shape: Any, like: Any) -> None:
    if shares == 1:
        _rotate_rows(0, rows, io, shape, like)
    else:
        for s in numba.prange(shares):
            _rotate_rows(s * rows // shares, (s + 1) * rows // shares, io, shape, like)


def rotate_cpu_(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> None:
    """See `headrace.kernels.rotary.rotate_`, which has checked shapes. One type, of `cpu_types.TYPES`; stride(2) 1."""
    rows, heads, size = x_RND.shape
    x_row, x_head, _ = x_RND.stride()
    cos_R1D, sin_R1D = cos_R1D.contiguous(), sin_R1D.contiguous()
    io = (x_RND.data_ptr(), cos_R1D.data_ptr(), sin_R1D.data_ptr())
    shares = shares_of(rows * heads * size, _SERIAL_BELOW, rows)
    _rotate(shares, rows, io, (heads, size // 2, x_row, x_head), LIKE[x_RND.dtype])
