"""Feed-forward layers: gated, W_down (act(W_gate x) * W_up x) (arXiv 2002.05202), and plain, W_down act(W_up x).

Letters: R rows, E model width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from headrace.layers.linear import Linear
from headrace.layers.placement import Placement

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""By the names that `ModelConfig.activation` uses."""


class FeedForward(Protocol):
    """What a block asks of its feed-forward layer, whichever it is. `norm`: weight and eps of an RMS norm of x."""

    def forward(self, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """[R, E] to [R, E], a new tensor."""
        ...

    def add_to(self, residual_RE: Tensor, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> None:
        """residual += forward(x), in place; x may be the residual."""
        ...

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        ...


class GatedMLP(nn.Module):
    """Gated feed-forward layer with gate and up as one product.

    Args:
        width, hidden: E and F, which ranks divide.
        bias: whether every projection has a bias.
        place: device and type of the parameters.
        activation: of the gate, a name of `ACTIVATIONS`.
        names: checkpoint names of gate and up, or of both stored as one.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        place: Placement,
        activation: str = "silu",
        names: Sequence[str] = ("gate_proj", "up_proj"),
    ) -> None:
        super().__init__()
        hidden = place.ranks.share(hidden, "feed-forward width").size
        self.gate_up = Linear(width, [hidden, hidden], bias=bias, place=place, split="outputs")
        self.down = Linear(hidden, [width], bias=bias, place=place, split="inputs")
        self.activation, self.names = activation, tuple(names)

    def forward(self, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """See FeedForward."""
        return self.down.forward(self._inner(x_RE, norm))

    def add_to(self, residual_RE: Tensor, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> None:
        """See FeedForward."""
        self.down.add_to(residual_RE, self._inner(x_RE, norm))

    def _inner(self, x_RE: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
        if self.activation == "silu":
            return self.gate_up.gated(x_RE, norm)
        gate_RF, up_RF = self.gate_up.forward(x_RE, norm).chunk(2, -1)
        return ACTIVATIONS[self.activation](gate_RF).mul_(up_RF)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        found = self.gate_up.tensors(*(f"{name}.{part}" for part in self.names))
        return found | self.down.tensors(f"{name}.down_proj")


class PlainMLP(nn.Module):
    """Feed-forward layer without a gate, with biases, its weights stored as [inputs, outputs] (GPT-2).

    Args:
        width, hidden: E and F, which ranks divide.
        place: device and type of the parameters.
        activation: a name of `ACTIVATIONS`.
        names: checkpoint names of the two projections.
    """

    def __init__(
        self, width: int, hidden: int, *, place: Placement, activation: str, names: tuple[str, str] = ("c_fc", "c_proj")
    ) -> None:
        super().__init__()
        hidden = place.ranks.share(hidden, "feed-forward width").size
        self.up = Linear(width, [hidden], bias=True, place=place, split="outputs")
        self.down = Linear(hidden, [width], bias=True, place=place, split="inputs")
        self.activation, self.names = activation, names

    def forward(self, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """See FeedForward."""
        return self.down.forward(ACTIVATIONS[self.activation](self.up.forward(x_RE, norm)))

    def add_to(self, residual_RE: Tensor, x_RE: Tensor, norm: tuple[Tensor, float] | None = None) -> None:
        """See FeedForward."""
        self.down.add_to(residual_RE, ACTIVATIONS[self.activation](self.up.forward(x_RE, norm)))

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        up, down = self.names
        return self.up.tensors(f"{name}.{up}", transposed=True) | self.down.tensors(f"{name}.{down}", transposed=True)
