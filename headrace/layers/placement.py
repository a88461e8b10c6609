"""Where a model's parameters live and in which type."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from headrace.layers.adapters import AdapterBank
from headrace.quantization import Quantization

CACHE_LINE = 64
"""Bytes."""


class Placement(NamedTuple):
    """Device and type of the parameters; the device `meta` makes shapes without memory."""

    device: torch.device
    dtype: torch.dtype
    adapters: AdapterBank | None = None
    """Where linear maps get room for adapters; None: they have none."""
    quantization: Quantization | None = None
    """The form in which the checkpoint stores the weights of linear maps; None: they are dense."""

    def widened(self) -> Placement:
        """The same place for numbers that need float32 at least."""
        return self._replace(dtype=torch.promote_types(self.dtype, torch.float32))

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter without gradient."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype), requires_grad=False)

    def matrix(self, outputs: int, inputs: int) -> nn.Parameter:
        """An uninitialised weight [outputs, inputs] of a linear map, laid out as the device's GEMM reads it fastest.

        In float32 and float64 the CPU's library rearranges a weight with contiguous rows in every call, which for 4 to
        48 rows costs 20 to 50 % of the product; contiguous columns it takes as they are, and a cache line between them
        keeps powers of two from sharing cache sets. bfloat16 goes to another library, which prefers contiguous rows.
        """
        if self.device.type == "cpu" and self.dtype in (torch.float32, torch.float64):
            columns = torch.empty(inputs, outputs + CACHE_LINE // self.dtype.itemsize, dtype=self.dtype)
            return nn.Parameter(columns[:, :outputs].t(), requires_grad=False)
        return self.empty(outputs, inputs)
