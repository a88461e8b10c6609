"""Qwen3-MoE (arXiv 2505.09388): Qwen3 with a mixture of experts in most layers."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.layers.attention import HeadNorm
from headrace.layers.mlp import FeedForward
from headrace.layers.moe import MixtureMLP, Routing
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, extend, read_decoder, read_windows
from headrace.models.decoder import Block, DecoderLM, attention, mlp, norm
from headrace.models.mixtral import training_only


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(ModelConfig):
    """What Qwen3-MoE has besides."""

    routing: Routing
    expert_size: int
    """Feed-forward width of an expert."""
    mixed_layers: frozenset[int]
    """Layers with experts."""


def read(entries: Entries) -> Qwen3MoeConfig:
    """The configuration of a `qwen3_moe` checkpoint."""
    key = "num_experts" if "num_experts" in entries.raw else "num_local_experts"
    experts = entries.integer(key, 128)
    picked = entries.integer("num_experts_per_tok", 8, high=experts)
    routing = Routing(experts, picked, normalise=entries.flag("norm_topk_prob", False))
    expert_size = entries.integer("moe_intermediate_size", 768)
    every = entries.integer("decoder_sparse_step", 1)
    plain = entries.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(layer, int) for layer in plain):
        raise entries.refuse("mlp_only_layers", "a list of layers")
    training_only(entries)
    config = read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        kv_heads=4,
        max_positions=32768,
        windows=read_windows(entries, lambda layer: True, on=entries.flag("use_sliding_window", False), size=4096),
    )
    mixed = frozenset(layer for layer in range(config.num_layers) if layer not in plain and (layer + 1) % every == 0)
    return extend(Qwen3MoeConfig, config, routing=routing, expert_size=expert_size, mixed_layers=mixed)


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, Qwen3MoeConfig)

    def feed_forward(layer: int) -> FeedForward:
        if layer not in config.mixed_layers:
            return mlp(config, place)
        return MixtureMLP(config.hidden_size, config.expert_size, routing=config.routing, place=place)

    def block(layer: int) -> Block:
        return Block(
            attention(config, layer, place, qk_norm=HeadNorm(config.norm_eps)),
            feed_forward(layer),
            (norm(config, place), norm(config, place)),
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
