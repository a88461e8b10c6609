"""Linear maps with a fixed order of sums on the CPU, compiled.

Where the outputs of an input lie side by side (`Placement.matrix` in float32), inputs are added in rising order, a
block of outputs at a time. Where the inputs of an output do, each result is one sum in vector lanes. Either is one
compiled function that knows one row, called for each. Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from headrace.kernels.cpu_elements import LIKE, apart, narrow, vector, widen
from headrace.kernels.cpu_runtime import FAST_SUMS, njit_parallel, njit_serial, use_torch_threads

BLOCK_N = 64
"""Outputs that a row's sums are held for at once."""
_SERIAL_BELOW = 65_536
"""Products below which a second thread costs more to wake than it saves."""
_PLAIN, _BIAS, _ONTO, _ONTO_BIAS = range(4)  # odd: with a bias


@njit_serial(fastmath={"contract"})
def _add_columns(sum_N: Any, x_E: Any, weight: Any, first: Any, count: Any, weight_column: Any, like: Any) -> None:
    """sum[j] += x[e] weight[first + j, e] for the `count` outputs from `first` on, inputs in rising order."""
    apart()
    for e in range(len(x_E)):
        w_N = vector(weight, e * weight_column + first, count, like)
        x = widen(x_E[e])
        for j in range(count):
            sum_N[j] += x * widen(w_N[j])


@njit_serial(fastmath=FAST_SUMS)
def _dot(x_E: Any, w_E: Any) -> Any:
    """The sum of products of two rows of a length."""
    apart()
    total = np.float32(0.0)
    for e in range(len(x_E)):
        total += widen(x_E[e]) * widen(w_E[e])
    return total


@njit_serial()
def _put(y_N: Any, j: Any, total: Any, bias: Any, n: Any, kind: Any, like: Any) -> None:
    """A finished sum goes to y[j]; `n`: which output it is."""
    if kind >= _ONTO:
        total += widen(y_N[j])
    if kind == _ONTO_BIAS:
        total = widen(narrow(total, like))
    if kind & 1:
        total += widen(vector(bias, n, 1, like)[0])
    y_N[j] = narrow(total, like)


@njit_serial()
def _share(first: Any, last: Any, io: Any, shape: Any, kind: Any, like: Any) -> None:
    """Blocks of outputs [first, last) of all rows."""
    apart()
    x, weight, bias, y = io
    rows, outputs, inputs, x_row, weight_row, weight_column, y_row = shape
    sum_N = np.empty(BLOCK_N, np.float32)
    for block in range(first, last):
        begin = block * BLOCK_N
        count = min(outputs - begin, BLOCK_N)
        for r in range(rows):
            x_E = vector(x, r * x_row, inputs, like)
            y_N = vector(y, r * y_row + begin, count, like)
            if weight_row == 1:
                sum_N[:] = np.float32(0.0)
                _add_columns(sum_N, x_E, weight, begin, count, weight_column, like)
                for j in range(count):
                    _put(y_N, j, sum_N[j], bias, begin + j, kind, like)
            else:
                for j in range(count):
                    total = _dot(x_E, vector(weight, (begin + j) * weight_row, inputs, like))
                    _put(y_N, j, total, bias, begin + j, kind, like)


@njit_parallel()
def _multiply(shares: Any, io: Any, shape: Any, kind: Any, like: Any) -> None:
    blocks = (shape[1] + BLOCK_N - 1) // BLOCK_N
    if shares == 1:
        _share(0, blocks, io, shape, kind, like)
    else:
        for s in numba.prange(shares):
            _share(s * blocks // shares, (s + 1) * blocks // shares, io, shape, kind, like)


def multiply_cpu(x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, onto_RN: Tensor | None) -> Tensor:
    """x W^T + b, or `onto` += that. Shapes have been checked; one type of `cpu_types.TYPES`."""
    if x_RE.stride(1) != 1:
        x_RE = x_RE.contiguous()
    if 1 not in weight_NE.stride():
        weight_NE = weight_NE.contiguous()
    rows, inputs = x_RE.shape
    outputs = weight_NE.shape[0]
    # One input or one output may have any stride.
    weight_row, weight_column = weight_NE.stride()
    if weight_column == 1 and inputs > 1:
        weight_row = max(weight_row, 2)
    y_RN = x_RE.new_empty(rows, outputs) if onto_RN is None else onto_RN
    out_RN = y_RN if y_RN.stride(1) == 1 else y_RN.contiguous()
    if not out_RN.numel():
        return y_RN
    bias = None if bias_N is None else bias_N.contiguous()
    kind = (_PLAIN if bias is None else _BIAS) if onto_RN is None else (_ONTO if bias is None else _ONTO_BIAS)
    io = (x_RE.data_ptr(), weight_NE.data_ptr(), 0 if bias is None else bias.data_ptr(), out_RN.data_ptr())
    shape = (rows, outputs, inputs, x_RE.stride(0), weight_row, weight_column, out_RN.stride(0))
    shares = 1 if rows * outputs * inputs < _SERIAL_BELOW else use_torch_threads()
    _multiply(shares, io, shape, kind, LIKE[x_RE.dtype])
    if out_RN is not y_RN:
        y_RN.copy_(out_RN)
    return y_RN
