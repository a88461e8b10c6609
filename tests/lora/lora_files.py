"""Adapters as PEFT writes them, with random factors, and the change that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of each module that is changed."""

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def modules_of(
    tensors: Mapping[str, Tensor],
    targets: Sequence[str] = ALL,
    layers: Sequence[int] | None = None,
    transposed: bool = False,
) -> Shapes:
    """The linear maps of a checkpoint whose names end in one of the targets. `transposed`: as [inputs, outputs]."""
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if module == name or module.rpartition(".")[2] not in targets or tensor.dim() != 2:
            continue
        if layers is not None and int(module.split(".layers.")[1].split(".")[0]) not in layers:
            continue
        first, second = tensor.shape
        found[module] = (second, first) if transposed else (first, second)
    return found


def write_adapter(
    directory: Path,
    shapes: Shapes,
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    size: float = 0.2,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    edit: Mapping[str, Tensor | None] | None = None,
    **entries: Any,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write both files; returns the factors by module.

    `ranks`: those of modules, by the last word of their names, that differ. `edit`: tensors to write instead, or
    instead of none; None leaves one out. `entries`: of the configuration; a value of ... leaves one out.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (outputs, inputs) in shapes.items():
        mine = (ranks or {}).get(module.rpartition(".")[2], rank)
        a = torch.randn(mine, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
        b = torch.randn(outputs, mine, generator=generator, dtype=torch.float64) * size
        factors[module] = (a.to(dtype), b.to(dtype))
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    for name, tensor in (edit or {}).items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "rank_pattern": dict(ranks or {}),
        "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "use_dora": False,
        "use_rslora": False,
    } | entries
    directory.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in config.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return factors
