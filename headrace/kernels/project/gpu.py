"""Linear maps of few rows of 16-bit numbers on a GPU: what `reference.py` defines, in one launch.

The launch follows from shapes alone and waits for nothing, so a step can be captured in a graph. On a chip that can
overlap launches (compute capability 9.0) it begins to fetch weights while the kernel before it still runs. Letters: R
rows, E inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_sizes import next_power, overlaps, processors, shared_bytes
from headrace.kernels.project.gpu_shape import (
    CACHE_LINE,
    MAX_ROWS,
    Chip,
    Product,
    Shape,
    block_rows,
    choose_shape,
)
from headrace.kernels.rms_norm.gpu import rms_norm_gpu

TYPES = (torch.bfloat16, torch.float16)
"""Element types that the kernels know."""

_counters: dict[tuple[torch.device, int], Tensor] = {}
"""By device and address of a weight, int32: how many splits of each block of results have arrived. Zero between
launches. One product with a weight runs at a time, as the layers of a model do; products with others may run beside it.
"""


def takes(
    x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, norm: tuple[Tensor, float] | None, *, gated: bool
) -> bool:
    """Whether the kernels are for these tensors: few rows, one 16-bit type, shapes that fit, weights in plain rows."""
    others = [weight_NE] if bias_N is None else [weight_NE, bias_N]
    if norm is not None:
        others.append(norm[0])
    return (
        x_RE.dtype in TYPES
        and x_RE.dim() == weight_NE.dim() == 2
        and 1 <= x_RE.shape[0] <= MAX_ROWS
        and 0 < x_RE.shape[1] == weight_NE.shape[1]
        and weight_NE.shape[0] > 0
        and weight_NE.stride(1) == 1
        and not (gated and weight_NE.shape[0] % 2)
        and (bias_N is None or bias_N.shape == weight_NE.shape[:1])
        and (norm is None or norm[0].shape == weight_NE.shape[1:])
        and all(other.dtype is x_RE.dtype and other.device == x_RE.device for other in others)
    )


def takes_onto(y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the kernels are for these tensors; see `takes`."""
    return (
        takes(x_RE, weight_NE, bias_N, None, gated=False)
        and y_RN.shape == (x_RE.shape[0], weight_NE.shape[0])
        and y_RN.dtype is x_RE.dtype
        and y_RN.device == x_RE.device
        and y_RN.stride(1) == 1
    )


def project_gpu(
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    shape: Shape | None = None,
) -> Tensor:
    """See `headrace.kernels.project.project`; `takes` has checked the tensors. `shape`: a cut other than the chosen."""
    shape = shape or shape_of(x_RE, weight_NE, gated=gated)
    if norm is not None and not shape.is_row:
        # Every program would have to find the scales of all rows.
        x_RE, norm = rms_norm_gpu(x_RE, *norm), None
    results = weight_NE.shape[0] // (2 if gated else 1)
    y_RN = x_RE.new_empty((x_RE.shape[0], results))
    _launch(y_RN, x_RE, weight_NE, bias_N, norm, shape, onto=False, gated=gated)
    return y_RN


def project_onto_gpu(
    y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None, *, shape: Shape | None = None
) -> None:
    """See `headrace.kernels.project.project_onto`; `takes_onto` has checked the tensors."""
    shape = shape or shape_of(x_RE, weight_NE, gated=False)
    _launch(y_RN, x_RE, weight_NE, bias_N, None, shape, onto=True, gated=False)


def shape_of(x_RE: Tensor, weight_NE: Tensor, *, gated: bool) -> Shape:
    """The cut that is chosen for a product; see `gpu_shape.choose_shape`."""
    chip = Chip(processors(x_RE.device), shared_bytes(x_RE.device))
    outputs, inputs = weight_NE.shape
    return choose_shape(Product(x_RE.shape[0], outputs, inputs, x_RE.dtype.itemsize, gated), chip)


def _launch(
    y_RN: Tensor,
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    norm: tuple[Tensor, float] | None,
    shape: Shape,
    *,
    onto: bool,
    gated: bool,
) -> None:
    from headrace.kernels.project.gpu_kernel import multiply_row, multiply_tile

    if x_RE.stride(1) != 1:
        x_RE = x_RE.contiguous()
    rows, results = y_RN.shape
    inputs = x_RE.shape[1]
    blocks = -(-results // shape.block_n)
    block_r = 1 if shape.is_row else block_rows(rows)
    parts, arrived_T = y_RN, y_RN  # a kernel wants a tensor for what it does not read
    if shape.splits > 1:
        floats = blocks * shape.splits * (2 if gated else 1) * shape.block_n * block_r
        parts = y_RN.new_empty(floats, dtype=torch.float32)
        arrived_T = _counters_of(weight_NE, blocks)
    overlap = overlaps(x_RE.device)
    bias = y_RN if bias_N is None else bias_N.contiguous()
    lines = shape.ahead_e * x_RE.dtype.itemsize // CACHE_LINE
    options = {
        "BLOCK_N": shape.block_n,
        "BLOCK_E": shape.block_e,
        "SPLITS": shape.splits,
        "AHEAD": next_power(lines + 1) // 2 * (CACHE_LINE // x_RE.dtype.itemsize) if overlap else 0,
        "EVEN": inputs % shape.block_e == 0,
        "HAS_BIAS": bias_N is not None,
        "ONTO": onto,
        "GATED": gated,
        "OVERLAP": overlap,
        "num_warps": shape.n_warps,
        "num_stages": shape.n_stages,
        "launch_pdl": overlap,
    }
    grid = (blocks, shape.splits)
    if shape.is_row:
        multiply_row[grid](
            y_RN,
            x_RE,
            weight_NE,
            bias,
            y_RN if norm is None else norm[0].contiguous(),
            parts,
            arrived_T,
            results,
            inputs,
            weight_NE.stride(0),
            0.0 if norm is None else norm[1],
            BLOCK_ALL=next_power(inputs),
            HAS_NORM=norm is not None,
            **options,
        )
    else:
        multiply_tile[grid](
            y_RN,
            x_RE,
            weight_NE,
            bias,
            parts,
            arrived_T,
            rows,
            results,
            inputs,
            weight_NE.stride(0),
            x_RE.stride(0),
            y_RN.stride(0),
            BLOCK_R=block_r,
            STAGES=shape.n_stages,
            **options,
        )


def _counters_of(weight_NE: Tensor, blocks: int) -> Tensor:
    """Zeros, one a block of results, that stay at their address."""
    key = (weight_NE.device, weight_NE.data_ptr())
    kept = _counters.get(key)
    if kept is None or kept.shape[0] < blocks:
        kept = torch.zeros(blocks, dtype=torch.int32, device=weight_NE.device)
        # What is made while a graph is recorded becomes zero in its replays only, so nobody else may use it.
        if not (weight_NE.is_cuda and torch.cuda.is_current_stream_capturing()):
            _counters[key] = kept
    return kept
