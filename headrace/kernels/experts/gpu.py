"""Products with picked experts on a GPU: one launch for all experts, over tiles of pairs that share one.

How many tiles an expert has is only known to the device, so that the launch is for as many as there can be at most;
those behind the last do nothing. A pair's result does not depend on which pairs share its tile. Letters: see the
package; T tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.gpu_sizes import next_power

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernel knows."""
_FEW, _MANY = 16, 64
"""Pairs of a tile, where experts have few of them on average and where they have many."""
_BLOCK_O, _BLOCK_I = 64, 64


class Tiles(NamedTuple):
    """Pairs cut into tiles of one expert each, all int32 but the order."""

    order_P: Tensor
    """The pairs in the order of their experts, int64."""
    expert_T: Tensor
    """Expert of each tile; N behind the last tile."""
    first_T: Tensor
    """Its first place in the order."""
    end_T: Tensor
    """The place behind its last one."""
    size: int
    """Pairs of a tile at most."""
    experts: int


def list_tiles(pick_P: Tensor, experts: int) -> Tiles:
    """Sort the pairs by expert and cut them into tiles. Nobody waits for the device."""
    pairs = len(pick_P)
    size = _MANY if pairs >= _MANY * experts else _FEW
    most = min(pairs // size + min(experts, pairs), pairs) if pairs else 0
    sorted_P, order_P = pick_P.sort(stable=True)
    edge_N1 = torch.arange(experts + 1, device=pick_P.device)
    start_N1 = torch.searchsorted(sorted_P, edge_N1)
    count_N = start_N1.diff()
    behind_N = torch.div(count_N + size - 1, size, rounding_mode="floor").cumsum(0)
    tile_T = torch.arange(most, device=pick_P.device)
    expert_T = torch.searchsorted(behind_N, tile_T, right=True)
    mine_T = expert_T.clamp(max=experts - 1)
    before_T = behind_N[mine_T] - torch.div(count_N[mine_T] + size - 1, size, rounding_mode="floor")
    first_T = start_N1[mine_T] + (tile_T - before_T) * size
    end_T = torch.minimum(first_T + size, start_N1[mine_T + 1])
    return Tiles(order_P, expert_T.int(), first_T.int(), end_T.int(), size, experts)


@triton.jit(do_not_specialize=["experts"])
def multiply_experts(
    x_RI,
    weight_NOI,
    bias_NO,
    y_PO,
    order_P,
    expert_T,
    first_T,
    end_T,
    experts,
    share,
    inputs,
    outputs,
    x_row,
    weight_expert,
    weight_row,
    SIZE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(expert_T + tile).to(tl.int64)
    if expert < experts:
        place_P = tl.load(first_T + tile) + tl.arange(0, SIZE)
        here_P = place_P < tl.load(end_T + tile)
        pair_P = tl.load(order_P + place_P, mask=here_P, other=0).to(tl.int64)
        o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output = o_O < outputs
        x_at = x_RI + (pair_P // share)[:, None] * x_row
        weight_at = weight_NOI + expert * weight_expert + o_O[None, :].to(tl.int64) * weight_row
        sum_PO = tl.zeros([SIZE, BLOCK_O], tl.float32)
        for start in range(0, inputs, BLOCK_I):
            i_I = start + tl.arange(0, BLOCK_I)
            is_input = i_I < inputs
            x_PI = tl.load(x_at + i_I[None, :], mask=here_P[:, None] & is_input[None, :], other=0.0)
            weight_IO = tl.load(weight_at + i_I[:, None], mask=is_input[:, None] & is_output[None, :], other=0.0)
            sum_PO = tl.dot(x_PI, weight_IO, sum_PO, input_precision=PRECISION)
        element = y_PO.dtype.element_ty
        if HAS_BIAS:
            bias_O = tl.load(bias_NO + expert * outputs + o_O, mask=is_output, other=0.0).to(tl.float32)
            sum_PO += bias_O[None, :]
        y_at = y_PO + pair_P[:, None] * outputs + o_O[None, :]
        tl.store(y_at, sum_PO.to(element), mask=here_P[:, None] & is_output[None, :])


def multiply_tiles(tiles: Tiles, x_RI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, share: int) -> Tensor:
    """See `headrace.kernels.experts.multiply_picked`. Raises ValueError for types and strides it does not know."""
    outputs, inputs = weight_NOI.shape[1:]
    y_PO = x_RI.new_empty(len(tiles.order_P), outputs)
    if not len(tiles.expert_T):
        return y_PO
    if x_RI.dtype not in TYPES:
        raise ValueError(f"experts on a GPU take {', '.join(map(str, TYPES))}, not {x_RI.dtype}")
    if x_RI.stride(1) != 1:
        x_RI = x_RI.contiguous()
    if weight_NOI.stride(2) != 1:
        raise ValueError(f"weights have strides {weight_NOI.stride()}: inputs must be neighbours")
    block_o = min(max(next_power(outputs), 16), _BLOCK_O)
    multiply_experts[(len(tiles.expert_T), -(-outputs // block_o))](
        x_RI,
        weight_NOI,
        y_PO if bias_NO is None else bias_NO.contiguous(),
        y_PO,
        tiles.order_P,
        tiles.expert_T,
        tiles.first_T,
        tiles.end_T,
        tiles.experts,
        share,
        inputs,
        outputs,
        x_RI.stride(0),
        weight_NOI.stride(0),
        weight_NOI.stride(1),
        SIZE=tiles.size,
        BLOCK_O=block_o,
        BLOCK_I=_BLOCK_I,
        HAS_BIAS=bias_NO is not None,
        PRECISION="ieee",
        num_warps=4,
    )
    return y_PO
