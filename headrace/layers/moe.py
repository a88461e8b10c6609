"""Mixture of experts: each row goes through a few of many feed-forward layers (Shazeer et al., arXiv 1701.06538).

A router scores the experts of a row, the best are picked, and what they bring is summed with their weights:
Mixtral (arXiv 2401.04088), Qwen3-MoE (arXiv 2505.09388), gpt-oss, DeepSeek-V2 and V3 with groups of experts and experts
that every row goes through (arXiv 2405.04434, 2412.19437). Letters: R rows, E model width, F feed-forward width of an
expert, N experts, K picked for a row, P = R K pairs of rows and experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.kernels.experts import multiply_picked, plan_experts
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from headrace.layers.mlp import GatedMLP
from headrace.layers.placement import Placement, cut


@dataclass(frozen=True)
class Routing:
    """How experts are picked and weighted."""

    experts: int
    picked: int
    score: str = "softmax"
    """`softmax`: over all experts; `softmax_of_picked`: over the logits of those picked; `sigmoid`: each for itself."""
    normalise: bool = False
    """Weights of a row are divided by their sum."""
    scale: float = 1.0
    """Factor of the weights."""
    groups: int = 1
    picked_groups: int = 1
    """Experts are picked from the best groups only."""
    group_score: str = "max"
    """Score of a group: `max`, its best expert's; `two`, the sum of its two best ones."""
    correction: bool = False
    """A value an expert is added to the scores when experts are picked, and not when they are weighted."""
    bias: bool = False
    """Of the logits."""
    wide: bool = False
    """Logits are computed in float32 at least."""


class Router(nn.Module):
    """Picks experts for rows."""

    def __init__(self, width: int, routing: Routing, place: Placement) -> None:
        super().__init__()
        place.refuse_parity("the model has experts")
        self.routing = routing
        self.weight = place.matrix(routing.experts, width)
        self.bias = place.empty(routing.experts) if routing.bias else None
        self.correction = place.widened().empty(routing.experts) if routing.correction else None

    def forward(self, x_RE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts, int64 [R, K], and their weights, [R, K] in float32 at least."""
        routing = self.routing
        weight: Tensor = self.weight
        kind = torch.promote_types(x_RE.dtype, torch.float32)
        if routing.wide:
            x_RE, weight = x_RE.to(kind), weight.to(kind)
        logits_RN = F.linear(x_RE, weight, self.bias).to(kind)
        if routing.score == "softmax_of_picked":
            best_RK, pick_RK = logits_RN.topk(routing.picked, -1)
            return pick_RK, best_RK.softmax(-1)
        score_RN = logits_RN.softmax(-1) if routing.score == "softmax" else logits_RN.sigmoid()
        choice_RN = score_RN if self.correction is None else score_RN + self.correction
        if routing.picked_groups < routing.groups:
            choice_RN = self._in_best_groups(choice_RN)
        pick_RK = choice_RN.topk(routing.picked, -1).indices
        weight_RK = score_RN.gather(1, pick_RK)
        if routing.normalise:
            weight_RK = weight_RK / (weight_RK.sum(-1, keepdim=True) + 1e-20)
        return pick_RK, weight_RK * routing.scale

    def _in_best_groups(self, choice_RN: Tensor) -> Tensor:
        """-inf for experts outside the best groups."""
        routing = self.routing
        members_RGn = choice_RN.unflatten(1, (routing.groups, -1))
        best = 1 if routing.group_score == "max" else 2
        group_RG = members_RGn.topk(best, -1).values.sum(-1)
        chosen = group_RG.topk(routing.picked_groups, -1).indices
        outside_RG = torch.ones_like(group_RG, dtype=torch.bool).scatter_(1, chosen, False)
        return members_RGn.masked_fill(outside_RG[..., None], float("-inf")).flatten(1)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors go."""
        found = {f"{name}.weight": [self.weight.data]}
        if self.bias is not None:
            found[f"{name}.bias"] = [self.bias.data]
        if self.correction is not None:
            found[f"{name}.e_score_correction_bias"] = [self.correction.data]
        return found


def clamped_swiglu(alpha: float, limit: float) -> Callable[[Tensor], Tensor]:
    """The gate of gpt-oss over gates and ups that alternate: g sigmoid(alpha g) (u + 1), with g and u cut at limit."""

    def gate(both_PF2: Tensor) -> Tensor:
        gate_PF, up_PF = both_PF2.unflatten(1, (-1, 2)).unbind(-1)
        gate_PF = gate_PF.clamp(max=limit)
        return (up_PF.clamp(-limit, limit) + 1.0) * gate_PF * torch.sigmoid(gate_PF * alpha)

    return gate


@dataclass(frozen=True)
class ExpertNames:
    """Checkpoint names below the layer's own."""

    router: str = "gate"
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    stacked: bool = False
    """One tensor for all experts, weights as [inputs, outputs], gates and ups alternating (gpt-oss)."""


class MixtureMLP(nn.Module):
    """A feed-forward layer of experts.

    Args:
        width, hidden: E and F; ranks divide F of every expert.
        routing: how experts are picked.
        place: device and type of the parameters.
        bias: whether the experts' projections have biases.
        gate: gate and up of the pairs [P, 2F] to [P, F]; None: silu(gate) * up.
        shared: width of a feed-forward layer that every row goes through; 0: none.
        names: of the checkpoint's tensors.

    Raises:
        ConfigError: float64 on a GPU.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        routing: Routing,
        place: Placement,
        bias: bool = False,
        gate: Callable[[Tensor], Tensor] | None = None,
        shared: int = 0,
        names: ExpertNames | None = None,
    ) -> None:
        super().__init__()
        if place.device.type == "cuda" and place.dtype == torch.float64:
            raise ConfigError(
                "dtype is float64; layers of experts have no such kernel on a GPU: use float32, or the CPU"
            )
        self.ranks = place.ranks
        hidden = place.ranks.share(hidden, "feed-forward width of experts").size
        self.hidden, self.gate = hidden, gate or silu_mul
        self.names = names or ExpertNames()
        self.router = Router(width, routing, place)
        n = routing.experts
        self.gate_up_NOE = place.empty(n, 2 * hidden, width)
        self.down_NEF = place.empty(n, width, hidden)
        self.gate_up_bias_NO = place.empty(n, 2 * hidden) if bias else None
        self.down_bias_NE = place.empty(n, width) if bias else None
        self.shared = GatedMLP(width, shared, bias=False, place=place) if shared else None

    def forward(self, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """See FeedForward."""
        if norm is not None:
            x_RE = rms_norm(x_RE, *norm)
        pick_RK, weight_RK = self.router.forward(x_RE)
        rows, picked = pick_RK.shape
        plan = plan_experts(pick_RK, self.router.routing.experts)
        both_PO = multiply_picked(plan, x_RE, self.gate_up_NOE, self.gate_up_bias_NO, share=picked)
        bias_NE = self.down_bias_NE if self.ranks.rank == 0 else None
        y_PE = multiply_picked(plan, self.gate(both_PO), self.down_NEF, bias_NE, share=1)
        y_RE = (y_PE.view(rows, picked, -1) * weight_RK[..., None]).sum(1).to(x_RE.dtype)
        if self.ranks.size > 1:  # each has summed over its part of F
            self.ranks.all_reduce_(y_RE)
        if self.shared is not None:
            self.shared.add_to(y_RE, x_RE)
        return y_RE

    def add_to(self, residual_RE: Tensor, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> None:
        """See FeedForward."""
        residual_RE.add_(self.forward(x_RE, norm))

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        names, hidden = self.names, self.hidden
        experts = f"{name}.{names.experts}"
        found = self.router.tensors(f"{name}.{names.router}")
        if names.stacked:
            found[f"{experts}.gate_up_proj"] = cut(self.gate_up_NOE.data.transpose(1, 2), 2, self.ranks)
            found[f"{experts}.down_proj"] = cut(self.down_NEF.data.transpose(1, 2), 1, self.ranks)
            if self.gate_up_bias_NO is not None:
                found[f"{experts}.gate_up_proj_bias"] = cut(self.gate_up_bias_NO.data, 1, self.ranks)
            if self.down_bias_NE is not None:
                found[f"{experts}.down_proj_bias"] = [self.down_bias_NE.data]
        else:
            for number in range(self.router.routing.experts):
                mine = f"{experts}.{number}"
                found[f"{mine}.{names.gate}.weight"] = cut(self.gate_up_NOE.data[number, :hidden], 0, self.ranks)
                found[f"{mine}.{names.up}.weight"] = cut(self.gate_up_NOE.data[number, hidden:], 0, self.ranks)
                found[f"{mine}.{names.down}.weight"] = cut(self.down_NEF.data[number], 1, self.ranks)
        if self.shared is not None:
            found |= self.shared.tensors(f"{name}.{names.shared}")
        return found
