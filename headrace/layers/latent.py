"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one short vector a token for all heads.

Keys and values of a head are linear maps of a token's latent c, and a rotated part p that all heads share:

    score = q_n^T W_k c + q_p^T p,    out = W_v sum_t w_t c_t

so that W_k can be moved to the query and W_v behind the sum. What is attended to is then one key/value head: keys
(c, p), values c. Letters: R rows, E model width, H heads, n and p sizes of a head's plain and rotated part, V of its
values, C of the latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.kernels.rotary import rotate_
from headrace.layers.linear import Linear
from headrace.layers.norm import RMSNorm
from headrace.layers.placement import Placement, cut
from headrace.layers.rotary import Rotation
from headrace.step import LayerState, StepContext

EPS = 1e-6
"""Of the norms of latents, whatever the configuration says of others."""


class LatentAttention(nn.Module):
    """One attention layer.

    Args:
        layer: index by which the step knows this layer's cache.
        width: model width E.
        heads: H, which ranks divide.
        query_latent: size of the queries' own latent; 0: queries are made from x.
        latent: C.
        plain, rotated, values: sizes n, p and V.
        bias: of the projections of x and of the output.
        interleaved: whether neighbours of the rotated part are a pair; else the halves are.
        scale: factor of the scores.
        place: device and type of the parameters.
    """

    def __init__(
        self,
        layer: int,
        *,
        width: int,
        heads: int,
        query_latent: int,
        latent: int,
        plain: int,
        rotated: int,
        values: int,
        bias: bool,
        interleaved: bool,
        scale: float,
        place: Placement,
    ) -> None:
        super().__init__()
        place.refuse_parity("the model has latent attention")
        heads, parts = place.ranks.share(heads, "num_attention_heads")
        self.ranks = place.ranks
        self.layer, self.heads, self.latent = layer, heads, latent
        self.plain, self.rotated, self.values = plain, rotated, values
        self.interleaved, self.scale = interleaved, scale
        queries = heads * (plain + rotated)
        # Latents are for all heads: every rank makes them.
        widths, cuts = [query_latent or queries, latent + rotated], (1 if query_latent else parts, 1)
        self.inputs = Linear(width, widths, bias=bias, place=place, split="outputs", parts=cuts)
        self.query = Linear(query_latent, [queries], bias=False, place=place, split="outputs") if query_latent else None
        self.query_norm = RMSNorm(query_latent, EPS, place) if query_latent else None
        self.latent_norm = RMSNorm(latent, EPS, place)
        self.key_value_HXC = place.empty(heads, plain + values, latent)
        self.out = Linear(heads * values, [width], bias=bias, place=place, split="inputs")

    @property
    def state(self) -> LayerState:
        """What this layer keeps for a request: one head of latents."""
        return LayerState("paged", 1, self.latent + self.rotated, self.latent, values_in_keys=True)

    def mix(
        self, x_RE: Tensor, norm: tuple[Tensor, float] | None, rotation: Rotation | None, ctx: StepContext
    ) -> Tensor:
        """What the heads bring for each row, side by side: the input of `out`. `norm`: weight and eps of x's norm."""
        rows = x_RE.shape[0]
        made_RX, latent_RC, p_Rp = self.inputs.forward(x_RE, norm).split(
            (self.inputs.outputs[0], self.latent, self.rotated), 1
        )
        if self.query is not None and self.query_norm is not None:
            made_RX = self.query.forward(*self.query_norm.before(made_RX))
        n_RHn, p_RHp = made_RX.reshape(rows, self.heads, -1).split((self.plain, self.rotated), 2)
        turned_RXp = torch.cat((p_RHp, p_Rp[:, None]), 1)
        if self.interleaved:
            turned_RXp = turned_RXp.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2)
        if rotation is not None:
            rotate_(turned_RXp, *rotation.pair)
        key_HnC, value_HVC = self.key_value_HXC.split((self.plain, self.values), 1)
        q_RHC = torch.bmm(n_RHn.transpose(0, 1), key_HnC).transpose(0, 1)
        c_R1C = self.latent_norm.forward(latent_RC)[:, None]
        p_RHp, p_R1p = turned_RXp.split((self.heads, 1), 1)
        out_RHC = ctx.attend(
            self.layer, torch.cat((q_RHC, p_RHp), 2), torch.cat((c_R1C, p_R1p), 2), c_R1C, scale=self.scale
        )
        out_HRV = torch.bmm(out_RHC.transpose(0, 1), value_HVC.transpose(1, 2))
        return out_HRV.transpose(0, 1).reshape(rows, self.heads * self.values)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        first = "q_proj" if self.query is None else "q_a_proj"
        found = self.inputs.tensors(f"{name}.{first}", f"{name}.kv_a_proj_with_mqa")
        if self.query is not None and self.query_norm is not None:
            found |= self.query_norm.tensors(f"{name}.q_a_layernorm") | self.query.tensors(f"{name}.q_b_proj")
        found |= self.latent_norm.tensors(f"{name}.kv_a_layernorm")
        found[f"{name}.kv_b_proj.weight"] = cut(self.key_value_HXC.data.flatten(0, 1), 0, self.ranks)
        return found | self.out.tensors(f"{name}.o_proj")
