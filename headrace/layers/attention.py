"""Attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245), up to the cache and back.

out = W_o attend(rope(norm(W_q x)), rope(norm(W_k x)), W_v x): what the rows see, and where their keys and values
are kept, is the step's business. Letters: R rows, E model width, H query heads, K key/value heads, D head size,
N heads of the product (H + 2 K).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rotary import rotate_
from headrace.layers.linear import Linear
from headrace.layers.placement import Placement, cut
from headrace.layers.rotary import Rotation
from headrace.step import LayerState, StepContext, Turn

QKV = ("q_proj", "k_proj", "v_proj")
"""Names of the input projections in most checkpoints."""


class Mixer(Protocol):
    """What a block asks of its attention, whichever it is."""

    out: Linear
    """The output projection."""

    @property
    def state(self) -> LayerState:
        """What this layer keeps for a request."""
        ...

    def mix(
        self, x_RE: Tensor, norm: tuple[Tensor, float] | None, rotation: Rotation | None, ctx: StepContext
    ) -> Tensor:
        """The input of `out`. `norm`: weight and eps of an RMS norm of x that is left to do."""
        ...

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        ...


@dataclass(frozen=True)
class HeadNorm:
    """RMS normalisation of queries and keys before the rotation."""

    eps: float
    whole: bool = False
    """All query heads of a row together, and all its key heads (OLMo 2); else every head for itself (Qwen3)."""
    offset: float = 0.0
    """See RMSNorm."""


class Attention(nn.Module):
    """One attention layer.

    Args:
        layer: index by which the step knows this layer's cache.
        width: model width E.
        heads, kv_heads, head_dim: H, K and D; H is a multiple of K. Ranks divide the heads; where there are fewer
            key/value heads than ranks, neighbours hold the same one.
        qkv_bias, out_bias: biases of the input and output projections.
        qk_norm: the norm of queries and keys; None: there is none.
        window: tokens that a row sees, itself included; 0: all.
        place: device and type of the parameters.
        scale: factor of the scores; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118); 0: they stay.
        sinks: whether each head has a logit of its own in the softmax's denominator (arXiv 2309.17453, gpt-oss).
        names: checkpoint names of the input projections, or of all of them stored as one.
        out_name: that of the output projection.
        transposed: whether the checkpoint stores weights as [inputs, outputs].

    Raises:
        ConfigError: ranks cannot divide the heads.
    """

    def __init__(
        self,
        layer: int,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: HeadNorm | None,
        window: int,
        place: Placement,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: bool = False,
        names: Sequence[str] = QKV,
        out_name: str = "o_proj",
        transposed: bool = False,
    ) -> None:
        super().__init__()
        heads, parts = place.ranks.share(heads, "num_attention_heads")
        kv_heads, kv_parts = place.ranks.share_or_copy(kv_heads, "num_key_value_heads")
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, heads, kv_heads, head_dim
        self.window, self.softcap = window, softcap
        self.qk_norm = qk_norm
        self.scale = head_dim**-0.5 if scale is None else scale
        self.names, self.out_name, self.transposed = tuple(names), out_name, transposed
        widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        self.qkv = Linear(width, widths, bias=qkv_bias, place=place, split="outputs", parts=(parts, kv_parts, kv_parts))
        self.out = Linear(heads * head_dim, [width], bias=out_bias, place=place, split="inputs")
        self.ranks = place.ranks
        self.sinks_H = place.empty(heads) if sinks else None
        self.norm_ND: nn.Parameter | None = None
        if qk_norm is not None:
            # One weight a head although heads may share it: queries and keys are then normalised in one operation.
            self.norm_ND = (place.widened() if qk_norm.offset else place).empty(heads + kv_heads, head_dim)

    @property
    def state(self) -> LayerState:
        """What this layer keeps for a request."""
        kind = "window" if self.window else "paged"
        return LayerState(kind, self.kv_heads, self.head_dim, self.head_dim, self.window)

    def mix(
        self, x_RE: Tensor, norm: tuple[Tensor, float] | None, rotation: Rotation | None, ctx: StepContext
    ) -> Tensor:
        """What the heads bring for each row, side by side: the input of `out`. `norm`: weight and eps of x's norm.

        Without a rotation queries and keys stay as they are.
        """
        rows = x_RE.shape[0]
        heads, kv_heads = self.heads, self.kv_heads
        qkv_RND = self.qkv.forward(x_RE, norm).view(rows, heads + 2 * kv_heads, self.head_dim)
        whole = self.qk_norm is not None and self.qk_norm.whole
        turn = None
        if ctx.turns and not whole and rotation is not None and rotation.size == self.head_dim:
            turn = Turn(qkv_RND, heads, kv_heads, self._head_norm, rotation.cos_PD, rotation.sin_PD, rotation.pos_R)
            q_RHD, k_RKD, v_RKD = qkv_RND.split((heads, kv_heads, kv_heads), 1)
        else:
            qk_RND, v_RKD = qkv_RND.split((heads + kv_heads, kv_heads), 1)
            q_RHD, k_RKD = self._turn(qk_RND, rotation).split((heads, kv_heads), 1)
        # Only a context with `turns` knows the argument.
        options = {} if turn is None else {"turn": turn}
        out_RHD = ctx.attend(
            self.layer, q_RHD, k_RKD, v_RKD, scale=self.scale, softcap=self.softcap, sinks_H=self.sinks_H, **options
        )
        return out_RHD.reshape(rows, heads * self.head_dim)

    @property
    def _head_norm(self) -> tuple[Tensor, float] | None:
        """Weights [H + K, D] and eps of the norm of queries and keys."""
        return None if self.norm_ND is None or self.qk_norm is None else (self.norm_ND, self.qk_norm.eps)

    def _turn(self, qk_RND: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries and keys, normalised and rotated; what is given may be overwritten."""
        norm = self._head_norm
        if norm is not None and self.qk_norm is not None and self.qk_norm.whole:
            weight_ND, eps = norm
            sizes = (self.heads, self.kv_heads)
            if self.ranks.size > 1:
                qk_RND = self._norm_over_ranks(qk_RND, weight_ND, eps)
            else:
                for x_RND, w_ND in zip(qk_RND.split(sizes, 1), weight_ND.split(sizes), strict=True):
                    x_RND.copy_(rms_norm(x_RND.flatten(1), w_ND.flatten(), eps).view(x_RND.shape))
        elif norm is not None:
            qk_RND = rms_norm(qk_RND, *norm)
        if rotation is not None:
            rotate_(qk_RND[..., : rotation.size], *rotation.pair)
        return qk_RND

    def _norm_over_ranks(self, qk_RND: Tensor, weight_ND: Tensor, eps: float) -> Tensor:
        """The norm over all query heads, and over all key heads, of which this rank has its share.

        All ranks have equally many, so the mean over all is the mean of the ranks' means.
        """
        sizes = (self.heads, self.kv_heads)
        wide_RND = qk_RND.to(torch.promote_types(qk_RND.dtype, torch.float32))
        mean_R2 = torch.stack([x_RND.square().mean((1, 2)) for x_RND in wide_RND.split(sizes, 1)], 1)
        self.ranks.all_reduce_(mean_R2)
        scale_R2 = torch.rsqrt(mean_R2 / self.ranks.size + eps)
        scale_RN = torch.cat([scale_R2[:, i : i + 1].expand(-1, n) for i, n in enumerate(sizes)], 1)
        return (wide_RND * scale_RN[:, :, None] * weight_ND).to(qk_RND.dtype)

    def loaded(self) -> None:
        """The parameters are the checkpoint's."""
        if self.norm_ND is not None and self.qk_norm is not None and self.qk_norm.offset:
            self.norm_ND.add_(self.qk_norm.offset)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        found = self.qkv.tensors(*(f"{name}.{part}" for part in self.names), transposed=self.transposed)
        found |= self.out.tensors(f"{name}.{self.out_name}", transposed=self.transposed)
        if self.sinks_H is not None:
            found[f"{name}.sinks"] = cut(self.sinks_H, 0, self.ranks)
        if self.norm_ND is not None and self.qk_norm is not None:
            sizes = (self.heads, self.kv_heads)
            for part, w_ND, parts in zip("qk", self.norm_ND.split(sizes), self.qkv.parts, strict=False):
                whole = self.qk_norm.whole
                found[f"{name}.{part}_norm.weight"] = cut(w_ND.flatten(), 0, self.ranks, parts) if whole else list(w_ND)
        return found
