"""Granite 3 (dense): the build of Llama with factors of embeddings, scores, residual sums and logits (the ideas of
muP, arXiv 2203.03466)."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, extend, read_decoder
from headrace.models.decoder import Block, DecoderLM, attention, mlp, norm


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(ModelConfig):
    """What Granite has besides."""

    attention_scale: float
    residual_scale: float


def read(entries: Entries) -> GraniteConfig:
    """The configuration of a `granite` checkpoint."""
    attention_scale = entries.number("attention_multiplier", 1.0)
    residual_scale = entries.number("residual_multiplier", 1.0)
    config = read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        mlp_bias=entries.flag("mlp_bias", False),
        max_positions=2048,
        embedding_scale=entries.number("embedding_multiplier", 1.0),
        logits_divisor=entries.number("logits_scaling", 1.0),
    )
    return extend(GraniteConfig, config, attention_scale=attention_scale, residual_scale=residual_scale)


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, GraniteConfig)

    def block(layer: int) -> Block:
        return Block(
            attention(config, layer, place, scale=config.attention_scale),
            mlp(config, place),
            (norm(config, place), norm(config, place)),
            scale=config.residual_scale,
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
