"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): bias on query, key and value; sliding windows in upper layers."""

from __future__ import annotations

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder, read_upper_windows
from headrace.models.decoder import DecoderLM, block


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `qwen2` checkpoint."""
    return read_decoder(
        entries, attention_bias=True, kv_heads=32, max_positions=32768, windows=read_upper_windows(entries)
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    return DecoderLM(
        config,
        lambda layer: block(config, layer, place, out_bias=False),
        max_model_len=max_model_len,
        place=place,
    )
