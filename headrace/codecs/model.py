"""Keys and values as the model makes them, in its type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.codecs.base import CODECS, Codec
from headrace.codecs.forms import Direct, Form
from headrace.step import LayerState, PageClass, Plane


@CODECS.register(
    "model",
    label="exact",
    summary="Keys and values in the model's type, read where they lie.",
)
class ModelType(Codec):
    """Two planes, keys and values."""

    direct = True

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        """One class."""
        k = Plane("k", (state.head_dim,), self.dtype)
        v = Plane("v", (state.v_head_dim,), self.dtype, within="k" if state.values_in_keys else "")
        return [PageClass("model", (k, v))]

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        """As they are."""
        return k_RKD, v_RKD

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As they are."""
        k, v = planes
        return k, v

    def form(self, device: torch.device) -> Form:
        """The attention kernels."""
        return Direct(device)
