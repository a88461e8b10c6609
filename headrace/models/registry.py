"""Which family reads and builds which checkpoint: one line of registration a family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from headrace.checks import show
from headrace.errors import CheckpointError, ConfigError, UnsupportedModelError
from headrace.layers.placement import Placement
from headrace.models import (
    deepseek,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from headrace.models.base import CausalLM
from headrace.models.config import Entries, ModelConfig


class ReadConfig(Protocol):
    """Reads a config.json whose `model_type` is the family's. Raises UnsupportedModelError."""

    def __call__(self, entries: Entries) -> ModelConfig: ...


class BuildModel(Protocol):
    """Makes a model with uninitialised parameters. Raises ConfigError for an impossible max_model_len."""

    def __call__(self, config: ModelConfig, *, max_model_len: int | None, place: Placement) -> CausalLM: ...


class Family(NamedTuple):
    """One registered family."""

    architectures: tuple[str, ...]
    read: ReadConfig
    build: BuildModel


_FAMILIES: dict[str, Family] = {}


def register(model_type: str, architectures: Sequence[str], *, read: ReadConfig, build: BuildModel) -> None:
    """Make a family known by the `model_type` and `architectures` of config.json."""
    if model_type in _FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is registered twice: choose another name")
    _FAMILIES[model_type] = Family(tuple(architectures), read, build)


def model_types() -> list[str]:
    """The known values of `model_type`."""
    return sorted(_FAMILIES)


def families() -> list[tuple[str, tuple[str, ...]]]:
    """Each known `model_type` with the architecture names it stands for."""
    return [(name, _FAMILIES[name].architectures) for name in model_types()]


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a checkpoint's directory.

    Raises:
        CheckpointError: config.json is missing or not a JSON object.
        UnsupportedModelError: no family knows the model, or an entry is not implemented.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no config.json: give the directory of a checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object: fetch the checkpoint again")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"{path}: model_type is {show(model_type)}; known model types: {', '.join(model_types())}"
        )
    family = _FAMILIES[model_type]
    named = raw.get("architectures") or list(family.architectures)
    if not isinstance(named, list) or not all(name in family.architectures for name in named):
        raise UnsupportedModelError(
            f"{path}: architectures is {show(named)}; for model_type {model_type!r} implemented: "
            f"{', '.join(family.architectures)}"
        )
    return family.read(Entries(raw, str(path)))


def build_model(config: ModelConfig, *, max_model_len: int | None, place: Placement) -> CausalLM:
    """A model of the configuration's family with uninitialised parameters. Raises ConfigError."""
    return _FAMILIES[config.model_type].build(config, max_model_len=max_model_len, place=place)


register("llama", ["LlamaForCausalLM"], read=llama.read, build=llama.build)
register("qwen2", ["Qwen2ForCausalLM"], read=qwen2.read, build=qwen2.build)
register("qwen3", ["Qwen3ForCausalLM"], read=qwen3.read, build=qwen3.build)
register("qwen3_moe", ["Qwen3MoeForCausalLM"], read=qwen3_moe.read, build=qwen3_moe.build)
register("mistral", ["MistralForCausalLM"], read=mistral.read, build=mistral.build)
register("mixtral", ["MixtralForCausalLM"], read=mixtral.read, build=mixtral.build)
register("phi3", ["Phi3ForCausalLM"], read=phi3.read, build=phi3.build)
register("gemma2", ["Gemma2ForCausalLM"], read=gemma2.read, build=gemma2.build)
register("gemma3_text", ["Gemma3ForCausalLM"], read=gemma3.read, build=gemma3.build)
register("olmo2", ["Olmo2ForCausalLM"], read=olmo2.read, build=olmo2.build)
register("smollm3", ["SmolLM3ForCausalLM"], read=smollm3.read, build=smollm3.build)
register("granite", ["GraniteForCausalLM"], read=granite.read, build=granite.build)
register("gpt2", ["GPT2LMHeadModel"], read=gpt2.read, build=gpt2.build)
register("gpt_oss", ["GptOssForCausalLM"], read=gpt_oss.read, build=gpt_oss.build)
register("deepseek_v2", ["DeepseekV2ForCausalLM"], read=deepseek.read_v2, build=deepseek.build)
register("deepseek_v3", ["DeepseekV3ForCausalLM"], read=deepseek.read_v3, build=deepseek.build)
