"""DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437): latent attention, and experts of which some are for every row.

The layers that predict further tokens, which V3's checkpoints hold behind the last one, are not loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from headrace.errors import UnsupportedModelError
from headrace.layers.latent import LatentAttention
from headrace.layers.mlp import FeedForward
from headrace.layers.moe import MixtureMLP, Routing
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, extend, read_decoder
from headrace.models.decoder import Block, DecoderLM, ModelNames, mlp, norm
from headrace.models.mixtral import training_only


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """What DeepSeek has besides. `head_dim` is the rotated part of a head."""

    query_latent: int
    """0: queries have none."""
    latent: int
    plain_size: int
    value_size: int
    interleaved: bool
    routing: Routing
    expert_size: int
    shared_experts: int
    first_mixed: int
    """The first layer with experts."""
    further_layers: int
    """Layers behind the last one in the checkpoint, which are not loaded."""

    @property
    def attention_scale(self) -> float:
        """Factor of the scores; yarn's stretch adds its own, squared."""
        scale = (self.plain_size + self.head_dim) ** -0.5
        rope = self.rope
        if rope.scaling != "yarn" or not rope.mscale_all_dim or rope.factor <= 1.0:
            return scale
        return scale * float(0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def read_v2(entries: Entries) -> DeepseekConfig:
    """The configuration of a `deepseek_v2` checkpoint."""
    entries.fixed(norm_topk_prob=False, scoring_func="softmax")
    method = entries.one_of("topk_method", {"greedy": False, "group_limited_greedy": True}, "greedy")
    routing = _routing(entries, in_groups=method, normalise=False, scale=1.0)
    return _read(entries, routing, shared=2, first=0, positions=2048, heads=None)


def read_v3(entries: Entries) -> DeepseekConfig:
    """The configuration of a `deepseek_v3` checkpoint."""
    entries.fixed(topk_method="noaux_tc", scoring_func="sigmoid")
    normalise = entries.flag("norm_topk_prob", True)
    routing = _routing(entries, in_groups=True, normalise=normalise, scale=2.5, groups=8, picked_groups=4)
    routing = replace(routing, score="sigmoid", group_score="two", correction=True)
    return _read(entries, routing, shared=1, first=3, positions=4096, heads=128)


def _routing(
    entries: Entries, *, in_groups: bool, normalise: bool, scale: float, groups: int = 1, picked_groups: int = 1
) -> Routing:
    experts = entries.integer("n_routed_experts", 64 if groups == 1 else 256)
    picked = entries.integer("num_experts_per_tok", 8, high=experts)
    groups = entries.integer("n_group", groups)
    picked_groups = entries.integer("topk_group", picked_groups, high=groups)
    if experts % groups:
        raise entries.refuse("n_routed_experts", f"a multiple of n_group = {groups}")
    scale = entries.number("routed_scaling_factor", scale)
    if not in_groups:
        groups = picked_groups = 1
    return Routing(
        experts, picked, normalise=normalise, scale=scale, groups=groups, picked_groups=picked_groups, wide=True
    )


def _read(
    entries: Entries, routing: Routing, *, shared: int, first: int, positions: int, heads: int | None
) -> DeepseekConfig:
    sizes = {
        key: entries.integer(key, default)
        for key, default in (
            ("qk_rope_head_dim", 64),
            ("kv_lora_rank", 512),
            ("qk_nope_head_dim", 128),
            ("v_head_dim", 128),
            ("moe_intermediate_size", 1407 if heads is None else 2048),
            ("n_shared_experts", shared),
        )
    }
    rotated = sizes["qk_rope_head_dim"]
    query_latent = entries.number_or_none("q_lora_rank", 1536)
    bias = entries.flag("attention_bias", False)
    if bias and query_latent is None:
        raise UnsupportedModelError(
            f"{entries.where}: attention_bias is true and q_lora_rank null; biases need a q_lora_rank here"
        )
    first = entries.integer("first_k_dense_replace", first, low=0)
    interleaved = entries.flag("rope_interleave", True)
    further = entries.integer("num_nextn_predict_layers", 0, low=0)
    entries.fixed(moe_layer_freq=1, ep_size=1, head_dim=rotated, qk_head_dim=rotated + sizes["qk_nope_head_dim"])
    training_only(entries)
    entries.get("num_key_value_heads")  # of the form that is not kept; here there is one
    config = read_decoder(
        entries,
        attention_bias=bias,
        mlp_bias=entries.flag("mlp_bias", False),
        head_dim=rotated,
        max_positions=positions,
    )
    return extend(
        DeepseekConfig,
        config,
        query_latent=int(query_latent or 0),
        latent=sizes["kv_lora_rank"],
        plain_size=sizes["qk_nope_head_dim"],
        value_size=sizes["v_head_dim"],
        interleaved=interleaved,
        routing=routing,
        expert_size=sizes["moe_intermediate_size"],
        shared_experts=sizes["n_shared_experts"],
        first_mixed=first,
        further_layers=further,
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, DeepseekConfig)

    def feed_forward(layer: int) -> FeedForward:
        if layer < config.first_mixed:
            return mlp(config, place)
        shared = config.shared_experts * config.expert_size
        return MixtureMLP(config.hidden_size, config.expert_size, routing=config.routing, place=place, shared=shared)

    def block(layer: int) -> Block:
        attention = LatentAttention(
            layer,
            width=config.hidden_size,
            heads=config.num_heads,
            query_latent=config.query_latent,
            latent=config.latent,
            plain=config.plain_size,
            rotated=config.head_dim,
            values=config.value_size,
            bias=config.attention_bias,
            interleaved=config.interleaved,
            scale=config.attention_scale,
            place=place,
        )
        return Block(attention, feed_forward(layer), (norm(config, place), norm(config, place)))

    further = [str(config.num_layers + number) for number in range(config.further_layers)]
    names = ModelNames(ignored=rf"model\.layers\.({'|'.join(further)})\..*" if further else "")
    return DecoderLM(config, block, max_model_len=max_model_len, place=place, names=names)
