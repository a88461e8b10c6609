"""Gemma 3, text (arXiv 2503.19786): Gemma 2 with normalised queries and keys instead of caps, windows in five of six
layers, which have a rotation of their own."""

from __future__ import annotations

from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.layers.placement import Placement
from headrace.models import gemma2
from headrace.models.config import Entries, ModelConfig, parse_rope, read_windows
from headrace.models.decoder import DecoderLM

THETA, LOCAL_THETA = 1_000_000.0, 10_000.0
POSITIONS = 131072


def read(entries: Entries) -> gemma2.GemmaConfig:
    """The configuration of a `gemma3_text` checkpoint."""
    pattern = entries.integer("sliding_window_pattern", entries.integer("_sliding_window_pattern", 6))
    windows = read_windows(entries, lambda layer: (layer + 1) % pattern != 0, size=4096)
    head_dim = entries.integer("head_dim", 256)
    positions = entries.integer("max_position_embeddings", POSITIONS)
    whole, local = (
        parse_rope(Entries(raw, f"{entries.where}: rope of {kind}"), entries, head_dim, positions, theta=theta)
        for kind, raw, theta in _ropes(entries)
    )
    return gemma2.read_gemma(
        entries,
        windows,
        caps=(None, None),
        positions=POSITIONS,
        qk_norm=True,
        rope=whole,
        layer_ropes=tuple(local if window else whole for window in windows),
    )


def _ropes(entries: Entries) -> list[tuple[str, dict[str, Any], float]]:
    """Name, parameters and default theta of the rotation of whole and of window layers, old style or new."""
    new, old = entries.get("rope_parameters") or {}, entries.get("rope_scaling") or {}
    theta = entries.number("rope_theta", THETA)
    local = entries.number("rope_local_base_freq", LOCAL_THETA)
    if not isinstance(new, dict) or not isinstance(old, dict):
        raise UnsupportedModelError(f"{entries.where}: rope_parameters is {new!r}; it must be an object")
    if "full_attention" not in new and "sliding_attention" not in new:
        return [("full_attention", {**old, **new}, theta), ("sliding_attention", {}, local)]
    named = {"full_attention": {**old, **(new.get("full_attention") or {})}}
    named["sliding_attention"] = new.get("sliding_attention") or {}
    left = set(new) - set(named)
    if left:
        raise UnsupportedModelError(
            f"{entries.where}: rope_parameters names {', '.join(sorted(left))}: not implemented"
        )
    return [
        ("full_attention", named["full_attention"], theta),
        ("sliding_attention", named["sliding_attention"], local),
    ]


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    return gemma2.build(config, max_model_len=max_model_len, place=place)
