"""Gated feed-forward layer: W_down (silu(W_gate x) * W_up x) (Shazeer, arXiv 2002.05202).

Letters: R rows, E model width, F feed-forward width.
"""

from __future__ import annotations

from torch import Tensor, nn

from headrace.layers.linear import Linear
from headrace.layers.placement import Placement


class GatedMLP(nn.Module):
    """SwiGLU feed-forward layer with gate and up as one product. Ranks divide the hidden width."""

    def __init__(self, width: int, hidden: int, *, bias: bool, place: Placement) -> None:
        super().__init__()
        hidden = place.ranks.share(hidden, "intermediate_size").size
        self.gate_up = Linear(width, [hidden, hidden], bias=bias, place=place, split="outputs")
        self.down = Linear(hidden, [width], bias=bias, place=place, split="inputs")

    def add_to(self, residual_RE: Tensor, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> None:
        """residual += mlp(x), in place; `norm`: weight and eps of an RMS norm of x."""
        self.down.add_to(residual_RE, self.gate_up.gated(x_RE, norm))

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        found = self.gate_up.tensors(f"{name}.gate_proj", f"{name}.up_proj")
        return found | self.down.tensors(f"{name}.down_proj")
