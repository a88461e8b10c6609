"""Where a model's parameters live, in which type, and how they are shared among ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.layers.adapters import AdapterBank
from headrace.quantization import Quantization
from headrace.ranks import ONE, Ranks

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
    ranks: Ranks = ONE
    """The ranks that a layer may divide its parameters among; one that divides nothing is whole on each of them."""
    parity: bool = False
    """Whether each row's bits have to be a function of that row alone; see `refuse_parity`."""

    def refuse_parity(self, what: str, way_out: str = "use another model") -> None:
        """For a layer whose results may follow from the other rows of a step: raise ConfigError if they must not."""
        if self.parity:
            raise ConfigError(
                f"parity=True, but {what}: their results may change in the last bits with the other rows of a step; "
                f"leave parity out, or {way_out}"
            )

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


DIVIDED = ("device", "dtype", "ranks")
"""Fields of a placement with which ranks divide layers; any other one has to be taught that first."""


def check_divisible(place: Placement) -> None:
    """Raise ConfigError for several ranks beside something that layers cannot divide among them."""
    asked = [name for name, default in place._field_defaults.items() if getattr(place, name) is not default]
    others = [name for name in asked if name not in DIVIDED]
    if place.ranks.size > 1 and others:
        raise ConfigError(
            f"tensor_parallel_size is {place.ranks.size}, and the model is loaded with {', '.join(others)}, which is "
            "not divided among ranks yet: leave one of the two out"
        )


class Pieces(list[Tensor]):
    """Views for one checkpoint tensor of which each takes a part only.

    Args:
        views: parameters, or parts of them.
        shape: the whole checkpoint tensor's.
        where: for each view the slices of the checkpoint tensor that it takes.
    """

    def __init__(self, views: list[Tensor], shape: tuple[int, ...], where: list[tuple[slice, ...]]) -> None:
        super().__init__(views)
        self.shape, self.where = shape, where


def cut(view: Tensor, axis: int, ranks: Ranks, parts: int | None = None) -> list[Tensor]:
    """This rank's part of a checkpoint tensor that is cut along an axis into equal parts; None: one a rank."""
    parts = ranks.size if parts is None else parts
    if ranks.size == 1:
        return [view]
    size = view.shape[axis]
    first = ranks.rank * parts // ranks.size * size
    where = [slice(None)] * view.dim()
    where[axis] = slice(first, first + size)
    shape = tuple(n * parts if i == axis % view.dim() else n for i, n in enumerate(view.shape))
    return Pieces([view], shape, [tuple(where)])


def whole_shape(views: list[Tensor]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor behind some views."""
    return views.shape if isinstance(views, Pieces) else tuple(views[0].shape)
