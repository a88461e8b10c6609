"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.layers.moe import ExpertNames, MixtureMLP, Routing
from headrace.layers.placement import Placement
from headrace.models.config import Entries, ModelConfig, extend, read_decoder, read_windows
from headrace.models.decoder import Block, BlockNames, DecoderLM, attention, norm


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(ModelConfig):
    """What Mixtral has besides."""

    routing: Routing


NAMES = ExpertNames(gate="w1", up="w3", down="w2")


def read(entries: Entries) -> MixtralConfig:
    """The configuration of a `mixtral` checkpoint."""
    experts = entries.integer("num_local_experts", 8)
    routing = Routing(experts, entries.integer("num_experts_per_tok", 2, high=experts), normalise=True)
    training_only(entries)
    config = read_decoder(
        entries,
        attention_bias=False,
        kv_heads=8,
        max_positions=131072,
        windows=read_windows(entries, lambda layer: True),
        norm_eps=1e-5,
        theta=1_000_000.0,
    )
    return extend(MixtralConfig, config, routing=routing)


def training_only(entries: Entries) -> None:
    """Entries of mixtures of experts that change nothing in inference."""
    for key in ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux"):
        entries.get(key)


def build(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> DecoderLM:
    """An uninitialised model."""
    assert isinstance(config, MixtralConfig)

    def block(layer: int) -> Block:
        width, hidden = config.hidden_size, config.intermediate_size
        return Block(
            attention(config, layer, place),
            MixtureMLP(width, hidden, routing=config.routing, place=place, names=NAMES),
            (norm(config, place), norm(config, place)),
            names=BlockNames(mlp="block_sparse_moe"),
        )

    return DecoderLM(config, block, max_model_len=max_model_len, place=place)
