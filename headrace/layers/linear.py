"""Linear maps, several of which share one matrix product: y = x W^T + b.

Projections of the same input (query, key and value; gate and up) lie below one another in one weight, so that
a layer runs one GEMM where the checkpoint has two or three. In a step whose rows have adapters (LoRA, arXiv
2106.09685) each row's own change is added to the product, before the gate.

Where the checkpoint stores weights in another form (`headrace.quantization`), a store takes the place of the weight. It
depends on the names of the projections whether it does, so it is made when they are given (`tensors`).

Several ranks split a map by its outputs (each computes some of them) or by its inputs (each computes a part of the sum
over the inputs, and the parts are added up: one all-reduce), after Megatron-LM, arXiv 1909.08053. Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from headrace.errors import UnsupportedModelError
from headrace.kernels.project import project, project_onto
from headrace.kernels.project_fixed import project_fixed, project_fixed_onto
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from headrace.layers.placement import Pieces, Placement, cut
from headrace.quantization import WeightStore

META = torch.device("meta")


class Linear(nn.Module):
    """One or more projections of the same input, computed as one product.

    Args:
        inputs: width of the input, of this rank.
        outputs: width of each projection, of this rank; their results stand side by side in this order.
        bias: whether every projection has a bias.
        place: device and type of the parameters.
        split: what the ranks divide; None: nothing, each has the whole map.
        parts: with split "outputs", into how many parts each projection is cut; None: one a rank. Fewer than ranks
            where neighbours hold the same part.
    """

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        *,
        bias: bool,
        place: Placement,
        split: Literal["outputs", "inputs"] | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, tuple(outputs)
        self.ranks, self.parity = place.ranks, place.parity
        self.split = split if place.ranks.size > 1 else None
        self.parts = tuple(parts or [place.ranks.size] * len(self.outputs))
        self.store: WeightStore | None = None
        self._place = place
        self._is_settled = place.quantization is None
        # Without memory until it is known whether there is a store.
        self.weight = (place if self._is_settled else place._replace(device=META)).matrix(sum(outputs), inputs)
        self.bias = place.empty(sum(outputs)) if bias else None
        bank = place.adapters
        if bank is not None:
            place.refuse_parity("there is room for adapters", "leave out adapters and max_adapters")
        self.room = None if bank is None else bank.room(inputs, outputs, place.device, place.dtype)

    def _settle(self, names: Sequence[str], transposed: bool) -> None:
        """Now that the projections have names: a store, or a dense weight."""
        place, self._is_settled = self._place, True
        if place.quantization is not None:
            widths = self.outputs if len(names) > 1 else [sum(self.outputs)]
            self.store = place.quantization.store(names, widths, self.inputs, place.device)
        if self.store is None:
            self.weight = place.matrix(sum(self.outputs), self.inputs)
            return
        place.refuse_parity("the checkpoint's weights are quantised", "use a checkpoint with dense weights")
        del self.weight
        if transposed and f"{names[0]}.weight" in self.store.tensors():
            raise UnsupportedModelError(
                f"{names[0]} is stored as [inputs, outputs], and weights of that order are not implemented in "
                "this form: use a checkpoint with float32, bfloat16 or float16 weights"
            )

    def forward(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """[R, inputs] to [R, sum(outputs)]; `norm`: weight and eps of an RMS norm of x."""
        if self.room is not None and self.room.active:
            return self._adapted(x, norm)
        if self.store is not None:
            return self.store.project(x, self.bias, norm=norm)
        if self.parity:
            return project_fixed(x, self.weight, self.bias, norm=norm)
        if self.split != "inputs":
            return project(x, self.weight, self.bias, norm=norm)
        y = project(x, self.weight, self.bias if self.ranks.rank == 0 else None)  # the bias is in one of the parts
        self.ranks.all_reduce_(y)
        return y

    def gated(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """silu(first projection) * second, of two of one width: [R, inputs] to [R, that width]."""
        if self.room is not None and self.room.active:
            return silu_mul(self._adapted(x, norm))
        if self.store is not None:
            return self.store.project(x, self.bias, norm=norm, gated=True)
        if self.parity:
            return project_fixed(x, self.weight, self.bias, norm=norm, gated=True)
        return project(x, self.weight, self.bias, norm=norm, gated=True)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y += forward(x) in place: the residual sum costs no pass of its own, the product accumulates into it.

        Split by inputs, the ranks' parts of the product are added up first.
        """
        if self.split == "inputs":
            y.add_(self.forward(x))
            return
        if self.store is not None:
            self.store.project_onto(y, x, self.bias)
        elif self.parity:
            project_fixed_onto(y, x, self.weight, self.bias)
        else:
            project_onto(y, x, self.weight, self.bias)
        if self.room is not None and self.room.active:
            self.room.adapt_(y, x)

    def _adapted(self, x: Tensor, norm: tuple[Tensor, float] | None) -> Tensor:
        """`forward` with the adapters of the step."""
        assert self.room is not None
        if norm is not None:
            x = rms_norm(x, *norm)
        y = project(x, self.weight, self.bias) if self.store is None else self.store.project(x, self.bias)
        self.room.adapt_(y, x)
        return y

    def tensors(self, *names: str, transposed: bool = False) -> dict[str, list[Tensor]]:
        """Where each projection's checkpoint tensors go, given the projections' names in the order of `outputs`.

        One name stands for all of them stored as one. `transposed`: the checkpoint's weights are [inputs, outputs].
        """
        if not self._is_settled:
            self._settle(names, transposed)
        if self.room is not None:
            self.room.names = names
        found: dict[str, list[Tensor]] = {} if self.store is None else self.store.tensors()
        projections = list(zip(self.outputs, self.parts, strict=True))
        start = 0
        for name, stored in zip(names, [[p] for p in projections] if len(names) > 1 else [projections], strict=True):
            width = sum(outputs for outputs, _ in stored)
            if self.store is None:
                weight = self._views(self.weight[start : start + width], stored)
                found[f"{name}.weight"] = _transposed(weight) if transposed else weight
            if self.bias is not None:
                found[f"{name}.bias"] = self._views(self.bias[start : start + width], stored)
            start += width
        return found

    def _views(self, view: Tensor, stored: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Views for the weight or bias of projections that the checkpoint stores as one: their outputs and parts."""
        if self.split == "inputs" and view.dim() > 1:
            return cut(view, 1, self.ranks)
        if self.split != "outputs":
            return [view]
        where: list[tuple[slice, ...]] = []
        first = 0
        for outputs, parts in stored:
            mine = first + self.ranks.rank * parts // self.ranks.size * outputs
            where.append((slice(mine, mine + outputs),))
            first += outputs * parts
        return Pieces(list(view.split([outputs for outputs, _ in stored])), (first, *view.shape[1:]), where)


def _transposed(views: list[Tensor]) -> list[Tensor]:
    """The same for a tensor that is stored the other way round."""
    turned = [view.t() for view in views]
    if not isinstance(views, Pieces):
        return turned
    where = [(*(slice(None) for _ in range(2 - len(slices))), *slices[::-1]) for slices in views.where]
    return Pieces(turned, views.shape[::-1], where)
