"""RMS normalisation on the CPU, compiled: what `reference.py` defines, in two passes over a row that lies in cache.

A row is summed by one thread in an order that depends on its width only. Letters: R rows, N heads, E width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from headrace.kernels.cpu_elements import LIKE, apart, narrow, shares_of, vector, widen
from headrace.kernels.cpu_runtime import FAST_SUMS, njit_parallel, njit_serial

# Below this many elements a second thread costs more to wake than it saves.
_SERIAL_BELOW = 49_152

_F1 = np.float32(1.0)


@njit_serial(fastmath=FAST_SUMS)
def _norm_rows(first: Any, last: Any, io: Any, shape: Any, eps: Any, like: Any) -> None:
    """Rows [first, last). `io`: addresses of x, weight and y; `shape`: heads, width, strides of x and of the weight."""
    apart()
    x, weight, y = io
    heads, width, x_row, x_head, weight_head = shape
    for r in range(first, last):
        for n in range(heads):
            x_E = vector(x, r * x_row + n * x_head, width, like)
            weight_E = vector(weight, n * weight_head, width, like)
            y_E = vector(y, (r * heads + n) * width, width, like)
            total = np.float32(0.0)
            for i in range(width):
                total += widen(x_E[i]) * widen(x_E[i])
            scale = _F1 / np.sqrt(total / np.float32(width) + np.float32(eps))
            for i in range(width):
                y_E[i] = narrow(widen(x_E[i]) * scale * widen(weight_E[i]), like)


@njit_parallel()
def _norm(shares: Any, rows: Any, io: Any, shape: Any, eps: Any, like: Any) -> None:
    if shares == 1:
        _norm_rows(0, rows, io, shape, eps, like)
    else:
        for s in numba.prange(shares):
            _norm_rows(s * rows // shares, (s + 1) * rows // shares, io, shape, eps, like)


def rms_norm_cpu(x_RE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See `headrace.kernels.rms_norm.rms_norm`, which has checked the shapes. Both of one type of `cpu_types.TYPES`."""
    y_RE = x_RE.new_empty(x_RE.shape)
    if not y_RE.numel():
        return y_RE
    per_head = weight_E.dim() == 2
    x = x_RE
    if x.dim() != 3 and (per_head or x.dim() != 2):
        x = x.reshape(-1, *weight_E.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if not weight_E.is_contiguous():
        weight_E = weight_E.contiguous()
    if x.dim() == 2:
        rows, width = x.shape
        shape = (1, width, x.stride(0), 0, 0)
    else:
        rows, heads, width = x.shape
        shape = (heads, width, x.stride(0), x.stride(1), width if per_head else 0)
    io = (x.data_ptr(), weight_E.data_ptr(), y_RE.data_ptr())
    _norm(shares_of(y_RE.numel(), _SERIAL_BELOW, rows), rows, io, shape, eps, LIKE[x.dtype])
    return y_RE
