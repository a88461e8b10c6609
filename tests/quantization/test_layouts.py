"""Every layout: a checkpoint packed by the tests has the logits of the same model with dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import dense_logits
from layouts import Maker, awq, compressed, fp8, gptq, quantise
from tiny_models import reference

from headrace.layers.linear import Linear
from headrace.models.checkpoint import load_model

BOUND = 1e-5
"""Of the largest logit: both sides compute in float32, in different orders."""

AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "group_size": 32}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 1}
ODD = {"hidden_size": 72, "intermediate_size": 104, "num_attention_heads": 3, "num_key_value_heads": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}

CASES: dict[str, tuple[str, dict[str, Any], Maker, dict[str, Any]]] = {
    "awq-32": ("llama", SMALL, awq(32), AWQ),
    "awq-64-tied-biases": (
        "llama",
        SMALL | BIASES | {"intermediate_size": 128, "tie_word_embeddings": True},
        awq(64),
        AWQ | {"group_size": 64},
    ),
    "awq-128-qwen3": ("qwen3", WIDE | {"head_dim": 64}, awq(128), AWQ | {"group_size": 128}),
    "awq-all-odd": ("qwen2", ODD, awq(-1), AWQ | {"group_size": -1}),
    "awq-8-odd": ("llama", ODD, awq(8), AWQ | {"group_size": 8}),
    "gptq-32-odd": ("llama", ODD, gptq(32), GPTQ),
    "gptq-64-zeros": ("qwen2", ODD, gptq(64, symmetric=False), GPTQ | {"group_size": 64, "sym": False}),
    "gptq-128-qwen3": ("qwen3", WIDE | {"head_dim": 24}, gptq(128), GPTQ | {"group_size": 128}),
    "gptq-all": ("llama", ODD, gptq(-1), GPTQ | {"group_size": -1}),
    "gptq-order": (
        "llama",
        ODD | BIASES,
        gptq(32, symmetric=False, shuffled=True),
        GPTQ | {"desc_act": True, "sym": False},
    ),
    "gptq-order-tied": (
        "qwen3",
        ODD | {"tie_word_embeddings": True},
        gptq(64, shuffled=True),
        GPTQ | {"group_size": 64},
    ),
    "gptq-2": (
        "qwen2",
        SMALL,
        gptq(32, version=2, symmetric=False),
        GPTQ | {"checkpoint_format": "gptq_v2", "sym": False},
    ),
    "gptq-zero-biases": ("llama", SMALL, gptq(32, zero_bias=True), GPTQ | {"checkpoint_format": "gptq"}),
    "gptq-phi3": ("phi3", SMALL, gptq(32), GPTQ),
    "fp8-tensor": ("llama", ODD, fp8("tensor", static=True), compressed("tensor")),
    "fp8-channel-biases": ("llama", {"hidden_size": 60} | BIASES, fp8("channel"), compressed("channel")),
    "fp8-channel-qwen3": ("qwen3", ODD | {"head_dim": 10}, fp8("channel"), compressed("channel")),
    "fp8-block": ("qwen2", ODD, fp8("block", (32, 48)), compressed("block", [32, 48])),
    "fp8-deepseek": (
        "qwen3",
        {"hidden_size": 160, "intermediate_size": 200, "num_attention_heads": 5, "num_hidden_layers": 1},
        fp8("block", (128, 128), suffix="weight_scale_inv"),
        FP8 | {"modules_to_not_convert": ["lm_head"]},
    ),
    "fp8-plain-static": ("llama", ODD, fp8("tensor", static=True), FP8 | {"weight_block_size": None}),
}


def worst(one: Any, other: Any, rows: int) -> float:
    """Largest difference of two models' logits, relative to the largest logit, on `rows` rows."""
    tokens = [[(7 * i + 3) % 100 for i in range(rows)]]
    a, b = dense_logits(one, tokens)[0], dense_logits(other, tokens)[0]
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_weights(case: str, tmp_path: Path) -> None:
    family, options, maker, config = CASES[case]
    reference(family, tmp_path / "source", **options)
    path = quantise(tmp_path / "source", tmp_path / "out", maker, config)
    quantised, dense = (load_model(p, device="cpu") for p in (path, path / "dense"))
    maps = [m for m in quantised.modules() if isinstance(m, Linear)]
    assert maps
    assert all(m.store is not None for m in maps)
    for mine, theirs in zip(maps, (m for m in dense.modules() if isinstance(m, Linear)), strict=True):
        assert mine.store is not None
        assert torch.equal(mine.store.dense(), theirs.weight), mine.store.names
    for rows in (1, 3, 9, 40):
        assert worst(quantised, dense, rows) < BOUND
    exact, wide = (load_model(p, device="cpu", dtype="float64") for p in (path, path / "dense"))
    # The dense weights are float32: products of 8-bit codes and scales have been rounded, those of 4-bit codes not.
    assert worst(exact, wide, 5) < (1e-6 if case.startswith("fp8") else 1e-12)


@pytest.mark.parametrize(
    ("config", "maker", "kept"),
    [
        (
            AWQ | {"modules_to_not_convert": ["mlp", "layers.0.self_attn.o_proj"]},
            awq(32),
            ["mlp", "0.self_attn.o_proj"],
        ),
        (compressed("channel", ignore=["lm_head", r"re:.*layers\.1\..*"]), fp8("channel"), ["layers.1."]),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.gate_proj", "mlp.up_proj"]]}, gptq(32), ["self_attn", "down"]),
        (
            FP8 | {"weight_block_size": [32, 32], "modules_to_not_convert": ["model.layers.0.mlp.down_proj"]},
            fp8("block", (32, 32), suffix="weight_scale_inv"),
            ["0.mlp.down_proj"],
        ),
    ],
)
def test_modules_left_out_are_dense(config: Any, maker: Maker, kept: list[str], tmp_path: Path) -> None:
    reference("llama", tmp_path / "source", **SMALL)
    path = quantise(
        tmp_path / "source", tmp_path / "out", maker, config, keep=lambda name: any(part in name for part in kept)
    )
    quantised, dense = (load_model(p, device="cpu") for p in (path, path / "dense"))
    stores = [m.store is not None for m in quantised.modules() if isinstance(m, Linear)]
    assert any(stores)
    assert not all(stores)
    assert worst(quantised, dense, 7) < BOUND


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", ["awq-32", "gptq-order", "fp8-block"])
def test_narrow_types(case: str, dtype: str, tmp_path: Path) -> None:
    """Activations of 16 bits against float32: the weights are the same numbers."""
    family, options, maker, config = CASES[case]
    reference(family, tmp_path / "source", **options)
    path = quantise(tmp_path / "source", tmp_path / "out", maker, config)
    wide = load_model(path / "dense", device="cpu")
    narrow = load_model(path, device="cpu", dtype=dtype)
    assert worst(narrow, wide, 6) < {"bfloat16": 0.06, "float16": 0.01}[dtype]
