"""8-bit linear maps on the CPU, compiled. The weights stay as they are in memory.

Few rows: a thread takes an output, turns its codes into float32 in its first-level cache, and multiplies every row with
them. Many rows: a block of outputs at a time becomes float32, and the library multiplies it. A sum's order depends on E
and the form only. Letters: see the reference.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu_elements import apart, shares_of, vector
from headrace.kernels.cpu_runtime import FAST_SUMS, njit_parallel, njit_serial

FEW_ROWS = 4
"""Rows up to which weights are multiplied as they are decoded."""
DENSE_BYTES = 2**23
"""Bytes of the block of dense weights that many rows are multiplied with."""
# Below this many weights a second thread costs more to wake than it saves.
_SERIAL_BELOW = 200_000

_FLOAT, _BYTE = np.zeros(1, np.float32), np.zeros(1, np.uint8)
_F0 = np.float32(0.0)
_F2 = np.float32(2.0)
_SMALL = np.float32(2.0**-6)
_SIGN, _REST, _EXPONENT = np.uint32(0x80), np.uint32(0x7F), np.uint32(0x78)
_BIAS = np.uint32(120 << 23)


@njit_serial()
def decode(byte: Any) -> Any:
    """The float32 of an E4M3 code that is no NaN.

    Its bits go to a float32's with the exponent's bias corrected. An exponent of 0 has no leading one: then m / 8 is
    wanted of 1 + m / 8, at twice the scale.
    """
    c = np.uint32(byte)
    normal = np.uint32(((c & _REST) << np.uint32(20)) + _BIAS).view(np.float32)
    size = _F2 * normal - _SMALL if (c & _EXPONENT) == np.uint32(0) else normal
    return -size if (c & _SIGN) != np.uint32(0) else size


@njit_serial(fastmath=FAST_SUMS)
def _decode_row(codes_E: Any, scales_G: Any, group: Any, w_E: Any) -> None:
    apart()
    for g in range(len(scales_G)):
        scale = scales_G[g]
        for e in range(g * group, min((g + 1) * group, len(codes_E))):
            w_E[e] = decode(codes_E[e]) * scale


@njit_serial(fastmath=FAST_SUMS)
def _few(first: Any, last: Any, rows: Any, io: Any, shape: Any) -> None:
    """Outputs [first, last). `io`: addresses of x, codes, scales, y; `shape`: inputs, outputs, stride of x, groups,
    inputs of a group."""
    apart()
    x, codes, scales, y = io
    inputs, outputs, x_row, groups, group = shape
    w_E = np.empty(inputs, np.float32)
    for n in range(first, last):
        _decode_row(vector(codes, n * inputs, inputs, _BYTE), vector(scales, n * groups, groups, _FLOAT), group, w_E)
        for r in range(rows):
            x_E = vector(x, r * x_row, inputs, _FLOAT)
            total = _F0
            for e in range(inputs):
                total += x_E[e] * w_E[e]
            vector(y, r * outputs + n, 1, _FLOAT)[0] = total


@njit_parallel()
def _few_shared(shares: Any, rows: Any, io: Any, shape: Any) -> None:
    outputs = shape[1]
    if shares == 1:
        _few(0, outputs, rows, io, shape)
    else:
        for s in numba.prange(shares):
            _few(s * outputs // shares, (s + 1) * outputs // shares, rows, io, shape)


@njit_serial()
def _unpack(first: Any, last: Any, io: Any, shape: Any) -> None:
    codes, scales, dense = io
    start, inputs, groups, group = shape
    for b in range(first, last):
        n = start + b
        _decode_row(
            vector(codes, n * inputs, inputs, _BYTE),
            vector(scales, n * groups, groups, _FLOAT),
            group,
            vector(dense, b * inputs, inputs, _FLOAT),
        )


@njit_parallel()
def _unpack_shared(shares: Any, size: Any, io: Any, shape: Any) -> None:
    if shares == 1:
        _unpack(0, size, io, shape)
    else:
        for s in numba.prange(shares):
            _unpack(s * size // shares, (s + 1) * size // shares, io, shape)


def takes(codes_NE: Tensor, scales_NG: Tensor) -> bool:
    """Whether the compiled form knows the layout; all else is the reference's."""
    return codes_NE.is_contiguous() and scales_NG.is_contiguous() and scales_NG.dtype == torch.float32


def project_fp8_cpu(x_RE: Tensor, codes_NE: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """See `headrace.kernels.project_fp8.project_fp8`; `takes` has agreed. Sums are float32."""
    (rows, inputs), (outputs, groups) = x_RE.shape, scales_NG.shape
    y_RN = torch.empty(rows, outputs)
    if not y_RN.numel():
        return y_RN.to(x_RE.dtype)
    x = x_RE.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    weights = (codes_NE.data_ptr(), scales_NG.data_ptr())
    if rows <= FEW_ROWS:
        shares = shares_of(codes_NE.numel(), _SERIAL_BELOW, outputs)
        shape = (inputs, outputs, x.stride(0), groups, group)
        _few_shared(shares, rows, (x.data_ptr(), *weights, y_RN.data_ptr()), shape)
        return y_RN.to(x_RE.dtype)
    width = max(DENSE_BYTES // (inputs * 4) // 16 * 16, 16)
    for start in range(0, outputs, width):
        size = min(width, outputs - start)
        dense_BE = torch.empty(size, inputs)
        shares = shares_of(dense_BE.numel(), _SERIAL_BELOW, size)
        _unpack_shared(shares, size, (*weights, dense_BE.data_ptr()), (start, inputs, groups, group))
        torch.mm(x, dense_BE.t(), out=y_RN[:, start : start + size])
    return y_RN.to(x_RE.dtype)
