"""Normalisation: root mean square (Zhang and Sennrich, arXiv 1910.07467) and layer norm (Ba et al., arXiv 1607.06450).

RMS: y = x / sqrt(mean(x^2) + eps) * w. Layer norm: y = (x - mean(x)) / sqrt(var(x) + eps) * w + b.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from headrace.kernels.rms_norm import rms_norm
from headrace.layers.placement import Placement


class Norm(nn.Module, ABC):
    """A norm over the last axis."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]; x is left as it is."""

    @abstractmethod
    def before(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """x for an operation that can have an RMS norm built in; and that norm, if it is left to do."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors go."""


class RMSNorm(Norm):
    """RMS normalisation with one weight an element.

    Args:
        width: size of the last axis.
        eps: added to the mean square.
        place: device and type of the weight.
        offset: what is added to the checkpoint's weight (Gemma: 1). The sum is kept in float32 at least: in 16 bits it
            would round away most of a small weight.
    """

    def __init__(self, width: int, eps: float, place: Placement, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = (place.widened() if offset else place).empty(width)
        self.eps, self.offset = eps, offset

    @property
    def terms(self) -> tuple[Tensor, float]:
        """Weight and eps, for an operation that has the norm built in."""
        return self.weight, self.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]; x is left as it is."""
        return rms_norm(x, self.weight, self.eps)

    def before(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """x as it is, and the norm."""
        return x, self.terms

    def loaded(self) -> None:
        """The weight is the checkpoint's."""
        if self.offset:
            self.weight.add_(self.offset)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensor goes."""
        return {f"{name}.weight": [self.weight]}


class LayerNorm(Norm):
    """Layer normalisation with weight and bias, by torch."""

    def __init__(self, width: int, eps: float, place: Placement) -> None:
        super().__init__()
        place.refuse_parity("the model has layer norms")
        self.weight, self.bias = place.empty(width), place.empty(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]; x is left as it is."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def before(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, float] | None]:
        """x normalised; nothing is left to do."""
        return self.forward(x), None

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors go."""
        return {f"{name}.weight": [self.weight], f"{name}.bias": [self.bias]}
