"""silu(gate) * up on the CPU, compiled: what `reference.py` defines, in one pass.

With e = exp(-|x|), silu(x) = x / (1 + e) for x > 0 and x e / (1 + e) otherwise: no overflow, and NaN where x is NaN or
-inf, as in torch. Letters: R rows, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from headrace.kernels.cpu_elements import LIKE, apart, narrow, shares_of, vector, widen
from headrace.kernels.cpu_runtime import exp_f32, njit_parallel, njit_serial

# Below this many results a second thread costs more to wake than it saves.
_SERIAL_BELOW = 49_152

_F0, _F1 = np.float32(0.0), np.float32(1.0)


@njit_serial(fastmath={"contract"})
def _silu(x: Any) -> Any:
    e = exp_f32(-abs(x))
    return x * (_F1 if x > _F0 else e) / (_F1 + e)


@njit_serial(fastmath={"contract"})
def _silu_mul_rows(first: Any, last: Any, gate_up: Any, out: Any, width: Any, stride: Any, like: Any) -> None:
    """Rows [first, last) of matrices at two addresses."""
    apart()
    for r in range(first, last):
        gate_F = vector(gate_up, r * stride, width, like)
        up_F = vector(gate_up, r * stride + width, width, like)
        out_F = vector(out, r * width, width, like)
        for i in range(width):
            out_F[i] = narrow(widen(narrow(_silu(widen(gate_F[i])), like)) * widen(up_F[i]), like)


@njit_parallel()
def _silu_mul(shares: Any, rows: Any, gate_up: Any, out: Any, width: Any, stride: Any, like: Any) -> None:
    if shares == 1:
        _silu_mul_rows(0, rows, gate_up, out, width, stride, like)
    else:
        for s in numba.prange(shares):
            _silu_mul_rows(s * rows // shares, (s + 1) * rows // shares, gate_up, out, width, stride, like)


def silu_mul_cpu(gate_up_R2F: Tensor) -> Tensor:
    """See `headrace.kernels.silu_mul.silu_mul`, which has checked the shape. A type of `cpu_types.TYPES`."""
    if gate_up_R2F.stride(1) != 1:
        gate_up_R2F = gate_up_R2F.contiguous()
    rows, columns = gate_up_R2F.shape
    width = columns // 2
    out_RF = gate_up_R2F.new_empty((rows, width))
    _silu_mul(
        shares_of(rows * width, _SERIAL_BELOW, rows),
        rows,
        gate_up_R2F.data_ptr(),
        out_RF.data_ptr(),
        width,
        gate_up_R2F.stride(0),
        LIKE[gate_up_R2F.dtype],
    )
    return out_RF
