"""Attention with grouped key/value heads (Ainslie et al., arXiv 2305.13245), up to the cache and back.

out = W_o attend(rope(norm(W_q x)), rope(norm(W_k x)), W_v x): what the rows see, and where their keys and values
are kept, is the step's business. Letters: R rows, E model width, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from torch import Tensor, nn

from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rotary import rotate_
from headrace.layers.linear import Linear
from headrace.layers.placement import Placement
from headrace.layers.rotary import Rotation
from headrace.step import LayerState, StepContext, Turn


class Attention(nn.Module):
    """One attention layer.

    Args:
        layer: index by which the step knows this layer's cache.
        width: model width E.
        heads, kv_heads, head_dim: H, K and D; H is a multiple of K. Ranks divide the heads; where there are fewer
            key/value heads than ranks, neighbours hold the same one.
        qkv_bias, out_bias: biases of the input and output projections.
        qk_norm_eps: RMS normalisation of every query and key head before the rotation, with this eps; None: none.
        window: tokens that a row sees, itself included; 0: all.
        place: device and type of the parameters.
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
        qk_norm_eps: float | None,
        window: int,
        place: Placement,
    ) -> None:
        super().__init__()
        heads, parts = place.ranks.share(heads, "num_attention_heads")
        kv_heads, kv_parts = place.ranks.share_or_copy(kv_heads, "num_key_value_heads")
        self.layer, self.heads, self.kv_heads, self.head_dim = layer, heads, kv_heads, head_dim
        self.window = window
        self.qk_norm_eps = qk_norm_eps
        self.scale = head_dim**-0.5
        widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        self.qkv = Linear(width, widths, bias=qkv_bias, place=place, split="outputs", parts=(parts, kv_parts, kv_parts))
        self.out = Linear(heads * head_dim, [width], bias=out_bias, place=place, split="inputs")
        # One weight a head although the heads share it: queries and keys are then normalised in one operation.
        self.qk_norm = None if qk_norm_eps is None else place.empty(heads + kv_heads, head_dim)

    @property
    def state(self) -> LayerState:
        """What this layer keeps for a request."""
        kind = "window" if self.window else "paged"
        return LayerState(kind, self.kv_heads, self.head_dim, self.head_dim, self.window)

    def mix(self, x_RE: Tensor, norm: tuple[Tensor, float], rotation: Rotation, ctx: StepContext) -> Tensor:
        """What the heads bring for each row, side by side: the input of `out`. `norm`: weight and eps of x's norm."""
        rows, turned = x_RE.shape[0], self.heads + self.kv_heads
        qkv_RND = self.qkv.forward(x_RE, norm).view(rows, turned + self.kv_heads, self.head_dim)
        qk_norm = None
        if self.qk_norm is not None and self.qk_norm_eps is not None:
            qk_norm = self.qk_norm, self.qk_norm_eps
        if ctx.turns:
            tables = rotation.cos_PD, rotation.sin_PD, rotation.pos_R
            q_RHD, k_RKD, v_RKD = qkv_RND.split((self.heads, self.kv_heads, self.kv_heads), 1)
            turn = Turn(qkv_RND, self.heads, self.kv_heads, qk_norm, *tables)
            out_RHD = ctx.attend(self.layer, q_RHD, k_RKD, v_RKD, scale=self.scale, turn=turn)
        else:
            qk_RND, v_RKD = qkv_RND.split((turned, self.kv_heads), 1)
            if qk_norm is not None:
                qk_RND = rms_norm(qk_RND, *qk_norm)
            rotate_(qk_RND, *rotation.pair)
            q_RHD, k_RKD = qk_RND.split((self.heads, self.kv_heads), 1)
            out_RHD = ctx.attend(self.layer, q_RHD, k_RKD, v_RKD, scale=self.scale)
        return out_RHD.reshape(rows, self.heads * self.head_dim)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        found = self.qkv.tensors(*(f"{name}.{part}_proj" for part in "qkv"))
        found |= self.out.tensors(f"{name}.o_proj")
        if self.qk_norm is not None:
            found[f"{name}.q_norm.weight"] = list(self.qk_norm[: self.heads])
            found[f"{name}.k_norm.weight"] = list(self.qk_norm[self.heads :])
        return found
