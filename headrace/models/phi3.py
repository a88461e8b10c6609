"""Phi-3, Phi-3.5 and Phi-4 (arXiv 2404.14219, 2412.08905): query, key and value stored as one, gate and up too; part of
each head may stay unrotated."""

from __future__ import annotations

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder, read_windows
from headrace.models.decoder import Block, DecoderLM, attention, mlp, norm


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `phi3` checkpoint."""
    entries.get("original_max_position_embeddings")  # used with longrope only
    return read_decoder(
        entries,
        attention_bias=False,
        max_positions=4096,
        windows=read_windows(entries, lambda layer: True),
        partial_rotary=True,
        norm_eps=1e-5,
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""

    def block(layer: int) -> Block:
        return Block(
            attention(config, layer, place, names=["qkv_proj"]),
            mlp(config, place, names=["gate_up_proj"]),
            (norm(config, place), norm(config, place)),
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
