"""The decoder stack shared by families: x += attention(norm(x)); x += mlp(norm(x)); norm at the end.

A family file says which attention and which feed-forward layer each block has, and where its norms stand; this file
joins them to embedding, rotation and head. Letters: R rows, M output rows, E model width, D head size, V vocabulary,
P positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.errors import ConfigError
from headrace.kernels.project import project
from headrace.kernels.project_fixed import project_fixed
from headrace.layers.attention import Attention, Mixer
from headrace.layers.mlp import FeedForward, GatedMLP
from headrace.layers.norm import Norm, RMSNorm
from headrace.layers.placement import Placement
from headrace.layers.rotary import RopeConfig, Rotary, Rotation
from headrace.models.base import CausalLM
from headrace.models.config import ModelConfig
from headrace.step import LayerState, StepContext


@dataclass(frozen=True)
class BlockNames:
    """Checkpoint names of a block's parts, below the block's own. Of norms those that it has."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    attention_after: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_after: str = "post_feedforward_layernorm"


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream.

    Args:
        attention, mlp: the two.
        norms: in front of either.
        after: behind either, before the sum.
        scale: factor of what either adds (Granite).
        names: of the parts, as the checkpoint has them.
    """

    def __init__(
        self,
        attention: Mixer,
        mlp: FeedForward,
        norms: tuple[Norm | None, Norm | None],
        *,
        after: tuple[Norm | None, Norm | None] = (None, None),
        scale: float = 1.0,
        names: BlockNames | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norms
        self.attention_after, self.mlp_after = after
        self.scale = scale
        self.names = names or BlockNames()

    def forward(
        self, x_RE: Tensor, rotation: Rotation | None, ctx: StepContext, wanted_M: Tensor | None = None
    ) -> Tensor:
        """The residual stream after this layer; x is overwritten. With `wanted_M` only those rows of it."""
        # `forward` by name: calling a module looks for hooks first, which costs more than a norm at small widths.
        mixed = self.attention.mix(*_before(self.attention_norm, x_RE), rotation, ctx)
        if wanted_M is not None:
            x_RE, mixed = x_RE.index_select(0, wanted_M), mixed.index_select(0, wanted_M)
        if self.attention_after is None and self.scale == 1.0:
            self.attention.out.add_to(x_RE, mixed)
        else:
            self._add(x_RE, self.attention.out.forward(mixed), self.attention_after)
        if self.mlp_after is None and self.scale == 1.0:
            self.mlp.add_to(x_RE, *_before(self.mlp_norm, x_RE))
        else:
            self._add(x_RE, self.mlp.forward(*_before(self.mlp_norm, x_RE)), self.mlp_after)
        return x_RE

    def _add(self, x_RE: Tensor, y_RE: Tensor, norm: Norm | None) -> None:
        x_RE.add_(y_RE if norm is None else norm.forward(y_RE), alpha=self.scale)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """Where the checkpoint tensors below `name` go."""
        names = self.names
        found = self.attention.tensors(f"{name}.{names.attention}") | self.mlp.tensors(f"{name}.{names.mlp}")
        for part in ("attention_norm", "attention_after", "mlp_norm", "mlp_after"):
            norm: Norm | None = getattr(self, part)
            if norm is not None:
                found |= norm.tensors(f"{name}.{getattr(names, part)}")
        return found


def _before(norm: Norm | None, x_RE: Tensor) -> tuple[Tensor, tuple[Tensor, float] | None]:
    return (x_RE, None) if norm is None else norm.before(x_RE)


def attention(config: ModelConfig, layer: int, place: Placement, **options: Any) -> Attention:
    """The attention of a layer as the configuration has it; `options` are those of `Attention` that differ."""
    usual: dict[str, Any] = {
        "width": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "qkv_bias": config.attention_bias,
        "out_bias": config.attention_bias,
        "qk_norm": None,
        "window": config.windows[layer],
    }
    return Attention(layer, place=place, **(usual | options))


def mlp(config: ModelConfig, place: Placement, **options: Any) -> GatedMLP:
    """The feed-forward layer as the configuration has it; `options` are those of `GatedMLP` that differ."""
    usual: dict[str, Any] = {"bias": config.mlp_bias, "activation": config.activation}
    return GatedMLP(config.hidden_size, config.intermediate_size, place=place, **(usual | options))


def norm(config: ModelConfig, place: Placement) -> RMSNorm:
    """A norm of the residual stream as the configuration has it."""
    return RMSNorm(config.hidden_size, config.norm_eps, place, config.norm_offset)


def block(config: ModelConfig, layer: int, place: Placement, **options: Any) -> Block:
    """The most common block: attention and a gated feed-forward layer, each behind an RMS norm. `options`: see
    `attention`."""
    norms = norm(config, place), norm(config, place)
    return Block(attention(config, layer, place, **options), mlp(config, place), norms)


@dataclass(frozen=True)
class ModelNames:
    """Checkpoint names of what stands outside the blocks."""

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    positions: str = ""
    prefix: str = ""
    """See CausalLM."""
    ignored: str = ""
    """Names of tensors that are not loaded, a regular expression."""


class DecoderLM(CausalLM):
    """Embedding, blocks, final norm and head.

    Args:
        config: the checkpoint's configuration.
        block: makes the block of a layer, given its index.
        max_model_len: positions to prepare for; None: the checkpoint's `max_position_embeddings`.
        place: device and type of the parameters.
        final_norm: makes the norm behind the last block; None: the RMS norm of the configuration.
        names: of what stands outside the blocks, as the checkpoint has it. With `positions` there is a learned
            embedding of positions (GPT-2).

    Raises:
        ConfigError: max_model_len is beyond what the positions are defined for.
    """

    def __init__(
        self,
        config: ModelConfig,
        block: Callable[[int], Block],
        *,
        max_model_len: int | None,
        place: Placement,
        final_norm: Callable[[], Norm] | None = None,
        names: ModelNames | None = None,
    ) -> None:
        super().__init__()
        self.config, self.parity = config, place.parity
        self.names = names or ModelNames()
        self.prefix = self.names.prefix
        self.max_model_len = usable_len(config, max_model_len)
        self.embed_VE = place.empty(config.vocab_size, config.hidden_size)
        self.head_VE = (
            self.embed_VE if config.tie_word_embeddings else place.empty(config.vocab_size, config.hidden_size)
        )
        # Rounded to the model's type first, as the checkpoints were trained.
        self.embedding_scale = float(torch.tensor(config.embedding_scale, dtype=place.dtype))
        self.position_PE = None
        if self.names.positions:
            self.position_PE = place.empty(config.max_position_embeddings, config.hidden_size)
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        distinct: list[RopeConfig] = list(dict.fromkeys(rope for rope in ropes if rope is not None))
        self.rotaries = nn.ModuleList(Rotary(rope, config.head_dim, self.max_model_len, place) for rope in distinct)
        self._rotary_of = [None if rope is None else distinct.index(rope) for rope in ropes]
        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.norm = norm(config, place) if final_norm is None else final_norm()
        self._check_parity(place)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _check_parity(self, place: Placement) -> None:
        """Raise ConfigError for what torch computes on the CPU in vectors, and single numbers where a tensor ends."""
        config = self.config
        found = {
            f"activations {config.activation!r}": config.activation != "silu",
            "capped logits": bool(config.logits_softcap),
            "scaled residual sums": any(block.scale != 1.0 for block in self._blocks()),
        }
        for what, is_there in found.items():
            if is_there and place.device.type == "cpu":
                place.refuse_parity(f"the model has {what} and runs on the CPU", "use another model, or a GPU")

    def _rotations(self, pos_R: Tensor) -> list[Rotation]:
        return [Rotation(rotary, pos_R) for rotary in self.rotaries if isinstance(rotary, Rotary)]

    def layer_states(self) -> list[LayerState]:
        """One paged or window state a layer."""
        return [block.attention.state for block in self._blocks()]

    def forward(self, tok_R: Tensor, ctx: StepContext, wanted_M: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [R, E] or [M, E].

        Of the rows that are not wanted the last layer computes keys and values and nothing else: nobody reads more.
        """
        x_RE = embed(tok_R, self.embed_VE, ctx.soft_SE)
        if self.embedding_scale != 1.0:
            x_RE.mul_(self.embedding_scale)
        if self.position_PE is not None:
            x_RE += F.embedding(ctx.pos_AR[0], self.position_PE)
        rotations = self._rotations(ctx.pos_AR[0])
        blocks = self._blocks()
        for block, number in zip(blocks, self._rotary_of, strict=True):
            rotation = None if number is None else rotations[number]
            x_RE = block.forward(x_RE, rotation, ctx, wanted_M if block is blocks[-1] else None)
        return self.norm.forward(x_RE)

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Logits [M, V] in the model's type."""
        logits_MV = (project_fixed if self.parity else project)(hidden_ME, self.head_VE)
        if self.config.logits_divisor != 1.0:
            logits_MV.div_(self.config.logits_divisor)
        cap = self.config.logits_softcap
        return logits_MV.div_(cap).tanh_().mul_(cap) if cap else logits_MV

    def ignores(self, name: str) -> bool:
        """Whether the family's names say so."""
        return bool(self.names.ignored) and re.fullmatch(self.names.ignored, name) is not None

    def tensors(self) -> dict[str, list[Tensor]]:
        """Checkpoint names as transformers writes them, and the parameters they go to."""
        names = self.names
        found = {f"{names.embedding}.weight": [self.embed_VE.data]}
        if self.position_PE is not None:
            found[f"{names.positions}.weight"] = [self.position_PE.data]
        for layer, block in enumerate(self._blocks()):
            found |= block.tensors(f"{names.blocks}.{layer}")
        found |= self.norm.tensors(names.norm)
        if not self.config.tie_word_embeddings:
            found[f"{names.head}.weight"] = [self.head_VE.data]
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
