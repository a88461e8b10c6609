"""Llama 2, 3, 3.1, 3.2 (arXiv 2307.09288, 2407.21783) and models of the same build: no biases unless configured."""

from __future__ import annotations

from headrace.layers.attention import Attention
from headrace.layers.mlp import GatedMLP
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder
from headrace.models.decoder import Block, DecoderLM


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `llama` checkpoint."""
    return read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        mlp_bias=entries.flag("mlp_bias", False),
        max_positions=2048,
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
            qk_norm_eps=None,
            window=config.windows[layer],
            place=place,
        )
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, place=place)
        return Block(attention, mlp, config, place)

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
