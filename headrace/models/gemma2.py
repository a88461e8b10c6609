"""Gemma 2 (arXiv 2408.00118): norms in front of and behind each layer, capped scores and logits, windows in every other
layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.errors import UnsupportedModelError
from headrace.layers.attention import HeadNorm
from headrace.layers.placement import Placement
from headrace.models.config import ACTIVATIONS, Entries, ModelConfig, extend, read_decoder, read_windows
from headrace.models.decoder import Block, BlockNames, DecoderLM, attention, mlp, norm


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """What Gemma 2 and 3 have besides."""

    attention_scale: float
    attention_softcap: float
    """See Attention."""
    qk_norm: bool


def read(entries: Entries) -> GemmaConfig:
    """The configuration of a `gemma2` checkpoint."""
    windows = read_windows(entries, lambda layer: layer % 2 == 0, size=4096)
    return read_gemma(entries, windows, caps=(50.0, 30.0), positions=8192, qk_norm=False)


def read_gemma(
    entries: Entries,
    windows: list[int],
    *,
    caps: tuple[float | None, float | None],
    positions: int,
    qk_norm: bool,
    **options: Any,
) -> GemmaConfig:
    """What Gemma 2 and 3 share. `caps`: defaults of the caps of scores and logits; `options`: see `read_decoder`."""
    if entries.get("use_bidirectional_attention"):
        raise UnsupportedModelError(
            f"{entries.where}: use_bidirectional_attention is true; a row here sees the tokens before it only"
        )
    bias = entries.flag("attention_bias", False)
    scores = entries.number_or_none("attn_logit_softcapping", caps[0])
    logits = entries.number_or_none("final_logit_softcapping", caps[1])
    scale = entries.number("query_pre_attn_scalar", 256) ** -0.5
    return extend(
        GemmaConfig,
        read_decoder(
            entries,
            attention_bias=bias,
            kv_heads=4,
            head_dim=256,
            max_positions=positions,
            windows=windows,
            tied=True,
            activation=entries.one_of("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
            norm_offset=1.0,
            embedding_scale=entries.integer("hidden_size") ** 0.5,
            logits_softcap=logits or 0.0,
            **options,
        ),
        attention_scale=scale,
        attention_softcap=scores or 0.0,
        qk_norm=qk_norm,
    )


NAMES = BlockNames(mlp_norm="pre_feedforward_layernorm")


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, GemmaConfig)
    qk_norm = HeadNorm(config.norm_eps, offset=config.norm_offset) if config.qk_norm else None

    def block(layer: int) -> Block:
        options = {"scale": config.attention_scale, "softcap": config.attention_softcap, "qk_norm": qk_norm}
        return Block(
            attention(config, layer, place, **options),
            mlp(config, place),
            (norm(config, place), norm(config, place)),
            after=(norm(config, place), norm(config, place)),
            names=NAMES,
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
