"""Qwen3 (arXiv 2505.09388): RMS norm of every query and key head before the rotation; head size apart from width."""

from __future__ import annotations

from headrace.layers.attention import Attention
from headrace.layers.mlp import GatedMLP
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder
from headrace.models.decoder import Block, DecoderLM


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `qwen3` checkpoint."""
    return read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
        windows=True,
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""

    def block(layer: int) -> Block:
        attention = Attention(
            layer,
            width=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            qk_norm_eps=config.norm_eps,
            window=config.windows[layer],
            place=place,
        )
        return Block(
            attention, GatedMLP(config.hidden_size, config.intermediate_size, bias=False, place=place), config, place
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
