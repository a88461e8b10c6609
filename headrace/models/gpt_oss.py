"""gpt-oss (arXiv 2508.10925): attention sinks, windows in every other layer, experts with biases and a clamped gate.

Checkpoints with expert weights in 16 or 32 bits; MXFP4 is refused as other quantised weights are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.layers.moe import ExpertNames, MixtureMLP, Routing, clamped_swiglu
from headrace.layers.placement import Placement
from headrace.layers.rotary import RopeConfig
from headrace.models.config import Entries, ModelConfig, extend, read_decoder, read_windows
from headrace.models.decoder import Block, DecoderLM, attention, norm
from headrace.models.mixtral import training_only

THETA = 150_000.0
NAMES = ExpertNames(router="router", stacked=True)


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    """What gpt-oss has besides."""

    routing: Routing
    alpha: float
    limit: float
    """See `clamped_swiglu`."""


def read(entries: Entries) -> GptOssConfig:
    """The configuration of a `gpt_oss` checkpoint."""
    key = "num_experts" if "num_experts" in entries.raw else "num_local_experts"
    experts = entries.integer(key, 128)
    picked = entries.integer("num_experts_per_tok", 4, high=experts)
    for alias in ("experts_per_token", "initial_context_length"):
        entries.get(alias)  # said twice in the published files
    alpha, limit = entries.number("swiglu_alpha", 1.702), entries.number("swiglu_limit", 7.0)
    training_only(entries)
    scaled: dict[str, Any] = {}
    if not entries.raw.get("rope_parameters") and not entries.raw.get("rope_scaling"):
        theta = entries.number("rope_theta", THETA)
        scaled["rope"] = RopeConfig("yarn", theta, factor=32.0, original_positions=4096, truncate=False)
    config = read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", True),
        kv_heads=8,
        head_dim=64,
        max_positions=131072,
        windows=read_windows(entries, lambda layer: layer % 2 == 0, size=128),
        norm_eps=1e-5,
        theta=THETA,
        **scaled,
    )
    routing = Routing(experts, picked, score="softmax_of_picked", bias=True)
    return extend(GptOssConfig, config, routing=routing, alpha=alpha, limit=limit)


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, GptOssConfig)
    gate = clamped_swiglu(config.alpha, config.limit)

    def block(layer: int) -> Block:
        width, hidden = config.hidden_size, config.intermediate_size
        return Block(
            attention(config, layer, place, sinks=True),
            MixtureMLP(width, hidden, routing=config.routing, place=place, bias=True, gate=gate, names=NAMES),
            (norm(config, place), norm(config, place)),
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
