"""4-bit linear maps on the CPU, compiled. The weights stay packed: a row reads them once, as they are.

Few rows: a thread walks over its outputs in blocks that stay in its first-level cache, word by word,

    y_rn = sum_g scale_gn (sum_{e in g} x_re code_en - zero_gn sum_{e in g} x_re)

Many rows: a block of outputs at a time becomes float32, and the library multiplies it. A sum's order depends on
E and the form only. Letters: see the reference.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu_elements import apart, shares_of, vector
from headrace.kernels.cpu_runtime import FAST_SUMS, njit_parallel, njit_serial
from headrace.kernels.project_int4.reference import CODES

FEW_ROWS = 8
"""Rows up to which weights are multiplied as they are unpacked."""
BLOCK_N = 512
"""Outputs of a block of few rows."""
DENSE_BYTES = 2**23
"""Bytes of the block of dense weights that many rows are multiplied with."""
# Below this many weights a second thread costs more to wake than it saves.
_SERIAL_BELOW = 200_000

_INT, _FLOAT, _BYTE = np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.uint8)
_F0 = np.float32(0.0)
_15 = np.int32(15)


@njit_serial(fastmath=FAST_SUMS)
def _few(first: Any, last: Any, rows: Any, io: Any, shape: Any) -> None:
    """Outputs [first, last). `io`: addresses of x, words, zeros, scales, y; `shape`: words, outputs, their rows'
    strides, words of a group."""
    apart()
    x, words, zeros, scales, y = io
    n_words, outputs, words_row, zeros_row, scales_row, group = shape
    part_RB = np.empty((rows, BLOCK_N), np.float32)
    for start in range(first, last, BLOCK_N):
        size = min(BLOCK_N, last - start)
        for r in range(rows):
            y_B = vector(y, r * outputs + start, size, _FLOAT)
            for n in range(size):
                y_B[n] = _F0
        for g in range((n_words + group - 1) // group):
            begin = g * group
            end = min(begin + group, n_words)
            for r in range(rows):
                for n in range(size):
                    part_RB[r, n] = _F0
            for w in range(begin, end):
                word_B = vector(words, w * words_row + start, size, _INT)
                for r in range(rows):
                    x_8 = vector(x, (r * n_words + w) * CODES, CODES, _FLOAT)
                    x0, x1, x2, x3 = x_8[0], x_8[1], x_8[2], x_8[3]
                    x4, x5, x6, x7 = x_8[4], x_8[5], x_8[6], x_8[7]
                    part_B = part_RB[r]
                    for n in range(size):
                        c = word_B[n]
                        part_B[n] += (
                            x0 * np.float32(c & _15)
                            + x1 * np.float32((c >> np.int32(4)) & _15)
                            + x2 * np.float32((c >> np.int32(8)) & _15)
                            + x3 * np.float32((c >> np.int32(12)) & _15)
                            + x4 * np.float32((c >> np.int32(16)) & _15)
                            + x5 * np.float32((c >> np.int32(20)) & _15)
                            + x6 * np.float32((c >> np.int32(24)) & _15)
                            + x7 * np.float32((c >> np.int32(28)) & _15)
                        )
            zero_B = vector(zeros, g * zeros_row + start, size, _BYTE)
            scale_B = vector(scales, g * scales_row + start, size, _FLOAT)
            for r in range(rows):
                x_I = vector(x, (r * n_words + begin) * CODES, (end - begin) * CODES, _FLOAT)
                total = _F0
                for i in range(len(x_I)):
                    total += x_I[i]
                y_B = vector(y, r * outputs + start, size, _FLOAT)
                part_B = part_RB[r]
                for n in range(size):
                    y_B[n] += scale_B[n] * (part_B[n] - np.float32(zero_B[n]) * total)


@njit_parallel()
def _few_shared(shares: Any, rows: Any, io: Any, shape: Any) -> None:
    outputs = shape[1]
    if shares == 1:
        _few(0, outputs, rows, io, shape)
    else:
        for s in numba.prange(shares):
            _few(s * outputs // shares, (s + 1) * outputs // shares, rows, io, shape)


@njit_serial(fastmath=FAST_SUMS)
def _unpack(begin: Any, end: Any, start: Any, size: Any, io: Any, shape: Any) -> None:
    """Words [begin, end) of outputs [start, start + size) as float32 weights."""
    apart()
    words, zeros, scales, dense = io
    words_row, zeros_row, scales_row, group = shape
    for w in range(begin, end):
        g = w // group
        word_B = vector(words, w * words_row + start, size, _INT)
        zero_B = vector(zeros, g * zeros_row + start, size, _BYTE)
        scale_B = vector(scales, g * scales_row + start, size, _FLOAT)
        for i in range(CODES):
            dense_B = vector(dense, (w * CODES + i) * size, size, _FLOAT)
            shift = np.int32(4 * i)
            for n in range(size):
                code = (word_B[n] >> shift) & _15
                dense_B[n] = np.float32(code - np.int32(zero_B[n])) * scale_B[n]


@njit_parallel()
def _unpack_shared(shares: Any, n_words: Any, start: Any, size: Any, io: Any, shape: Any) -> None:
    if shares == 1:
        _unpack(0, n_words, start, size, io, shape)
    else:
        for s in numba.prange(shares):
            _unpack(s * n_words // shares, (s + 1) * n_words // shares, start, size, io, shape)


def takes(words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, group: int) -> bool:
    """Whether the compiled form knows the layout; all else is the reference's."""
    rows_apart = words_WN.stride(1) == zeros_GN.stride(1) == scales_GN.stride(1) == 1
    return rows_apart and scales_GN.dtype == torch.float32 and not group % CODES


def project_int4_cpu(x_RE: Tensor, words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, group: int) -> Tensor:
    """See `headrace.kernels.project_int4.project_int4`; `takes` has agreed. Sums are float32."""
    (rows, inputs), (n_words, outputs) = x_RE.shape, words_WN.shape
    y_RN = torch.empty(rows, outputs)
    if not y_RN.numel():
        return y_RN.to(x_RE.dtype)
    x = x_RE.float()
    if inputs < n_words * CODES:
        x = torch.nn.functional.pad(x, (0, n_words * CODES - inputs))
    x = x.contiguous()
    strides = (words_WN.stride(0), zeros_GN.stride(0), scales_GN.stride(0))
    weights = (words_WN.data_ptr(), zeros_GN.data_ptr(), scales_GN.data_ptr())
    if rows <= FEW_ROWS:
        shares = shares_of(n_words * outputs * CODES, _SERIAL_BELOW, max(outputs // 64, 1))
        io = (x.data_ptr(), *weights, y_RN.data_ptr())
        _few_shared(shares, rows, io, (n_words, outputs, *strides, group // CODES))
        return y_RN.to(x_RE.dtype)
    width = max(DENSE_BYTES // (n_words * CODES * 4) // 16 * 16, 16)
    for start in range(0, outputs, width):
        size = min(width, outputs - start)
        dense_EB = torch.empty(n_words * CODES, size)
        shares = shares_of(dense_EB.numel(), _SERIAL_BELOW, n_words)
        _unpack_shared(shares, n_words, start, size, (*weights, dense_EB.data_ptr()), (*strides, group // CODES))
        torch.mm(x, dense_EB, out=y_RN[:, start : start + size])
    return y_RN.to(x_RE.dtype)
