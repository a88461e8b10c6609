"""Linear maps, several of which share one matrix product: y = x W^T + b.

Projections of the same input (query, key and value; gate and up) lie below one another in one weight, so that
a layer runs one GEMM where the checkpoint has two or three. In a step whose rows have adapters (LoRA, arXiv
2106.09685) each row's own change is added to the product, before the gate. Letters: R rows.

Where the checkpoint stores weights in another form (`headrace.quantization`), a store takes the place of the weight. It
depends on the names of the projections whether it does, so it is made when they are given (`tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headrace.errors import UnsupportedModelError
from headrace.kernels.project import project, project_onto
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from headrace.layers.placement import Placement
from headrace.quantization import WeightStore

META = torch.device("meta")


class Linear(nn.Module):
    """One or more projections of the same input, computed as one product.

    Args:
        inputs: width of the input.
        outputs: width of each projection; their results stand side by side in this order.
        bias: whether every projection has a bias.
        place: device and type of the parameters.
    """

    def __init__(self, inputs: int, outputs: Sequence[int], *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, tuple(outputs)
        self.store: WeightStore | None = None
        self._place = place
        self._is_settled = place.quantization is None
        # Without memory until it is known whether there is a store.
        self.weight = (place if self._is_settled else place._replace(device=META)).matrix(sum(outputs), inputs)
        self.bias = place.empty(sum(outputs)) if bias else None
        bank = place.adapters
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
        return project(x, self.weight, self.bias, norm=norm)

    def gated(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """silu(first projection) * second, of two of one width: [R, inputs] to [R, that width]."""
        if self.room is not None and self.room.active:
            return silu_mul(self._adapted(x, norm))
        if self.store is not None:
            return self.store.project(x, self.bias, norm=norm, gated=True)
        return project(x, self.weight, self.bias, norm=norm, gated=True)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y += forward(x) in place: the residual sum costs no pass of its own, the product accumulates into it."""
        if self.store is not None:
            self.store.project_onto(y, x, self.bias)
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
        start = 0
        for name, width in zip(names, self.outputs if len(names) > 1 else [sum(self.outputs)], strict=True):
            if self.store is None:
                weight = self.weight[start : start + width]
                found[f"{name}.weight"] = [weight.t() if transposed else weight]
            if self.bias is not None:
                found[f"{name}.bias"] = [self.bias[start : start + width]]
            start += width
        return found
