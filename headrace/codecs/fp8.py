"""Eight-bit floating point: four bits of exponent and three of mantissa (E4M3, arXiv 2209.05433), one scale for each
slot and head: x = code * scale, scale = max |x| / 448 over the vector, for keys and for values.

A vector's scale follows from the vector alone, so nothing is calibrated and no outlier of another token costs it
precision. The scale is float32: in float16 it would be 0 for vectors below 3e-5 and would save 2 bytes of the head
size + 4 that a vector takes, 3 % for heads of 64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.codecs.base import CODECS, Codec
from headrace.step import LayerState, PageClass, Plane

LARGEST = 448.0
"""The largest number that E4M3 holds."""


@CODECS.register(
    "fp8",
    label="lossy",
    summary="Keys and values in 8-bit floating point (E4M3) with a float32 scale for each slot and head.",
    source="E4M3: arXiv 2209.05433",
    composes="everything; decoders' own models keep their type",
)
class Fp8(Codec):
    """Codes are kept as bytes, which every device can index."""

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        """One class of four planes."""
        planes = [
            plane
            for name, size in (("k", state.head_dim), ("v", state.v_head_dim))
            for plane in (Plane(name, (size,), torch.uint8), Plane(f"{name}_scale", (), torch.float32))
        ]
        return [PageClass("fp8", tuple(planes))]

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        """Codes and scales of keys, then of values."""
        return *_encode(k_RKD), *_encode(v_RKD)

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Multiplied in float32."""
        k, k_scale, v, v_scale = planes
        return self._decode(k, k_scale), self._decode(v, v_scale)

    def _decode(self, code: Tensor, scale: Tensor) -> Tensor:
        # A look-up takes a third of the time of torch's conversion on the CPU.
        x = _numbers(code.device).index_select(0, code.flatten().int()).view(code.shape)
        return (x * scale[..., None]).to(self.dtype)


@functools.cache
def _numbers(device: torch.device) -> Tensor:
    """What each code stands for, float32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def _encode(x_RKD: Tensor) -> tuple[Tensor, Tensor]:
    x_RKD = x_RKD.float()
    most_RK = x_RKD.abs().amax(-1)
    # A plain 1.0 would be copied to the device, which cannot be recorded.
    scale_RK = torch.where(most_RK > 0, most_RK / LARGEST, torch.ones_like(most_RK))
    # The quotient may round to just above the largest number. NaN stays NaN.
    code_RKD = (x_RKD / scale_RK[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return code_RKD.view(torch.uint8), scale_RK
