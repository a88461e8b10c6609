"""Quantised checkpoints written from the definitions of their layouts, number by number, without the product's code.

Each maker takes a dense weight [outputs, inputs] and returns the tensors of one linear map, and the float32 weight
that they stand for. Codes are what rounding gives, zeros and orders are random, so that nothing is symmetric by luck.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]
Maker = Callable[[Tensor, random.Random], Made]

AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def signed(word: int) -> int:
    """The int32 of 32 bits."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def words_of(rows: list[list[int]], columns: list[int], lower: int = 0) -> Tensor:
    """Eight neighbours of each row in a word: the code in place `columns[i]` from bit 4 i on."""
    return torch.tensor(
        [
            [signed(sum(row[m + c] << (4 * i) for i, c in enumerate(columns)) - lower) for m in range(0, len(row), 8)]
            for row in rows
        ],
        dtype=torch.int32,
    )


def int4(weight: Tensor, group_of: list[int], symmetric: bool, rng: random.Random) -> tuple[Any, Any, Tensor, Tensor]:
    """Codes [inputs][outputs], zeros [groups][outputs], scales float16 [groups, outputs], and the weight again."""
    outputs = len(weight)
    groups = max(group_of) + 1
    largest = weight.abs().max().item()
    scales = torch.tensor([[largest / 6 * rng.uniform(0.5, 1.0) for _ in range(outputs)] for _ in range(groups)]).half()
    zeros = [[8 if symmetric else rng.randrange(16) for _ in range(outputs)] for _ in range(groups)]
    w, s = weight.tolist(), scales.tolist()
    codes = [
        [min(max(round(w[n][e] / s[g][n]) + zeros[g][n], 0), 15) for n in range(outputs)]
        for e, g in enumerate(group_of)
    ]
    again = [[(codes[e][n] - zeros[g][n]) * s[g][n] for e, g in enumerate(group_of)] for n in range(outputs)]
    return codes, zeros, scales, torch.tensor(again, dtype=torch.float32)


def awq(group: int) -> Maker:
    def make(weight: Tensor, rng: random.Random) -> Made:
        inputs = weight.shape[1]
        size = inputs if group == -1 else group
        codes, zeros, scales, again = int4(weight, [e // size for e in range(inputs)], False, rng)
        tensors = {
            "qweight": words_of(codes, AWQ_COLUMNS),
            "qzeros": words_of(zeros, AWQ_COLUMNS),
            "scales": scales,
        }
        return tensors, again

    return make


def gptq(
    group: int, *, version: int = 1, symmetric: bool = True, shuffled: bool = False, zero_bias: bool = False
) -> Maker:
    def make(weight: Tensor, rng: random.Random) -> Made:
        outputs, inputs = weight.shape
        size = inputs if group == -1 else group
        group_of = [e // size for e in range(inputs)]
        if shuffled:
            rng.shuffle(group_of)
        codes, zeros, scales, again = int4(weight, group_of, symmetric, rng)
        by_output = [[codes[e][n] for e in range(inputs)] for n in range(outputs)]
        tensors = {
            "qweight": words_of(by_output, list(range(8))).t().contiguous(),
            "qzeros": words_of(zeros, list(range(8)), 0x11111111 if version == 1 else 0),
            "scales": scales,
            "g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        if zero_bias:
            tensors["bias"] = torch.zeros(outputs, dtype=torch.float16)
        return tensors, again

    return make


def fp8(strategy: str, block: tuple[int, int] = (0, 0), *, suffix: str = "weight_scale", static: bool = False) -> Maker:
    def make(weight: Tensor, rng: random.Random) -> Made:
        outputs, inputs = weight.shape
        tall, wide = {"tensor": (outputs, inputs), "channel": (1, inputs), "block": block}[strategy]
        down, across = -(-outputs // tall), -(-inputs // wide)
        largest = weight.abs().max().item()
        # Small scales too: codes then reach into the numbers without a leading one.
        scale = torch.tensor(
            [[largest / 448 * rng.choice([1, 2, 300, 40000]) for _ in range(across)] for _ in range(down)]
        )
        whole = torch.stack([torch.stack([scale[n // tall, e // wide] for e in range(inputs)]) for n in range(outputs)])
        codes = (weight / whole).to(torch.float8_e4m3fn)
        tensors = {"weight": codes, suffix: scale.flatten() if strategy == "tensor" else scale}
        if static:
            tensors["input_scale"] = torch.tensor([0.01])
        return tensors, codes.float() * whole

    return make


def compressed(strategy: str, block: list[int] | None = None, ignore: list[str] | None = None, **weights: Any) -> Any:
    """The configuration that llm-compressor writes."""
    scheme = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": strategy,
        "actorder": None,
    }
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "kv_cache_scheme": None,
        "ignore": ignore or ["lm_head"],
        "version": "0.9.0",
        "sparsity_config": {},
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme | {"block_structure": block} | weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }


def quantise(
    dense: Path, out: Path, maker: Maker, config: dict[str, Any], *, keep: Callable[[str], bool] = lambda name: False
) -> Path:
    """Write `out` with quantised linear maps of blocks, and `out`/dense with what they stand for. Returns `out`.

    keep: whether the module of this name stays dense.
    """
    rng = random.Random(0)
    stored, again = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        base = name.removesuffix(".weight")
        if ".layers." not in name or "norm" in name or tensor.dim() != 2 or keep(base):
            stored[name] = again[name] = tensor.clone()
            continue
        made, weight = maker(tensor.float(), rng)
        stored |= {f"{base}.{part}": value.contiguous() for part, value in made.items()}
        again[name] = weight
    (out / "dense").mkdir(parents=True)
    save_file(stored, out / "model.safetensors")
    save_file(again, out / "dense" / "model.safetensors")
    shutil.copy(dense / "config.json", out / "dense" / "config.json")
    settings = json.loads((dense / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return out
