"""How numbers become 4-bit codes: to the nearest, or with the second moments of the inputs (GPTQ).

GPTQ (Frantar et al., arXiv 2210.17323) rounds one input after the other and moves what each rounding costs, as the
inverse of H = sum of x x^T says, to the weights of the inputs that are still to come. Letters: N outputs, E inputs,
G groups of inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01
"""What is added to the diagonal of H, in parts of its mean."""
BLOCK = 128
"""Inputs after which what they cost is moved to all inputs behind them."""


class Codes(NamedTuple):
    """Weights as (code - zero) * scale."""

    codes_EN: Tensor
    """uint8 0 .. 15, in the order of the checkpoint's inputs."""
    zeros_GN: Tensor
    """uint8 0 .. 15."""
    scales_GN: Tensor
    """float16."""
    g_idx_E: Tensor
    """Group of each input, int32."""


def _grid(weight_NB: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales (float16 values in float32) and zeros [N] that reach the weights of a group."""
    low_N, high_N = weight_NB.amin(1).clamp(max=0.0), weight_NB.amax(1).clamp(min=0.0)
    if symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    # float16's smallest normal number: a smaller scale would lose its digits.
    scale_N = ((high_N - low_N) / 15).clamp(min=2.0**-14).half().float()
    zero_N = torch.full_like(scale_N, 8.0) if symmetric else (-low_N / scale_N).round().clamp(0, 15)
    return scale_N, zero_N


def round_int4(
    weight_NE: Tensor, group: int, *, symmetric: bool, moments_EE: Tensor | None = None, ordered: bool = False
) -> Codes:
    """Codes of a weight.

    Args:
        weight_NE: float [N, E].
        group: inputs of a group.
        symmetric: zeros are 8; else they are where the group's range asks for them.
        moments_EE: sum of x x^T over calibration rows, or None: every weight goes to the nearest code.
        ordered: with moments, inputs are rounded, and put into groups, by falling second moment (`desc_act`).
    """
    weight_NE = weight_NE.float().clone()
    outputs, inputs = weight_NE.shape
    groups = -(-inputs // group)
    order_E = torch.arange(inputs)
    upper_EE = None
    if moments_EE is not None:
        moments_EE = moments_EE.double()
        unseen_E = moments_EE.diagonal() == 0
        moments_EE = moments_EE + torch.diag(unseen_E.double() + DAMPING * moments_EE.diagonal().mean())
        if ordered:
            order_E = moments_EE.diagonal().argsort(descending=True, stable=True)
        moments_EE = moments_EE[order_E][:, order_E]
        inverse_EE = torch.cholesky_inverse(torch.linalg.cholesky(moments_EE))
        upper_EE = torch.linalg.cholesky(inverse_EE, upper=True).float()
    weight_NE = weight_NE[:, order_E]
    codes_EN = torch.empty(inputs, outputs, dtype=torch.uint8)
    zeros_GN, scales_GN = torch.empty(groups, outputs), torch.empty(groups, outputs)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        cost_NB = torch.zeros(outputs, end - start)
        for e in range(start, end):
            g = e // group
            if e % group == 0:
                # Costs of earlier inputs of this block have been moved as far as the block only.
                part_NB = weight_NE[:, e : (g + 1) * group].clone()
                if upper_EE is not None and e + group > end:
                    part_NB[:, end - e :] -= cost_NB @ upper_EE[start:end, end : (g + 1) * group]
                scales_GN[g], zeros_GN[g] = _grid(part_NB, symmetric)
            w_N = weight_NE[:, e]
            code_N = ((w_N / scales_GN[g]).round() + zeros_GN[g]).clamp(0, 15)
            codes_EN[e] = code_N.to(torch.uint8)
            if upper_EE is not None:
                cost_N = (w_N - (code_N - zeros_GN[g]) * scales_GN[g]) / upper_EE[e, e]
                weight_NE[:, e:end] -= cost_N[:, None] * upper_EE[e, e:end]
                cost_NB[:, e - start] = cost_N
        if upper_EE is not None:
            weight_NE[:, end:] -= cost_NB @ upper_EE[start:end, end:]
    g_idx_E = torch.empty(inputs, dtype=torch.int32)
    g_idx_E[order_E] = (torch.arange(inputs) // group).int()
    placed_EN = torch.empty_like(codes_EN)
    placed_EN[order_E] = codes_EN
    return Codes(placed_EN, zeros_GN.to(torch.uint8), scales_GN.half(), g_idx_E)
