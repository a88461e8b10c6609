"""A store that keeps a dense weight and adds up the second moments of what it is multiplied with: calibration.

Letters: E inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.quantization.base import Quantization, WeightStore


class WatchedStore(WeightStore):
    """A dense weight; `moments_EE` is the sum of x x^T of all rows x that it was multiplied with, in float64."""

    def __init__(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> None:
        super().__init__(names, widths, inputs)
        self.weight_NE = self._empty(sum(widths), inputs, dtype=torch.float32, device=device)
        self.moments_EE: Tensor | None = None
        self.rows = 0

    def forget(self) -> None:
        """Begin anew."""
        self.moments_EE, self.rows = None, 0

    def tensors(self) -> dict[str, list[Tensor]]:
        """See WeightStore."""
        return {f"{name}.weight": [self.weight_NE.data[start:end]] for name, start, end in self.spans}

    def loaded(self) -> None:
        """Nothing is to be rearranged."""

    def multiply(self, x_RE: Tensor) -> Tensor:
        """See WeightStore."""
        if self.moments_EE is None:
            self.moments_EE = torch.zeros(self.inputs, self.inputs, dtype=torch.float64, device=x_RE.device)
        self.moments_EE += (x_RE.float().t() @ x_RE.float()).double()
        self.rows += len(x_RE)
        return F.linear(x_RE, self.weight_NE.to(x_RE.dtype))

    def dense(self) -> Tensor:
        """See WeightStore."""
        return self.weight_NE.data


@dataclass(frozen=True)
class Watched(Quantization):
    """All linear maps of a dense checkpoint, watched."""

    method = "watched"

    def covers(self, name: str) -> bool:
        """See Quantization."""
        return True

    def make(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> WeightStore:
        """See Quantization."""
        return WatchedStore(names, widths, inputs, device)


def watched_stores(model: nn.Module) -> list[WatchedStore]:
    """The stores of a model that was loaded so."""
    return [module for module in model.modules() if isinstance(module, WatchedStore)]
