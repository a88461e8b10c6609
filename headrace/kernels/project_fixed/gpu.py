"""Linear maps with a fixed order of sums on a GPU: what `reference.py` defines, by the kernel of `gpu_kernel.py`.

Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_sizes import overlaps
from headrace.kernels.project_fixed.gpu_shape import FEW_ROWS, GRAIN_E, Shape, choose_shape

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernel knows."""

_counters: dict[tuple[torch.device, int], Tensor] = {}
"""By device and address of a weight: how many splits of each tile have arrived, 0 between launches."""


def multiply_gpu(
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None,
    onto_RN: Tensor | None,
    *,
    shape: Shape | None = None,
) -> Tensor:
    """x W^T + b, or `onto` += that. Shapes have been checked; one type of `TYPES`. `shape`: a cut to try."""
    from headrace.kernels.project_fixed.gpu_kernel import multiply_fixed

    if x_RE.stride(1) != 1:
        x_RE = x_RE.contiguous()
    if weight_NE.stride(1) != 1:
        weight_NE = weight_NE.contiguous()
    rows, inputs = x_RE.shape
    outputs = weight_NE.shape[0]
    y_RN = x_RE.new_empty(rows, outputs) if onto_RN is None else onto_RN
    out_RN = y_RN if y_RN.stride(1) == 1 else y_RN.contiguous()
    if not out_RN.numel():
        return y_RN
    shape = shape or choose_shape(rows, outputs, inputs, x_RE.dtype.itemsize)
    tiles = -(-rows // shape.block_r) * -(-outputs // shape.block_n)
    share = -(-inputs // (shape.splits * GRAIN_E)) * GRAIN_E
    overlap = overlaps(x_RE.device)
    parts, arrived_T = out_RN, out_RN  # a kernel wants a tensor for what it does not read
    if shape.apart:
        floats = tiles * shape.splits * shape.block_r * shape.block_n
        parts = out_RN.new_empty(floats, dtype=torch.float32)
        # For the most rows that come in splits: what is recorded in a graph keeps its address.
        arrived_T = _counters_of(weight_NE, max(tiles, -(-FEW_ROWS // shape.block_r) * -(-outputs // shape.block_n)))
    multiply_fixed[(tiles, shape.splits if shape.apart else 1)](
        out_RN,
        x_RE,
        weight_NE,
        out_RN if bias_N is None else bias_N.contiguous(),
        parts,
        arrived_T,
        rows,
        outputs,
        inputs,
        share,
        out_RN.stride(0),
        x_RE.stride(0),
        weight_NE.stride(0),
        BLOCK_R=shape.block_r,
        BLOCK_N=shape.block_n,
        BLOCK_E=shape.block_e,
        SPLITS=shape.splits,
        APART=shape.apart,
        GROUP_R=shape.group_r,
        EVEN=inputs % shape.block_e == 0,
        HAS_BIAS=bias_N is not None,
        ONTO=onto_RN is not None,
        AHEAD=shape.ahead_e,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=shape.n_warps,
        num_stages=shape.n_stages,
    )
    if out_RN is not y_RN:
        y_RN.copy_(out_RN)
    return y_RN


def _counters_of(weight_NE: Tensor, tiles: int) -> Tensor:
    """Zeros, one a tile of results, that stay at their address."""
    key = (weight_NE.device, weight_NE.data_ptr())
    kept = _counters.get(key)
    if kept is None or kept.shape[0] < tiles:
        kept = torch.zeros(tiles, dtype=torch.int32, device=weight_NE.device)
        # What is made while a graph is recorded becomes zero in its replays only, so nobody else may use it.
        if not (weight_NE.is_cuda and torch.cuda.is_current_stream_capturing()):
            _counters[key] = kept
    return kept
