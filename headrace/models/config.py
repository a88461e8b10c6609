"""A model's configuration, read from the config.json of its checkpoint.

Both styles are read: `rope_parameters` and `dtype` (transformers 5), `rope_theta`, `rope_scaling` and `torch_dtype`
(before). Every entry must be understood: one that is neither used, nor known to change nothing in inference, nor
switched off (null, false, 0, empty) is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from headrace.checks import show
from headrace.errors import ConfigError, UnsupportedModelError
from headrace.layers.rotary import SCALINGS, RopeConfig
from headrace.quantization import Quantization, read_quantization

C = TypeVar("C", bound="ModelConfig")

FULL, SLIDING = "full_attention", "sliding_attention"
"""What `layer_types` names."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""Names in config.json, and those of `headrace.layers.mlp.ACTIVATIONS`."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Entries that change nothing in inference: book-keeping, training, and defaults of text generation that older
# versions of transformers wrote into config.json.
INERT = re.compile(
    r"""
    _.* | unsloth.* | architectures | model_type | transformers_version | transformers\.js_config | auto_map
    | name_or_path | tokenizer_class | initializer_range | attention_dropout | hidden_dropout | embd_pdrop | attn_pdrop
    | resid_pdrop | gradient_checkpointing | neftune_noise_alpha | use_cache | pretraining_tp
    | max_sequence_length | attn_implementation | attention_implementation | is_decoder | return_dict
    | torchscript | use_bfloat16 | output_attentions | output_hidden_states | output_scores
    | return_dict_in_generate | id2label | label2id | problem_type | finetuning_task | task_specific_params
    | prefix | bos_token_id | pad_token_id | sep_token_id | unk_token_id | decoder_start_token_id
    | forced_bos_token_id | forced_eos_token_id | begin_suppress_tokens | suppress_tokens | bad_words_ids
    | remove_invalid_values | exponential_decay_length_penalty | temperature | top_k | top_p | typical_p
    | repetition_penalty | length_penalty | no_repeat_ngram_size | min_length | max_length
    | encoder_no_repeat_ngram_size | num_beams | num_beam_groups | diversity_penalty | num_return_sequences
    | do_sample | early_stopping | chunk_size_feed_forward | is_llama_config
    """,
    re.VERBOSE,
)


MOST = 2**31 - 1
"""Of any size: token ids and positions are 32-bit numbers."""
MOST_WIDTH = 2**24
"""So that the bytes of a weight can be counted in 64 bits."""
MOST_LAYERS = 1024
LARGEST = 1e30
"""Of any number: far from the end of float32."""


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and options of a decoder. Sizes are in elements, positions in tokens."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    windows: tuple[int, ...] = ()
    """Tokens that each layer's rows see, one entry a layer; 0: all."""
    layer_ropes: tuple[RopeConfig | None, ...] = ()
    """The rotation of each layer, None where there is none; empty: `rope` everywhere."""
    activation: str = "silu"
    """Of the feed-forward layers, a name of `headrace.layers.mlp.ACTIVATIONS`."""
    norm_offset: float = 0.0
    """What is added to the weights of norms."""
    embedding_scale: float = 1.0
    """Factor of the embeddings."""
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0
    """Logits become cap * tanh(logits / cap); 0: they stay."""
    dtype: torch.dtype | None = None
    """Type of the checkpoint, if the file says."""
    quantization: Quantization | None = None
    """The form in which the checkpoint stores the weights of linear maps; None: they are dense."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    architectures: tuple[str, ...] = field(default=(), compare=False)

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotation of a layer; None: it has none."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope


class Entries:
    """Typed access to config.json that remembers what was read.

    Raises UnsupportedModelError, naming entry, value and file, for missing or ill-typed entries.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self._read: set[str] = set()

    def get(self, key: str) -> Any:
        """The raw entry, or None."""
        self._read.add(key)
        return self.raw.get(key)

    def refuse(self, key: str, must: str) -> UnsupportedModelError:
        """The error for an entry whose value cannot be used."""
        return UnsupportedModelError(f"{self.where}: {key} is {show(self.raw.get(key))}; it must be {must}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: float = MOST) -> int:
        """A whole number from `low` to `high`; required if there is no default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not float(value).is_integer()
        ):
            names_most = high != MOST or (isinstance(value, int | float) and value > high)
            raise self.refuse(key, f"a whole number of at least {low}" + (f" and at most {high}" if names_most else ""))
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; required if there is no default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            raise self.refuse(key, "a positive number")
        return float(value)

    def number_or_none(self, key: str, default: float | None) -> float | None:
        """A positive number, or None where the file says null; the default where it has no such entry."""
        if key not in self.raw:
            return default
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def one_of(self, key: str, known: Mapping[str, Any], default: str) -> Any:
        """What a name stands for."""
        name = self.get(key)
        if name is None:
            name = default
        if not isinstance(name, str) or name not in known:
            raise self.refuse(key, f"one of {', '.join(map(repr, known))}")
        return known[name]

    def fixed(self, **values: Any) -> None:
        """Entries for which one value is implemented; null and missing are that value."""
        for key, must in values.items():
            if self.get(key) not in (None, must):
                raise self.refuse(key, f"{must!r}, the only value implemented for this model")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of positive numbers."""
        value = self.get(key)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x <= LARGEST for x in value)
        ):
            raise self.refuse(key, f"a list of {count} positive numbers")
        return tuple(float(x) for x in value)

    def finish(self) -> None:
        """Refuse entries that nobody read and that might change the model."""
        left = {
            key: value
            for key, value in self.raw.items()
            if key not in self._read and not INERT.fullmatch(key) and value
        }
        if left:
            listed = ", ".join(f"{key} = {_short(value)}" for key, value in left.items())
            raise UnsupportedModelError(
                f"{self.where}: {listed}: not implemented for this model; if the checkpoint does not need it, "
                "remove it from the file"
            )


def _short(value: Any) -> str:
    return show(value)


def read_decoder(
    entries: Entries,
    *,
    attention_bias: bool,
    mlp_bias: bool = False,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int | None = None,
    windows: Sequence[int] | None = None,
    partial_rotary: bool = False,
    norm_eps: float = 1e-6,
    tied: bool = False,
    theta: float = 10000.0,
    hidden: int | None = None,
    **options: Any,
) -> ModelConfig:
    """The entries that all families share; the arguments are the family's options and defaults.

    Args:
        entries: the file. Everything left over in it afterwards is refused.
        attention_bias, mlp_bias: the family's biases, as its own entries say.
        kv_heads: default of num_key_value_heads; None: as many as query heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        max_positions: default of max_position_embeddings; None: required.
        windows: of the layers; None: none.
        partial_rotary: whether the family may turn a part of each head only.
        norm_eps, tied, theta, hidden: defaults of rms_norm_eps, tie_word_embeddings, rope_theta, intermediate_size.
        options: further fields of ModelConfig.
    """
    if "activation" not in options:
        options["activation"] = entries.one_of("hidden_act", ACTIVATIONS, "silu")
    hidden_size = entries.integer("hidden_size", high=MOST_WIDTH)
    num_heads = entries.integer("num_attention_heads", high=MOST_WIDTH)
    num_layers = entries.integer("num_hidden_layers", high=MOST_LAYERS)
    num_kv_heads = entries.integer("num_key_value_heads", kv_heads or num_heads)
    if num_heads % num_kv_heads:
        raise entries.refuse("num_attention_heads", f"a multiple of num_key_value_heads = {num_kv_heads}")
    if head_dim is None and entries.get("head_dim") is None and hidden_size % num_heads:
        raise entries.refuse("hidden_size", f"a multiple of num_attention_heads = {num_heads}, or head_dim given")
    head_dim = entries.integer("head_dim", head_dim or hidden_size // num_heads)
    if num_heads * head_dim > MOST:
        raise entries.refuse("num_attention_heads", f"at most {MOST // head_dim} with head_dim = {head_dim}")
    if head_dim % 2:
        raise UnsupportedModelError(f"{entries.where}: head_dim is {head_dim}; the rotation needs an even number")
    positions = entries.integer("max_position_embeddings", max_positions)
    rope = options.pop("rope", None) or read_rope(entries, head_dim, positions, theta=theta, partial=partial_rotary)
    config = ModelConfig(
        model_type=entries.raw["model_type"],
        vocab_size=entries.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=entries.integer("intermediate_size", hidden, high=MOST_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=entries.number("rms_norm_eps", norm_eps),
        rope=rope,
        max_position_embeddings=positions,
        tie_word_embeddings=entries.flag("tie_word_embeddings", tied),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        windows=tuple(windows) if windows is not None else (0,) * num_layers,
        dtype=_read_dtype(entries),
        quantization=read_quantization(entries.get("quantization_config"), entries.where),
        bos_token_id=next(iter(_read_token_ids(entries, "bos_token_id")), None),
        eos_token_ids=_read_token_ids(entries, "eos_token_id"),
        architectures=tuple(entries.raw.get("architectures") or ()),
        **options,
    )
    entries.finish()
    return config


def extend(kind: type[C], config: ModelConfig, **more: Any) -> C:
    """The configuration with a family's own fields: `kind` is a dataclass made from ModelConfig."""
    return kind(**{spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}, **more)


def _read_dtype(entries: Entries) -> torch.dtype | None:
    old, new = entries.get("torch_dtype"), entries.get("dtype")
    key = "torch_dtype" if new is None else "dtype"
    name = old if new is None else new
    if name is None or name == "auto":
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise entries.refuse(key, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _read_token_ids(entries: Entries, key: str) -> tuple[int, ...]:
    value = entries.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MOST for i in ids):
        raise entries.refuse(key, "a token id or a list of token ids")
    return tuple(ids)


def read_windows(
    entries: Entries,
    default: Callable[[int], bool],
    *,
    size: int | None = None,
    on: bool = True,
) -> list[int]:
    """Window of each layer, by `layer_types`, `sliding_window` and the family's habit; 0: all tokens.

    Args:
        entries: the file.
        default: whether a layer has a window, given its index, where `layer_types` does not say.
        size: default of `sliding_window`, where the file has no such entry; null means that there is no window.
        on: whether windows are switched on.
    """
    num_layers = entries.integer("num_hidden_layers")
    types = entries.get("layer_types")
    window = entries.raw.get("sliding_window", size)
    entries.get("sliding_window")
    on = on and window is not None
    if types is None:
        types = [SLIDING if on and default(layer) else FULL for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers:
        raise entries.refuse("layer_types", f"a list of num_hidden_layers = {num_layers} entries")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(
                f"{entries.where}: layer_types names {kind!r}; implemented are {FULL!r}, {SLIDING!r}"
            )
    if SLIDING in types and not on:
        raise UnsupportedModelError(
            f"{entries.where}: layer_types names {SLIDING!r}, but use_sliding_window is "
            f"{entries.get('use_sliding_window')!r} and sliding_window is {window!r}: set both, or change layer_types"
        )
    slots = entries.integer("sliding_window", size) if on else 0
    return [slots if kind == SLIDING else 0 for kind in types]


def read_upper_windows(entries: Entries) -> list[int]:
    """Windows of Qwen2 and Qwen3: from layer `max_window_layers` on, where `use_sliding_window` says so."""
    first = entries.integer("max_window_layers", 28, low=0)
    return read_windows(entries, lambda layer: layer >= first, on=entries.flag("use_sliding_window", False))


def read_rope(
    entries: Entries, head_dim: int, max_positions: int, *, theta: float = 10000.0, partial: bool = False
) -> RopeConfig:
    """The rotation, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    theta: default of rope_theta. partial: whether a part of each head may be left as it is.
    """
    new, old = entries.get("rope_parameters"), entries.get("rope_scaling")
    if new and old and new != old:
        raise UnsupportedModelError(
            f"{entries.where}: rope_parameters and rope_scaling are both given and differ: remove one of them"
        )
    raw = new or old or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise UnsupportedModelError(
            f"{entries.where}: rope_parameters is {_short(raw)}; one set of parameters for all layers is implemented"
        )
    rope = Entries(raw, f"{entries.where}: {'rope_parameters' if new else 'rope_scaling'}")
    outer_theta = entries.get("rope_theta")
    if outer_theta is not None:
        theta = entries.number("rope_theta")
        if rope.raw.get("rope_theta") not in (None, outer_theta):
            raise UnsupportedModelError(
                f"{entries.where}: rope_theta is {outer_theta} and {show(rope.raw['rope_theta'])} in rope_parameters: "
                "remove one of them"
            )
    return parse_rope(rope, entries, head_dim, max_positions, theta=theta, partial=partial)


def parse_rope(
    rope: Entries, entries: Entries, head_dim: int, max_positions: int, *, theta: float, partial: bool = False
) -> RopeConfig:
    """The rotation that one set of parameters describes; `entries` is the file around it. See `read_rope`."""
    theta = rope.number("rope_theta", theta)
    if theta <= 1.0:
        raise UnsupportedModelError(f"{entries.where}: rope_theta is {theta}; it must be above 1")
    given = (kind for kind in (rope.get("rope_type"), rope.get("type")) if kind is not None)
    kinds = {kind if isinstance(kind, str) else show(kind) for kind in given} or {"default"}
    kinds = {"longrope" if kind == "su" else kind for kind in kinds}  # the name in the first Phi-3 files
    if len(kinds) > 1 or not kinds <= set(SCALINGS):
        raise UnsupportedModelError(
            f"{rope.where} has rope_type {' and '.join(map(repr, sorted(kinds)))}; implemented: {', '.join(SCALINGS)}"
        )
    config = _read_scaling(kinds.pop(), theta, rope, entries, head_dim, max_positions, partial)
    rope.finish()
    return config


def _read_scaling(
    scaling: str, theta: float, rope: Entries, entries: Entries, head_dim: int, max_positions: int, partial: bool
) -> RopeConfig:
    outer = entries.get("partial_rotary_factor")
    if outer is not None and rope.get("partial_rotary_factor") is None:
        rotated = entries.number("partial_rotary_factor")
    else:
        rotated = rope.number("partial_rotary_factor", 1.0)
    if scaling == "proportional":
        return RopeConfig(scaling, theta, factor=rope.number("factor", 1.0), rotated=rotated)
    if rotated != 1.0 and not (partial and rotated < 1.0):
        raise UnsupportedModelError(
            f"{entries.where}: partial_rotary_factor is {rotated}; rope scaling {scaling!r} turns whole heads (1.0)"
        )
    turned = int(head_dim * rotated)
    if turned % 2 or not turned:
        raise UnsupportedModelError(
            f"{entries.where}: partial_rotary_factor is {rotated}, so that {turned} of a head's {head_dim} turn: "
            "the rotation needs an even number"
        )
    if scaling == "default":
        return RopeConfig(scaling, theta, rotated=rotated)
    if scaling in ("linear", "dynamic"):
        return RopeConfig(scaling, theta, factor=rope.number("factor"), rotated=rotated)
    inner = rope.integer("original_max_position_embeddings", max(max_positions, 2), low=2)
    original = entries.integer("original_max_position_embeddings", inner, low=2)
    attention_factor = None if rope.get("attention_factor") is None else rope.number("attention_factor")
    ratio = max_positions / original
    if scaling == "longrope":
        return RopeConfig(
            scaling,
            theta,
            factor=rope.number("factor", ratio),
            original_positions=original,
            attention_factor=attention_factor,
            short_factor=rope.numbers("short_factor", turned // 2),
            long_factor=rope.numbers("long_factor", turned // 2),
            rotated=rotated,
        )
    if scaling == "yarn":
        return RopeConfig(
            scaling,
            theta,
            factor=rope.number("factor", ratio),
            original_positions=original,
            attention_factor=attention_factor,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            mscale=rope.number("mscale", 0.0) if rope.get("mscale") else 0.0,
            mscale_all_dim=rope.number("mscale_all_dim", 0.0) if rope.get("mscale_all_dim") else 0.0,
            truncate=rope.flag("truncate", True),
            rotated=rotated,
        )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise ConfigError(f"{rope.where}: low_freq_factor is {low}; it must be below high_freq_factor = {high}")
    return RopeConfig(
        scaling,
        theta,
        factor=rope.number("factor"),
        original_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
        rotated=rotated,
    )
