"""The store that 4-bit forms share: codes in words of eight inputs, zeros and scales by groups of inputs.

The engine's own layout, whatever the checkpoint's: 0.5 bytes a weight, and 5 bytes for each output of a group (a byte
for the zero, a float32 for the scale, so that scales of any stored type are kept exactly). Letters: R rows, E inputs,
N outputs, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.kernels.project_int4 import project_int4
from headrace.kernels.project_int4.reference import CODES, dequantise_int4
from headrace.quantization.base import WeightStore

SHIFTS = tuple(range(0, 32, 4))


def unpack_last(words: Tensor, order: Sequence[int]) -> Tensor:
    """Codes, uint8 [A, 8 B], of words int32 [A, B]; `order`: which of eight columns each code, from bit 0 on, is of."""
    codes = torch.empty(*words.shape, CODES, dtype=torch.uint8, device=words.device)
    for shift, column in zip(SHIFTS, order, strict=True):
        codes[..., column] = (words >> shift) & 15
    return codes.flatten(1)


def pack_last(codes: Tensor, order: Sequence[int]) -> Tensor:
    """The inverse of `unpack_last`."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // CODES, dtype=torch.int32, device=codes.device)
    for shift, column in zip(SHIFTS, order, strict=True):
        words |= codes[:, column::CODES].to(torch.int32) << shift
    return words


class Int4Store(WeightStore):
    """4-bit codes. Forms fill `words_WN`, `zeros_GN`, `scales_GN`, `group` and `orders` when they are loaded.

    Raises:
        UnsupportedModelError: the inputs or outputs do not come in eights.
    """

    words_WN: nn.Parameter
    zeros_GN: nn.Parameter
    scales_GN: nn.Parameter

    def __init__(
        self, names: Sequence[str], widths: Sequence[int], inputs: int, group: int, where: str, *, inputs_by_8: bool
    ) -> None:
        super().__init__(names, widths, inputs)
        for name, width in zip(names, widths, strict=True):
            if width % CODES or (inputs_by_8 and inputs % CODES):
                raise UnsupportedModelError(
                    f"{where}: {name} maps {inputs} inputs to {width} outputs; this form packs "
                    f"{'both' if inputs_by_8 else 'outputs'} in eights: leave the module out when quantising"
                )
        self.group = inputs if group == -1 else group
        self.groups = -(-inputs // self.group)
        self.orders_PE: nn.Parameter | None = None
        """For each projection, or once for all, the inputs in the order of their groups, int32; None: they lie so."""

    def _finish(self, words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor) -> None:
        for name, start, end in self.spans:
            if not scales_GN[:, start:end].isfinite().all():
                raise CheckpointError(f"{name}.scales holds values that are not finite: fetch the checkpoint again")
        self.words_WN, self.zeros_GN, self.scales_GN = (
            nn.Parameter(part, requires_grad=False) for part in (words_WN, zeros_GN, scales_GN)
        )

    def multiply(self, x_RE: Tensor) -> Tensor:
        """See WeightStore."""
        orders = self.orders_PE
        if orders is None or len(orders) == 1:
            x = x_RE if orders is None else x_RE.index_select(1, orders[0])
            return project_int4(x, self.words_WN, self.zeros_GN, self.scales_GN, group=self.group)
        parts = [
            project_int4(
                x_RE.index_select(1, order),
                self.words_WN[:, start:end],
                self.zeros_GN[:, start:end],
                self.scales_GN[:, start:end],
                group=self.group,
            )
            for order, (_, start, end) in zip(orders, self.spans, strict=True)
        ]
        return torch.cat(parts, 1)

    def dense(self) -> Tensor:
        """See WeightStore."""
        weight_EN = dequantise_int4(self.words_WN, self.zeros_GN, self.scales_GN, self.inputs, self.group)
        if self.orders_PE is not None:
            orders = self.orders_PE.expand(len(self.widths), -1).long()
            for order, (_, start, end) in zip(orders, self.spans, strict=True):
                weight_EN[order, start:end] = weight_EN[:, start:end].clone()
        return weight_EN.t().contiguous()
