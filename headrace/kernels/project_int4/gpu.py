"""4-bit linear maps on a GPU: codes become weights in registers.

One row: outer products. Several: tiles for the tensor cores. Many: see `gpu_coded`. Letters: see the reference.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.gpu_coded import BLOCK_N, TYPES, Coded, multiply_coded
from headrace.kernels.gpu_runtime import tl, triton

_BLOCK_E = 64
_ROW_BLOCK_E, _ROW_BLOCK_N = 128, 64


@triton.jit
def _weights(words, zeros, scales, e_E, n_N, is_E, is_N, words_row, zeros_row, scales_row, group):
    """A tile of weights [E, N] in float32; 0 outside."""
    mask = is_E[:, None] & is_N[None, :]
    word_EN = tl.load(words + (e_E // 8).to(tl.int64)[:, None] * words_row + n_N[None, :], mask=mask, other=0)
    code_EN = (word_EN >> ((e_E % 8) * 4)[:, None]) & 15
    g_E = (e_E // group).to(tl.int64)
    zero_EN = tl.load(zeros + g_E[:, None] * zeros_row + n_N[None, :], mask=mask, other=0)
    scale_EN = tl.load(scales + g_E[:, None] * scales_row + n_N[None, :], mask=mask, other=0.0)
    return (code_EN - zero_EN.to(tl.int32)).to(tl.float32) * scale_EN


@triton.jit
def int4_row(
    x_RE,
    words,
    zeros,
    scales,
    y_RN,
    inputs,
    outputs,
    x_row,
    words_row,
    zeros_row,
    scales_row,
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
        w_EN = _weights(words, zeros, scales, e_E, n_N, is_E, is_N, words_row, zeros_row, scales_row, group)
        sum_N += tl.sum(x_E[:, None] * w_EN.to(x_RE.dtype.element_ty).to(tl.float32), 0)
    tl.store(y_RN + row * outputs + n_N, sum_N.to(y_RN.dtype.element_ty), mask=is_N)


@triton.jit
def int4_tile(
    x_RE,
    words,
    zeros,
    scales,
    y_RN,
    rows,
    inputs,
    outputs,
    x_row,
    words_row,
    zeros_row,
    scales_row,
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
        w_EN = _weights(words, zeros, scales, e_E, n_N, is_E, is_N, words_row, zeros_row, scales_row, group)
        sum_RN = tl.dot(tile_RE, w_EN.to(x_RE.dtype.element_ty), sum_RN, input_precision="ieee")
    y_at = y_RN + r_R.to(tl.int64)[:, None] * outputs + n_N[None, :]
    tl.store(y_at, sum_RN.to(y_RN.dtype.element_ty), mask=is_R[:, None] & is_N[None, :])


@triton.jit
def int4_unpack(
    dense_EN,
    words,
    zeros,
    scales,
    inputs,
    outputs,
    words_row,
    zeros_row,
    scales_row,
    group,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of weights to memory."""
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_E, is_N = e_E < inputs, n_N < outputs
    w_EN = _weights(words, zeros, scales, e_E, n_N, is_E, is_N, words_row, zeros_row, scales_row, group)
    at_EN = dense_EN + e_E.to(tl.int64)[:, None] * outputs + n_N[None, :]
    tl.store(at_EN, w_EN.to(dense_EN.dtype.element_ty), mask=is_E[:, None] & is_N[None, :])


def project_int4_gpu(x_RE: Tensor, words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, group: int) -> Tensor:
    """See `headrace.kernels.project_int4.project_int4`. Raises ValueError for types and strides it does not know."""
    if x_RE.dtype not in TYPES:
        raise ValueError(f"4-bit weights on a GPU take {', '.join(map(str, TYPES))}, not {x_RE.dtype}")
    if not words_WN.stride(1) == zeros_GN.stride(1) == scales_GN.stride(1) == 1:
        raise ValueError(f"words have strides {words_WN.stride()}: outputs must be neighbours")
    inputs, outputs = x_RE.shape[1], words_WN.shape[1]
    weights = (words_WN, zeros_GN, scales_GN)
    last = (words_WN.stride(0), zeros_GN.stride(0), scales_GN.stride(0), group)

    def row(grid: tuple[int, int], x: Tensor, y_RN: Tensor, block_n: int) -> None:
        options = {"BLOCK_E": _ROW_BLOCK_E, "BLOCK_N": block_n, "num_warps": 4}
        int4_row[grid](x, *weights, y_RN, inputs, outputs, x.stride(0), *last, **options)

    def tile(grid: tuple[int, int], x: Tensor, y_RN: Tensor, block_r: int, block_n: int) -> None:
        options = {"BLOCK_R": block_r, "BLOCK_E": _BLOCK_E, "BLOCK_N": block_n, "num_warps": 4}
        int4_tile[grid](x, *weights, y_RN, x.shape[0], inputs, outputs, x.stride(0), *last, **options)

    def dense(first: int, size: int) -> Tensor:
        dense_EB = x_RE.new_empty(inputs, size)
        parts = [weight[:, first : first + size] for weight in weights]
        grid = (-(-inputs // _BLOCK_E), -(-size // BLOCK_N))
        int4_unpack[grid](dense_EB, *parts, inputs, size, *last, BLOCK_E=_BLOCK_E, BLOCK_N=BLOCK_N, num_warps=4)
        return dense_EB

    return multiply_coded(x_RE, outputs, Coded(row, tile, dense, _ROW_BLOCK_N))
