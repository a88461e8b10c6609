"""Linear maps, several of which share one matrix product: y = x W^T + b.

Projections of the same input (query, key and value; gate and up) lie below one another in one weight, so that
a layer runs one GEMM where the checkpoint has two or three. Letters: R rows.

Several ranks split a map by its outputs (each computes some of them) or by its inputs (each computes a part of the sum
over the inputs, and the parts are added up: one all-reduce), after Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from headrace.kernels.project import project, project_onto
from headrace.layers.placement import Pieces, Placement


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
        self.outputs = tuple(outputs)
        self.ranks = place.ranks
        self.split = split if place.ranks.size > 1 else None
        self.parts = tuple(parts or [place.ranks.size] * len(self.outputs))
        self.weight = place.matrix(sum(outputs), inputs)
        self.bias = place.empty(sum(outputs)) if bias else None

    def forward(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """[R, inputs] to [R, sum(outputs)]; `norm`: weight and eps of an RMS norm of x."""
        return project(x, self.weight, self.bias, norm=norm)

    def gated(self, x: Tensor, norm: tuple[Tensor, float] | None = None) -> Tensor:
        """silu(first projection) * second, of two of one width: [R, inputs] to [R, that width]."""
        return project(x, self.weight, self.bias, norm=norm, gated=True)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """y += forward(x) in place: the residual sum costs no pass of its own, the product accumulates into it.

        Split by inputs, the ranks' parts are added up first, the bias being in one of them.
        """
        if self.split != "inputs":
            project_onto(y, x, self.weight, self.bias)
            return
        sum_RE = project(x, self.weight, self.bias if self.ranks.rank == 0 else None)
        self.ranks.all_reduce_(sum_RE)
        y.add_(sum_RE)

    def tensors(self, *names: str) -> dict[str, list[Tensor]]:
        """Where each projection's checkpoint tensors go, given the projections' names in the order of `outputs`."""
        found: dict[str, list[Tensor]] = {}
        start = 0
        for name, width, parts in zip(names, self.outputs, self.parts, strict=True):
            found[f"{name}.weight"] = self._views(self.weight[start : start + width], parts)
            if self.bias is not None:
                found[f"{name}.bias"] = self._views(self.bias[start : start + width], parts)
            start += width
        return found

    def _views(self, view: Tensor, parts: int) -> list[Tensor]:
        """A projection's weight or bias, with the place in the checkpoint tensor that this rank's share has."""
        n_out, n_in = view.shape[0], view.shape[1:]
        if self.split == "outputs":
            part = self.ranks.rank * parts // self.ranks.size
            return Pieces([view], (n_out * parts, *n_in), [(slice(part * n_out, (part + 1) * n_out),)])
        if self.split == "inputs" and n_in:
            first = self.ranks.rank * n_in[0]
            where = (slice(None), slice(first, first + n_in[0]))
            return Pieces([view], (n_out, n_in[0] * self.ranks.size), [where])
        return [view]
