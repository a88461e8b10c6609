"""SmolLM3: the build of Llama with every fourth layer without rotation (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, read_decoder, read_rope, read_windows
from headrace.models.decoder import DecoderLM, block


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `smollm3` checkpoint."""
    num_layers = entries.integer("num_hidden_layers")
    interval = entries.integer("no_rope_layer_interval", 4)
    turns = entries.get("no_rope_layers")
    if turns is None:
        turns = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(turns, list) or len(turns) != num_layers or not all(turn in (0, 1) for turn in turns):
        raise entries.refuse("no_rope_layers", f"a list of num_hidden_layers = {num_layers} entries, each 0 or 1")
    windows = read_windows(entries, lambda layer: not turns[layer], on=entries.flag("use_sliding_window", False))
    width, heads = entries.integer("hidden_size"), entries.integer("num_attention_heads")
    rope = read_rope(
        entries,
        entries.integer("head_dim", max(width // heads, 1)),
        entries.integer("max_position_embeddings", 32768),
        theta=2_000_000.0,
    )
    return read_decoder(
        entries,
        attention_bias=entries.flag("attention_bias", False),
        mlp_bias=entries.flag("mlp_bias", False),
        kv_heads=4,
        max_positions=32768,
        windows=windows,
        tied=True,
        rope=rope,
        layer_ropes=tuple(rope if turn else None for turn in turns),
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    return DecoderLM(
        config,
        lambda layer: block(config, layer, place, out_bias=config.attention_bias),
        max_model_len=max_model_len,
        place=place,
    )
