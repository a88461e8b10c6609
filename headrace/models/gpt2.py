"""GPT-2 (Radford, 2019): learned positions, layer norms, a plain feed-forward layer, weights as [inputs, outputs]."""

from __future__ import annotations

from headrace.layers.mlp import PlainMLP
from headrace.layers.norm import LayerNorm
from headrace.layers.placement import Placement
from headrace.models.config import ACTIVATIONS, Entries, ModelConfig, read_decoder
from headrace.models.decoder import Block, BlockNames, DecoderLM, ModelNames, attention

RENAMED = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
}
BLOCK_NAMES = BlockNames(attention="attn", attention_norm="ln_1", mlp_norm="ln_2")
MODEL_NAMES = ModelNames(
    "transformer.wte",
    "transformer.h",
    "transformer.ln_f",
    positions="transformer.wpe",
    prefix="transformer.",
    ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",  # the causal mask
)


def read(entries: Entries) -> ModelConfig:
    """The configuration of a `gpt2` checkpoint."""
    entries = Entries({RENAMED.get(key, key): value for key, value in entries.raw.items()}, entries.where)
    entries.fixed(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for inert in ("reorder_and_upcast_attn", "n_ctx", *(key for key in entries.raw if key.startswith("summary_"))):
        entries.get(inert)
    width = entries.integer("hidden_size", 768)
    return read_decoder(
        entries,
        attention_bias=True,
        mlp_bias=True,
        max_positions=1024,
        norm_eps=1e-5,
        tied=True,
        hidden=4 * width,
        activation=entries.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        layer_ropes=(None,) * entries.integer("num_hidden_layers", 12),
    )


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""

    def ln() -> LayerNorm:
        return LayerNorm(config.hidden_size, config.norm_eps, place)

    def block(layer: int) -> Block:
        options = {"names": ["c_attn"], "out_name": "c_proj", "transposed": True}
        return Block(
            attention(config, layer, place, **options),
            PlainMLP(config.hidden_size, config.intermediate_size, place=place, activation=config.activation),
            (ln(), ln()),
            names=BLOCK_NAMES,
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place, final_norm=ln, names=MODEL_NAMES)
