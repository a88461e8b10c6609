"""Adapters as PEFT saves them: adapter_config.json and adapter_model.safetensors (LoRA, arXiv 2106.09685).

A module's weight changes by scale * B A, A [Q, E], B [N, Q]; scale is alpha / Q, or alpha / sqrt(Q) with use_rslora
(arXiv 2312.03732). Tensors are named base_model.model.<module>.lora_A.weight and .lora_B.weight. What is here is read
in full before anything is written, and every entry of the configuration is either understood or refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import AdapterError, CheckpointError, UnsupportedModelError
from headrace.layers.adapters import AdapterBank, AdapterRoom
from headrace.models.checkpoint import LISTED, resolve_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

# How the training chose or stored its modules; the tensors themselves say which there are.
TELLS_NOTHING = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out",
}  # fmt: skip
READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias",
    "modules_to_save",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the model's own weights alone."""
REASONS = {
    "use_dora": "it also scales the directions of the weight (DoRA)",
    "lora_bias": "its second factor has a bias",
    "trainable_token_indices": "it trains rows of the embedding",
    "layer_replication": "it repeats layers",
    "target_parameters": "it changes parameters that are no linear maps",
    "alora_invocation_tokens": "it changes only tokens behind an invocation",
}


class Pair(NamedTuple):
    """The change of one module: scale * B A."""

    a_QE: Tensor
    b_NQ: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files hold it, in host memory."""

    source: str
    pairs: Mapping[str, Pair]
    """By name of the module in the checkpoint."""
    digest: str
    """Of everything that its tokens depend on, as hexadecimal digits: equal for equal changes, whatever the name."""

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(pair.a_QE.shape[0] for pair in self.pairs.values())


def read_adapter(path_or_id: str | os.PathLike[str]) -> Adapter:
    """The adapter in a directory, or in the snapshot of a hub id.

    Raises:
        CheckpointError: files are missing or damaged, or contradict each other.
        UnsupportedModelError: the configuration asks for something that is not implemented.
    """
    directory = resolve_model(path_or_id)
    config = _read_config(directory / CONFIG)
    pairs: dict[str, Pair] = {}
    for module, (a_QE, b_NQ) in _read_factors(directory / WEIGHTS).items():
        pairs[module] = Pair(a_QE, b_NQ, _scale(config, module, a_QE.shape[0], directory))
    return Adapter(str(path_or_id), pairs, _digest(pairs))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {CONFIG}: give the directory of an adapter that PEFT saved"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): fetch the adapter again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object: fetch the adapter again")
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is implemented")
    if config.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f"{path}: bias is {config['bias']!r}, so biases of the model were trained too: train with bias='none'"
        )
    if config.get("modules_to_save"):
        raise UnsupportedModelError(
            f"{path}: modules_to_save is {config['modules_to_save']!r}, so whole modules were trained beside the "
            "factors: merge the adapter into the model, or train without them"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UnsupportedModelError(
            f"{path}: init_lora_weights is {start!r}, which changes the model's own weights: convert the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    # An entry that is unknown here may change the computation, unless it says that it is off.
    for name, value in config.items():
        if name not in TELLS_NOTHING | READ and value not in (None, False, [], {}):
            reason = REASONS.get(name, "which is not known here")
            raise UnsupportedModelError(
                f"{path}: {name} is {value!r} ({reason}), which is not implemented: merge the adapter into the model, "
                "or train it without"
            )
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise CheckpointError(f"{path}: {name} is {value!r}; it must be a positive number: fetch the adapter again")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}; it must map names to numbers")
    return config


def _scale(config: Mapping[str, Any], module: str, rank: int, directory: Path) -> float:
    """alpha / Q, or alpha / sqrt(Q)."""
    said = _of_module(config.get("rank_pattern"), module, config["r"], directory)
    if said != rank:
        raise CheckpointError(
            f"{directory}: {CONFIG} says rank {said} for {module}, and its factors have rank {rank}: fetch the adapter "
            "again"
        )
    alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"], directory)
    return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _of_module(pattern: Mapping[str, Any] | None, module: str, default: Any, directory: Path) -> Any:
    """The value of the first pattern that is the module's name or its end, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise CheckpointError(f"{directory / CONFIG}: {key!r} is no pattern ({error}): correct it") from error
        if found:
            return value
    return default


def _read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Both factors by module, checked against each other."""
    if not path.exists():
        others = sorted(found.name for kind in ("*.bin", "*.pt", "*.safetensors") for found in path.parent.glob(kind))
        hint = f" (found {', '.join(others[:3])}: save it with safe_serialization=True)" if others else ""
        raise CheckpointError(f"{path.parent} has no {WEIGHTS}{hint}: fetch the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}): fetch it again") from error
    strange = [name for name in tensors if not TENSOR.fullmatch(name)]
    if strange:
        kinds = {
            "lora_embedding": "factors of an embedding are not implemented",
            "lora_magnitude": "DoRA is not implemented",
        }
        why = next((text for word, text in kinds.items() if any(word in name for name in strange)), None)
        if why:
            raise UnsupportedModelError(f"{path} holds {_listed(strange)}: {why}; train without, or merge it")
        raise CheckpointError(
            f"{path} holds {_listed(strange)}: the tensors of an adapter that PEFT saves are named "
            "base_model.model.<module>.lora_A.weight and .lora_B.weight"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, factor = TENSOR.fullmatch(name).groups()  # type: ignore[union-attr]
        found.setdefault(module, {})[factor] = tensor
    alone = [module for module, factors in found.items() if len(factors) < 2]
    if alone or not found:
        problem = f"has one factor only of {_listed(alone)}" if alone else "holds no tensors"
        raise CheckpointError(f"{path} {problem}: fetch the adapter again")
    for module, factors in found.items():
        a, b = factors["A"], factors["B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise CheckpointError(
                f"{path}: the factors of {module} are {list(a.shape)} and {list(b.shape)}; they must be "
                "[rank, inputs] and [outputs, rank]"
            )
        if not (a.is_floating_point() and b.is_floating_point()):
            raise CheckpointError(f"{path}: the factors of {module} are {a.dtype} and {b.dtype}, not floating numbers")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError(f"{path}: the factors of {module} hold NaN or infinity: train the adapter again")
    return {module: (found[module]["A"], found[module]["B"]) for module in sorted(found)}


def _digest(pairs: Mapping[str, Pair]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for module in sorted(pairs):
        a_QE, b_NQ, scale = pairs[module]
        state.update(f"{module} {scale!r} {a_QE.dtype} {tuple(a_QE.shape)} {b_NQ.dtype} {tuple(b_NQ.shape)}\n".encode())
        for factor in (a_QE, b_NQ):
            state.update(factor.contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def check_fit(adapter: Adapter, bank: AdapterBank) -> None:
    """Raise unless every module of the adapter is a linear map of the model, of the right shape, with room for it.

    Raises:
        CheckpointError: modules have other shapes than the model's.
        UnsupportedModelError: modules are not in the model, or have no room for a change.
        AdapterError: the rank is larger than the bank's.
    """
    places = _places(bank)
    lost = [module for module in adapter.pairs if module not in places]
    if lost:
        ends = sorted({name.rpartition(".")[2] for name in places})
        raise UnsupportedModelError(
            f"the adapter {adapter.source} changes {_listed(lost)}; in this model adapters can change "
            f"{', '.join(ends)} of its layers: take one that was trained for this model on these modules"
        )
    wrong = []
    for module, (a_QE, b_NQ, _) in adapter.pairs.items():
        inputs, outputs = places[module].inputs, places[module].width(module)
        if (a_QE.shape[1], b_NQ.shape[0]) != (inputs, outputs):
            wrong.append(f"{module} from {a_QE.shape[1]} to {b_NQ.shape[0]}, in the model from {inputs} to {outputs}")
    if wrong:
        raise CheckpointError(
            f"the adapter {adapter.source} was trained for a model of another shape: {_listed(wrong)}: take one that "
            "was trained for this model"
        )
    if adapter.rank > bank.max_rank:
        raise AdapterError(
            f"the adapter {adapter.source} has rank {adapter.rank}; max_adapter_rank is {bank.max_rank}: raise it"
        )


def write_adapter(adapter: Adapter, bank: AdapterBank, slot: int) -> None:
    """Write an adapter that fits into a place. Raises CheckpointError, the place cleared, if a value overflows."""
    places = _places(bank)
    for module, (a_QE, b_NQ, scale) in adapter.pairs.items():
        room = places[module]
        kind = room.factors.a_SEK.dtype
        wide = torch.promote_types(kind, torch.float32)
        a_QE, b_NQ = a_QE.to(kind), (b_NQ.to(wide) * scale).to(kind)
        if not (a_QE.isfinite().all() and b_NQ.isfinite().all()):
            bank.clear(slot)
            raise CheckpointError(
                f"the factors of {module} in {adapter.source} do not fit into {str(kind).removeprefix('torch.')}: use "
                "dtype='bfloat16' or 'float32'"
            )
        room.write(slot, module, a_QE, b_NQ)


def _places(bank: AdapterBank) -> dict[str, AdapterRoom]:
    """Where the change of each module goes."""
    return {name: room for room in bank.rooms for name in room.names}


def _listed(items: Iterable[str]) -> str:
    names = list(items)
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
