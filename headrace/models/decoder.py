"""The pre-norm decoder stack shared by families: x += attention(norm(x)); x += mlp(norm(x)); norm at the end.

A family file says which attention and which feed-forward layer each block has; this file joins them to embedding,
rotation and head. Letters: R rows, M output rows, E model width, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.kernels.project import project
from headrace.layers.attention import Attention
from headrace.layers.mlp import GatedMLP
from headrace.layers.norm import RMSNorm
from headrace.layers.placement import Placement
from headrace.layers.rotary import Rotary, Rotation
from headrace.models.base import CausalLM
from headrace.models.config import ModelConfig
from headrace.step import LayerState, StepContext


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, attention: Attention, mlp: GatedMLP, config: ModelConfig, place: Placement) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, place)

    def forward(self, x_RE: Tensor, rotation: Rotation, ctx: StepContext, wanted_M: Tensor | None = None) -> Tensor:
        """The residual stream after this layer; x is overwritten. With `wanted_M` only those rows of it."""
        # `forward` by name: calling a module looks for hooks first, which costs more than a norm at small widths.
        mixed = self.attention.mix(x_RE, self.attention_norm.terms, rotation, ctx)
        if wanted_M is not None:
            x_RE, mixed = x_RE.index_select(0, wanted_M), mixed.index_select(0, wanted_M)
        self.attention.out.add_to(x_RE, mixed)
        self.mlp.add_to(x_RE, x_RE, self.mlp_norm.terms)
        return x_RE

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        found = self.attention_norm.tensors(f"{name}.input_layernorm") | self.attention.tensors(f"{name}.self_attn")
        return found | self.mlp_norm.tensors(f"{name}.post_attention_layernorm") | self.mlp.tensors(f"{name}.mlp")


class DecoderLM(CausalLM):
    """Embedding, blocks, final norm and head.

    Args:
        config: the checkpoint's configuration.
        block: makes the block of a layer, given its index.
        max_model_len: positions to prepare for; None: the checkpoint's `max_position_embeddings`.
        place: device and type of the parameters.

    Raises:
        ConfigError: max_model_len is beyond what the rotation is defined for.
    """

    def __init__(
        self, config: ModelConfig, block: Callable[[int], Block], *, max_model_len: int | None, place: Placement
    ) -> None:
        super().__init__()
        self.config = config
        self.max_model_len = usable_len(config, max_model_len)
        self.embed_VE = place.empty(config.vocab_size, config.hidden_size)
        self.head_VE = (
            self.embed_VE if config.tie_word_embeddings else place.empty(config.vocab_size, config.hidden_size)
        )
        self.rotary = Rotary(config.rope, config.head_dim, self.max_model_len, place)
        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, place)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def layer_states(self) -> list[LayerState]:
        """One paged or window state a layer."""
        return [block.attention.state for block in self._blocks()]

    def forward(self, tok_R: Tensor, ctx: StepContext, wanted_M: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [R, E] or [M, E].

        Of the rows that are not wanted the last layer computes keys and values and nothing else: nobody reads more.
        """
        x_RE = embed(tok_R, self.embed_VE, ctx.soft_SE)
        rotation = Rotation(self.rotary, ctx.pos_AR[0])
        blocks = self._blocks()
        for block in blocks:
            x_RE = block.forward(x_RE, rotation, ctx, wanted_M if block is blocks[-1] else None)
        return self.norm(x_RE)

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Logits [M, V] in the model's type."""
        return project(hidden_ME, self.head_VE)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Checkpoint names as transformers writes them, and the parameters they go to."""
        found = {"model.embed_tokens.weight": [self.embed_VE.data]}
        for layer, block in enumerate(self._blocks()):
            found |= block.tensors(f"model.layers.{layer}")
        found |= self.norm.tensors("model.norm")
        if not self.config.tie_word_embeddings:
            found["lm_head.weight"] = [self.head_VE.data]
        return found


def embed(tok_R: Tensor, embed_VE: Tensor, soft_SE: Tensor | None) -> Tensor:
    """Inputs [R, E] of the rows: the token's embedding, or for tok < 0 entry -1 - tok of `soft_SE`."""
    if soft_SE is None:
        return F.embedding(tok_R, embed_VE)
    is_soft_R = tok_R < 0
    soft_RE = F.embedding((-1 - tok_R).clamp(min=0), soft_SE)
    return torch.where(is_soft_R[:, None], soft_RE, F.embedding(tok_R.clamp(min=0), embed_VE))


def usable_len(config: ModelConfig, max_model_len: int | None) -> int:
    """The longest sequence the model is built for. Raises ConfigError if the rotation does not reach so far."""
    if max_model_len is None:
        return config.max_position_embeddings
    reach = config.rope.reach(config.max_position_embeddings)
    if max_model_len < 1:
        raise ConfigError(f"max_model_len is {max_model_len}; it must be at least 1")
    if max_model_len <= reach:
        return max_model_len
    if config.rope.scaling == "dynamic":
        raise ConfigError(
            f"max_model_len is {max_model_len}, but with rope scaling 'dynamic' the rotation beyond "
            f"max_position_embeddings = {reach} changes with the length of each sequence, so results would depend on "
            f"how it is cut into steps: use max_model_len <= {reach}, or rope_type 'yarn' or 'linear' in config.json"
        )
    raise ConfigError(
        f"max_model_len is {max_model_len}; the model holds {reach} positions (rope scaling {config.rope.scaling!r}): "
        f"use max_model_len <= {reach}, or set a rope scaling that stretches it in config.json"
    )
