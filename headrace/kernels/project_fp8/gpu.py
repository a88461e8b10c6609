"""8-bit linear maps on a GPU: codes become weights in registers.

Codes are decoded by their bits, so that GPUs without 8-bit floats run it too: shifted, they are a float16 whose
exponent's bias is 8 too large. Which kernel runs: see `gpu_coded`. Letters: see the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_coded import BLOCK_N, TYPES, Coded, multiply_coded
from headrace.kernels.gpu_runtime import tl, triton

_BLOCK_E = 128
_WIDE_BLOCK_E = 32
"""Of float32, which takes more registers."""
_ROW_BLOCK_E, _ROW_BLOCK_N = 256, 32


@triton.jit
def _weights(codes, scales, n_N, e_E, is_N, is_E, codes_row, groups, group):
    """A tile of weights [N, E] in float32; 0 outside."""
    mask = is_N[:, None] & is_E[None, :]
    n64_N = n_N.to(tl.int64)
    code_NE = tl.load(codes + n64_N[:, None] * codes_row + e_E[None, :], mask=mask, other=0).to(tl.uint16)
    half_NE = (((code_NE & 0x80) << 8) | ((code_NE & 0x7F) << 7)).to(tl.float16, bitcast=True)
    scale_NE = tl.load(scales + n64_N[:, None] * groups + (e_E // group)[None, :], mask=mask, other=0.0)
    return half_NE.to(tl.float32) * 256.0 * scale_NE


@triton.jit
def fp8_row(
    x_RE,
    codes,
    scales,
    y_RN,
    inputs,
    outputs,
    x_row,
    codes_row,
    groups,
    group,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row a program and block of outputs: multiply and sum."""
    row = tl.program_id(1).to(tl.int64)
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_N = n_N < outputs
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        is_E = e_E < inputs
        x_E = tl.load(x_RE + row * x_row + e_E, mask=is_E, other=0.0).to(tl.float32)
        w_NE = _weights(codes, scales, n_N, e_E, is_N, is_E, codes_row, groups, group)
        sum_N += tl.sum(x_E[None, :] * w_NE.to(x_RE.dtype.element_ty).to(tl.float32), 1)
    tl.store(y_RN + row * outputs + n_N, sum_N.to(y_RN.dtype.element_ty), mask=is_N)


@triton.jit
def fp8_tile(
    x_RE,
    codes,
    scales,
    y_RN,
    rows,
    inputs,
    outputs,
    x_row,
    codes_row,
    groups,
    group,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Up to BLOCK_R rows and a block of outputs: the tensor cores multiply."""
    r_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_R = r_R < rows
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_N = n_N < outputs
    x_at = x_RE + r_R.to(tl.int64)[:, None] * x_row
    sum_RN = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_E):
        e_E = start + tl.arange(0, BLOCK_E)
        is_E = e_E < inputs
        tile_RE = tl.load(x_at + e_E[None, :], mask=is_R[:, None] & is_E[None, :], other=0.0)
        w_NE = _weights(codes, scales, n_N, e_E, is_N, is_E, codes_row, groups, group)
        w_EN = tl.trans(w_NE.to(x_RE.dtype.element_ty))
        sum_RN = tl.dot(tile_RE, w_EN, sum_RN, input_precision="ieee")
    y_at = y_RN + r_R.to(tl.int64)[:, None] * outputs + n_N[None, :]
    tl.store(y_at, sum_RN.to(y_RN.dtype.element_ty), mask=is_R[:, None] & is_N[None, :])


@triton.jit
def fp8_unpack(
    dense_NE, codes, scales, inputs, outputs, codes_row, groups, group, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A tile of weights to memory."""
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_E, is_N = e_E < inputs, n_N < outputs
    w_NE = _weights(codes, scales, n_N, e_E, is_N, is_E, codes_row, groups, group)
    at_NE = dense_NE + n_N.to(tl.int64)[:, None] * inputs + e_E[None, :]
    tl.store(at_NE, w_NE.to(dense_NE.dtype.element_ty), mask=is_N[:, None] & is_E[None, :])


def project_fp8_gpu(x_RE: Tensor, codes_NE: Tensor, scales_NG: Tensor, group: int) -> Tensor:
    """See `headrace.kernels.project_fp8.project_fp8`. Raises ValueError for types and strides it does not know."""
    if x_RE.dtype not in TYPES:
        raise ValueError(f"8-bit weights on a GPU take {', '.join(map(str, TYPES))}, not {x_RE.dtype}")
    if codes_NE.stride(1) != 1 or not scales_NG.is_contiguous():
        raise ValueError(f"codes have strides {codes_NE.stride()}: inputs must be neighbours")
    inputs, (outputs, groups) = x_RE.shape[1], scales_NG.shape
    codes = codes_NE.view(torch.uint8)
    last = (codes.stride(0), groups, group)

    def row(grid: tuple[int, int], x: Tensor, y_RN: Tensor, block_n: int) -> None:
        options = {"BLOCK_E": _ROW_BLOCK_E, "BLOCK_N": block_n, "num_warps": 4}
        fp8_row[grid](x, codes, scales_NG, y_RN, inputs, outputs, x.stride(0), *last, **options)

    def tile(grid: tuple[int, int], x: Tensor, y_RN: Tensor, block_r: int, block_n: int) -> None:
        block_e = _BLOCK_E if x.element_size() == 2 else _WIDE_BLOCK_E
        options = {"BLOCK_R": block_r, "BLOCK_E": block_e, "BLOCK_N": block_n, "num_warps": 4}
        fp8_tile[grid](x, codes, scales_NG, y_RN, x.shape[0], inputs, outputs, x.stride(0), *last, **options)

    def dense(first: int, size: int) -> Tensor:
        dense_BE = x_RE.new_empty(size, inputs)
        parts = [part[first : first + size] for part in (codes, scales_NG)]
        grid = (-(-inputs // _BLOCK_E), -(-size // BLOCK_N))
        fp8_unpack[grid](dense_BE, *parts, inputs, size, *last, BLOCK_E=_BLOCK_E, BLOCK_N=BLOCK_N, num_warps=4)
        return dense_BE.t()

    return multiply_coded(x_RE, outputs, Coded(row, tile, dense, _ROW_BLOCK_N))
