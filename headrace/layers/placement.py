"""Where a model's parameters live and in which type."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Placement(NamedTuple):
    """Device and type of the parameters; the device `meta` makes shapes without memory."""

    device: torch.device
    dtype: torch.dtype

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter without gradient."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype), requires_grad=False)
