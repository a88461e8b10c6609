"""Root mean square normalisation: y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels.rms_norm import rms_norm
from headrace.layers.placement import Placement


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis, with one weight an element."""

    def __init__(self, width: int, eps: float, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(width)
        self.eps = eps

    @property
    def terms(self) -> tuple[Tensor, float]:
        """Weight and eps, for an operation that has the norm built in."""
        return self.weight, self.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]; x is left as it is."""
        return rms_norm(x, self.weight, self.eps)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensor goes."""
        return {f"{name}.weight": [self.weight]}
