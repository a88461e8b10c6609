"""Mistral (arXiv 2310.06825): the build of Llama, in the first version with a sliding window in all layers."""

from __future__ import annotations

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder, read_windows
from headrace.models.decoder import DecoderLM, block


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `mistral` checkpoint."""
    return read_decoder(
        entries,
        attention_bias=False,
        kv_heads=8,
        max_positions=131072,
        windows=read_windows(entries, lambda layer: True, size=4096),
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    return DecoderLM(config, lambda layer: block(config, layer, place), max_model_len=max_model_len, place=place)
