"""Low-rank changes of linear maps on the CPU, compiled: what `reference.py` defines, row by row.

Both products run over the inputs of a row in order, four at a time, and are vectors over the outputs: a row's bits are
the same alone and in any batch, on one thread or several. Letters: R rows, E inputs, N outputs, Q rank, K all ranks.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from headrace.kernels.adapt.reference import Factors
from headrace.kernels.cpu_elements import LIKE, apart, narrow, shares_of, vector, widen
from headrace.kernels.cpu_runtime import njit_parallel, njit_serial

# Below this many multiplications a second thread costs more to wake than it saves.
_SERIAL_BELOW = 65_536

_F0 = np.float32(0.0)


@njit_serial(fastmath={"contract"})
def _add_product(sum_N: Any, x_E: Any, matrix: Any, at: Any, stride: Any, like: Any) -> None:
    """sum += x M for M [E, N], whose rows begin `stride` elements apart, at element `at` of an address."""
    apart()
    inputs, outputs = len(x_E), len(sum_N)
    fours = inputs // 4 * 4
    for e in range(0, fours, 4):
        x0, x1, x2, x3 = x_E[e], x_E[e + 1], x_E[e + 2], x_E[e + 3]
        m0_N = vector(matrix, at + e * stride, outputs, like)
        m1_N = vector(matrix, at + (e + 1) * stride, outputs, like)
        m2_N = vector(matrix, at + (e + 2) * stride, outputs, like)
        m3_N = vector(matrix, at + (e + 3) * stride, outputs, like)
        for n in range(outputs):
            sum_N[n] = sum_N[n] + x0 * widen(m0_N[n]) + x1 * widen(m1_N[n]) + x2 * widen(m2_N[n]) + x3 * widen(m3_N[n])
    for e in range(fours, inputs):
        x0 = x_E[e]
        m0_N = vector(matrix, at + e * stride, outputs, like)
        for n in range(outputs):
            sum_N[n] = sum_N[n] + x0 * widen(m0_N[n])


@njit_serial(fastmath={"contract"})
def _adapt_rows(
    first: Any, last: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, slots: Any, a: Any, b: Any, sizes: Any,
    borders: Any, like: Any, like_slot: Any
) -> None:  # fmt: skip
    """Rows [first, last) of matrices at two addresses."""
    inputs, outputs, rank, parts = sizes
    ranks = rank * parts
    slot_R, border_P = vector(slots, 0, last, like_slot), vector(borders, 0, parts + 1, like_slot)
    x_E, h_K, delta_N = np.empty(inputs, np.float32), np.empty(ranks, np.float32), np.empty(outputs, np.float32)
    for r in range(first, last):
        slot = np.int64(slot_R[r])
        if slot == 0:
            continue
        row_E, y_N = vector(x, r * x_stride, inputs, like), vector(y, r * y_stride, outputs, like)
        for e in range(inputs):
            x_E[e] = widen(row_E[e])
        h_K[:] = _F0
        _add_product(h_K, x_E, a, slot * inputs * ranks, ranks, like)
        for k in range(ranks):
            h_K[k] = widen(narrow(h_K[k], like))
        delta_N[:] = _F0
        for p in range(parts):
            low, high = np.int64(border_P[p]), np.int64(border_P[p + 1])
            h_Q = h_K[p * rank : (p + 1) * rank]
            _add_product(delta_N[low:high], h_Q, b, slot * rank * outputs + low, outputs, like)
        for n in range(outputs):
            y_N[n] = narrow(widen(y_N[n]) + delta_N[n], like)


@njit_parallel()
def _adapt(
    shares: Any, rows: Any, y: Any, y_stride: Any, x: Any, x_stride: Any, slots: Any, a: Any, b: Any, sizes: Any,
    borders: Any, like: Any, like_slot: Any
) -> None:  # fmt: skip
    if shares == 1:
        _adapt_rows(0, rows, y, y_stride, x, x_stride, slots, a, b, sizes, borders, like, like_slot)
    else:
        for s in numba.prange(shares):
            first, last = s * rows // shares, (s + 1) * rows // shares
            _adapt_rows(first, last, y, y_stride, x, x_stride, slots, a, b, sizes, borders, like, like_slot)


_LIKE_SLOT = np.zeros(1, np.int32)


def adapt_cpu_(y_RN: Tensor, x_RE: Tensor, slot_R: Tensor, factors: Factors) -> None:
    """See `headrace.kernels.adapt.adapt_`, which has checked the shapes. A type of `cpu_types.TYPES`; places int32."""
    if x_RE.stride(1) != 1:
        x_RE = x_RE.contiguous()
    y_there = y_RN
    if y_RN.stride(1) != 1:
        y_there = y_RN.contiguous()
    slot_R = slot_R.contiguous()
    rows, inputs = x_RE.shape
    _, rank, outputs = factors.b_SQN.shape
    parts = len(factors.borders) - 1
    work = rows * rank * (inputs * parts + outputs)
    _adapt(
        shares_of(work, _SERIAL_BELOW, rows),
        rows,
        y_there.data_ptr(),
        y_there.stride(0),
        x_RE.data_ptr(),
        x_RE.stride(0),
        slot_R.data_ptr(),
        factors.a_SEK.data_ptr(),
        factors.b_SQN.data_ptr(),
        (inputs, outputs, rank, parts),
        factors.borders_P.data_ptr(),
        LIKE[y_RN.dtype],
        _LIKE_SLOT,
    )
    if y_there is not y_RN:
        y_RN.copy_(y_there)
