"""OLMo 2 (arXiv 2501.00656): norms behind the layers instead of in front, and over all query and all key heads."""

from __future__ import annotations

from headrace.layers.attention import HeadNorm
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder
from headrace.models.decoder import Block, DecoderLM, attention, mlp, norm


def read(entries: Entries) -> ModelConfig:
    """The configuration of an `olmo2` checkpoint."""
    return read_decoder(
        entries, attention_bias=entries.flag("attention_bias", False), max_positions=2048, norm_eps=1e-5
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""

    def block(layer: int) -> Block:
        return Block(
            attention(config, layer, place, qk_norm=HeadNorm(config.norm_eps, whole=True)),
            mlp(config, place),
            (None, None),
            after=(norm(config, place), norm(config, place)),
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
