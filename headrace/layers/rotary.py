"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways of stretching it to longer contexts.

Pair i = (x[i], x[i + D/2]) of a head turns by pos * f_i with f_i = theta^(-2i/D), times a common length factor.
Scalings change f: linear (pos / factor), dynamic (NTK-aware), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753),
llama3 (Llama 3.1), proportional (only the first pairs turn). The frequencies are fixed when a model is loaded:
were they to follow the length of the running sequence, a token's key would depend on how the sequence was cut
into steps. Letters: R rows, N heads, D head size, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from headrace.kernels.rotary import rotate_
from headrace.layers.placement import Placement

__all__ = ["SCALINGS", "RopeConfig", "Rotary", "Rotation", "inverse_frequencies", "rotate_"]

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotation. Fields that a scaling does not use keep their defaults."""

    scaling: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_positions: int = 0
    """Positions the model was trained on before it was stretched (yarn, longrope, llama3)."""
    attention_factor: float | None = None
    """Length factor of rotated queries and keys (yarn, longrope); None: the formula of the paper."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    """yarn: round the bounds of the ramp to whole pairs."""
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    rotated: float = 1.0
    """Share of a head that turns: its first numbers; with proportional the first pairs of the whole head."""

    def size(self, head_dim: int) -> int:
        """Numbers of a head, from its first on, that the rotation takes."""
        return head_dim if self.scaling == "proportional" else int(head_dim * self.rotated)

    def reach(self, max_position_embeddings: int) -> int:
        """Positions for which the rotation is defined, given the checkpoint's `max_position_embeddings`."""
        if self.scaling == "linear":
            return int(max_position_embeddings * self.factor)
        if self.scaling == "yarn":
            return max(max_position_embeddings, int(self.original_positions * self.factor))
        return max_position_embeddings


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, max_model_len: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, float]:
    """Angles a position step [D/2] on the CPU, and the length factor.

    `max_model_len` decides between the short and the long factors of longrope: short up to the original
    positions, long beyond. (transformers decides anew in every forward, by the longest sequence so far.)
    dynamic has the default frequencies: it differs from them only beyond `max_position_embeddings`, where the
    angles would depend on the sequence's length, and such lengths are refused when the model is built.
    """
    # The order of operations is that of transformers, to the bit in float32: at position 100,000 a last-bit
    # difference of a frequency is an angle of 0.006.
    exponent = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
    base = rope.theta**exponent
    if rope.scaling == "linear":
        return (1.0 / base) / rope.factor, 1.0
    if rope.scaling == "yarn":
        return _yarn(rope, base, head_dim), _yarn_length(rope)
    if rope.scaling == "longrope":
        stretch = rope.long_factor if max_model_len > rope.original_positions else rope.short_factor
        return 1.0 / (torch.tensor(stretch, dtype=dtype) * base), _longrope_length(rope)
    if rope.scaling == "llama3":
        return _llama3(rope, 1.0 / base), 1.0
    if rope.scaling == "proportional":
        turning = int(rope.rotated * head_dim // 2)
        f = 1.0 / base
        f[turning:] = 0.0
        return f / rope.factor, 1.0
    return 1.0 / base, 1.0


def _yarn(rope: RopeConfig, base: Tensor, head_dim: int) -> Tensor:
    """Pairs that turn often keep their frequency, slow ones are divided by the factor, a ramp lies between."""

    def pair_with(turns: float) -> float:
        """The (fractional) pair that makes so many turns within the original positions."""
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    pairs = torch.arange(head_dim // 2, dtype=base.dtype)
    keep = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * base) * (1 - keep) + 1.0 / base * keep


def _yarn_length(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def length(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return length(rope.mscale) / length(rope.mscale_all_dim)
    return length(1.0)


def _longrope_length(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_positions))


def _llama3(rope: RopeConfig, f: Tensor) -> Tensor:
    """Long waves are divided by the factor, short ones kept, those between blended."""
    wave = 2 * math.pi / f
    blend = (rope.original_positions / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - blend) * f / rope.factor + blend * f
    long = wave > rope.original_positions / rope.low_freq_factor
    short = wave < rope.original_positions / rope.high_freq_factor
    return torch.where(long, f / rope.factor, torch.where(short, f, mixed))


class Rotation:
    """The angles of a step's rows: as tables and positions, and gathered where that is asked for."""

    def __init__(self, rotary: Rotary, pos_R: Tensor) -> None:
        self.size = rotary.size
        self.cos_PD, self.sin_PD, self.pos_R = rotary.cos_PD, rotary.sin_PD, pos_R
        self._rotary = rotary

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """What `rotate_` takes."""
        return self._rotary.forward(self.pos_R)


class Rotary(nn.Module):
    """Cosines and sines of all positions below `max_model_len`, looked up once a step.

    The tables are float32 (float64 for float64 models) and cast to the model's type after the look-up. `size` is the
    part of a head that turns; D stands for it here.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_model_len: int, place: Placement) -> None:
        super().__init__()
        self.dtype = place.dtype
        self.size = rope.size(head_dim)
        table_dtype = place.widened().dtype
        f_D, length = inverse_frequencies(rope, self.size, max_model_len, table_dtype)
        if (
            place.device.type == "meta"
        ):  # for an outline, where arithmetic makes torch import a second's worth of modules
            shape = (max_model_len, len(f_D))
            self.cos_PD, self.sin_PD = (
                nn.Buffer(torch.empty(shape, dtype=table_dtype, device=place.device), persistent=False) for _ in "cs"
            )
            return
        pos_P = torch.arange(max_model_len, dtype=table_dtype, device=place.device)
        angle_PD = pos_P[:, None] * f_D.to(place.device)  # D/2 wide: both halves of a head turn alike
        self.cos_PD = nn.Buffer(angle_PD.cos() * length, persistent=False)
        self.sin_PD = nn.Buffer(angle_PD.sin() * length, persistent=False)

    def forward(self, pos_R: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [R, 1, D] of integer positions [R], in the form that `rotate_` takes."""
        cos_RD = self.cos_PD.index_select(0, pos_R).to(self.dtype)
        sin_RD = self.sin_PD.index_select(0, pos_R).to(self.dtype)
        return torch.cat((cos_RD, cos_RD), -1)[:, None], torch.cat((-sin_RD, sin_RD), -1)[:, None]
