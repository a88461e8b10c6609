"""Qwen3 (arXiv 2505.09388): RMS norm of every query and key head before the rotation; head size apart from width."""

from __future__ import annotations

from headrace.layers.attention import HeadNorm
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder, read_upper_windows
from headrace.models.decoder import DecoderLM, block


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `qwen3` checkpoint."""
    return read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        kv_heads=32,
        head_dim=128,
        max_positions=32768,
        windows=read_upper_windows(entries),
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    return DecoderLM(
        config,
        lambda layer: block(config, layer, place, qk_norm=HeadNorm(config.norm_eps)),
        max_model_len=max_model_len,
        place=place,
    )
