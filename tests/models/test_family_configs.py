"""What config files and checkpoints of the families look like besides what transformers writes today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import dense_logits
from safetensors.torch import load_file, save_file
from test_model_parity import OPTIONS, check_logits, prompts
from tiny_models import reference

from headrace.errors import CheckpointError, UnsupportedModelError
from headrace.layers.rotary import RopeConfig
from headrace.models.checkpoint import load_model
from headrace.models.registry import read_config


def change_config(directory: Path, **changes: Any) -> Path:
    """Entries of config.json changed; ... removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return directory


def change_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def test_gpt2_without_a_prefix_and_with_masks(tmp_path: Path) -> None:
    """The first published files: names begin with the layer, and the causal mask is among them."""
    family, options = OPTIONS["gpt2"]
    theirs = reference(family, tmp_path, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    change_tensors(tmp_path, old)
    change_config(tmp_path, n_ctx=256)
    check_logits(load_model(tmp_path, device="cpu"), theirs, prompts(131, 9))
    change_tensors(tmp_path, old | {"h.0.attn.other": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): transformer.h.0.attn.other"):
        load_model(tmp_path, device="cpu")


def test_deepseek_v3_with_further_layers(tmp_path: Path) -> None:
    """Layers that predict further tokens are in the file and are not loaded; others are still unexpected."""
    family, options = OPTIONS["deepseek-v3"]
    theirs = reference(family, tmp_path, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    change_tensors(tmp_path, tensors | {"model.layers.3.eh_proj.weight": torch.ones(2)})
    change_config(tmp_path, num_nextn_predict_layers=1, topk_method="noaux_tc", scoring_func="sigmoid")
    check_logits(load_model(tmp_path, device="cpu"), theirs, prompts(131, 9))
    change_config(tmp_path, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): model.layers.3.eh_proj.weight"):
        load_model(tmp_path, device="cpu")


def test_gemma3_of_older_files(tmp_path: Path) -> None:
    """Rotations as `rope_theta`, `rope_local_base_freq` and `rope_scaling`, windows as a pattern."""
    family, options = OPTIONS["gemma3-linear-rope"]
    theirs = reference(family, tmp_path, **options)
    change_config(
        tmp_path,
        rope_parameters=...,
        layer_types=...,
        _sliding_window_pattern=...,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    check_logits(load_model(tmp_path, device="cpu"), theirs, prompts(131, 20))
    config = read_config(tmp_path)
    assert config.windows == (5, 0)
    assert config.layer_ropes == (RopeConfig("default", 1e4), RopeConfig("linear", 1e6, factor=8.0))


def test_phi3_of_older_files(tmp_path: Path) -> None:
    """`su` is what longrope was called first; factors and positions stand in rope_scaling and beside it."""
    family, options = OPTIONS["phi3-partial-longrope"]
    theirs = reference(family, tmp_path, **options)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    old = {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    change_config(tmp_path, rope_parameters=..., rope_scaling=old, rope_theta=1e4, partial_rotary_factor=0.75)
    check_logits(load_model(tmp_path, device="cpu"), theirs, prompts(131, 20))


def test_mistral_without_an_entry_has_the_first_ones_window(tmp_path: Path) -> None:
    reference("mistral", tmp_path)
    assert read_config(change_config(tmp_path, sliding_window=...)).windows == (4096, 4096)
    assert read_config(change_config(tmp_path, sliding_window=None)).windows == (0, 0)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt-oss", "deepseek-v3"])
def test_random_weights(name: str, tmp_path: Path) -> None:
    """From config.json alone, finite; norms are the identity, whatever is added to their weights."""
    family, options = OPTIONS[name]
    reference(family, tmp_path, **options)
    (tmp_path / "model.safetensors").unlink()
    model = load_model(tmp_path, device="cpu", load_format="random")
    assert dense_logits(model, prompts(131, 9))[0].isfinite().all()
    norms = [p for key, p in model.named_parameters() if "norm" in key and key.endswith("weight")]
    assert norms
    assert all(bool((norm == 1).all()) for norm in norms)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "mixtral",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok is 9; it must be a whole number of at least 1 and at",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is 'mish'; it must be one of 'silu'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0; it must be a positive number"),
        ("gemma3", {"rope_parameters": {"full_attention": {}, "other": {}}}, "rope_parameters names other"),
        ("gemma3", {"layer_types": ["full_attention", "chunked"] * 2}, "layer_types names 'chunked'"),
        (
            "smollm3",
            {"no_rope_layers": [1, 2, 0, 1]},
            "no_rope_layers is .*; it must be a list of num_hidden_layers = 4",
        ),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; it must be False",
        ),
        ("phi3-partial-longrope", {"hidden_size": 72, "head_dim": ...}, "hidden_size is 72; it must be a multiple"),
        ("qwen3-moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be a list of layers"),
        ("gpt-oss", {"swiglu_limit": 0}, "swiglu_limit is 0; it must be a positive number"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; it must be one of 'greedy'"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True; it must be False"),
        ("deepseek-v3", {"n_group": 4}, "n_routed_experts is 6; it must be a multiple of n_group = 4"),
        ("deepseek-v3", {"q_lora_rank": None, "attention_bias": True}, "attention_bias is true and q_lora_rank null"),
        ("granite", {"residual_multiplier": "1"}, "residual_multiplier is '1'; it must be a positive number"),
        ("olmo2", {"sliding_window": 9}, "sliding_window = 9: not implemented for this model"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    family, options = OPTIONS[name]
    reference(family, tmp_path, **options)
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(change_config(tmp_path, **changes))
