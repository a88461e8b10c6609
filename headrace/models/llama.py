"""Llama 2, 3, 3.1, 3.2 (arXiv 2307.09288, 2407.21783) and models of the same build: no biases unless configured."""

from __future__ import annotations

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder
from headrace.models.decoder import DecoderLM, block


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
    return DecoderLM(
        config,
        lambda layer: block(config, layer, place),
        max_model_len=max_model_len,
        place=place,
    )
