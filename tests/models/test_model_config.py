"""Reading config.json: real files are understood, and nothing in them is ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIG, write_config

from headrace.errors import ConfigError, UnsupportedModelError
from headrace.models import llama
from headrace.models.registry import model_types, read_config, register

# Entries as published checkpoints have them, sizes included.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_0_6B: dict[str, Any] = QWEN2_5_0_5B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
SMOL: dict[str, Any] = {
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_scaling": None,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "pad_token_id": 2,
    "_name_or_path": "somewhere",
    "unsloth_version": "2024.9",
    "rope_theta": 130000,
}


def read(tmp_path: Path, **changes: Any) -> Any:
    return read_config(write_config(tmp_path, **changes))


def published(tmp_path: Path, entries: dict[str, Any]) -> Any:
    return read_config(write_config(tmp_path, **(dict.fromkeys(CONFIG, ...) | entries)))


def test_published_files(tmp_path: Path) -> None:
    config = published(tmp_path, LLAMA_3_2_1B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (32, 8, 64, 16)
    assert (config.rope.scaling, config.rope.theta, config.rope.original_positions) == ("llama3", 500000.0, 8192)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.bos_token_id == 128000
    assert config.dtype == torch.bfloat16
    assert config.tie_word_embeddings
    config = published(tmp_path, QWEN2_5_0_5B)
    assert (config.head_dim, config.windows, config.attention_bias) == (64, (0,) * 24, True)
    assert (config.norm_eps, config.eos_token_ids) == (1e-6, (151645,))
    config = published(tmp_path, QWEN3_0_6B)
    assert (config.head_dim, config.num_heads, config.attention_bias) == (128, 16, False)
    assert read(tmp_path, **SMOL).rope.theta == 130000.0


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, num_key_value_heads=..., head_dim=..., max_position_embeddings=..., architectures=...)
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (3, 10, 2048)
    assert (config.rope.theta, config.norm_eps, config.dtype) == (10000.0, 1e-6, None)


def test_windows(tmp_path: Path) -> None:
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    assert read(tmp_path, **qwen, sliding_window=9, max_window_layers=1).windows == (0, 9)
    assert read(tmp_path, **qwen, sliding_window=9, max_window_layers=0).windows == (9, 9)
    assert read(tmp_path, **qwen, sliding_window=9).windows == (0, 0)
    assert read(tmp_path, **qwen).windows == (0, 0)
    types = ["sliding_attention", "full_attention"]
    assert read(tmp_path, **qwen, sliding_window=9, layer_types=types).windows == (9, 0)
    off = qwen | {"use_sliding_window": False, "sliding_window": 9}
    assert read(tmp_path, **off, layer_types=["full_attention"] * 2).windows == (0, 0)
    with pytest.raises(UnsupportedModelError, match="layer_types names 'sliding_attention', but use_sliding_window"):
        read(tmp_path, **off, layer_types=types)
    with pytest.raises(UnsupportedModelError, match="layer_types names 'chunked_attention'; implemented are"):
        read(tmp_path, **qwen, sliding_window=9, layer_types=["chunked_attention"] * 2)
    with pytest.raises(UnsupportedModelError, match=r"layer_types is .*; it must be a list of num_hidden_layers = 2"):
        read(tmp_path, **qwen, sliding_window=9, layer_types=types * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type is 'mamba'; known model types: .*llama.*qwen2.*qwen3"),
        ({"model_type": ...}, "model_type is None; known model types"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; known model types"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "implemented: LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"hidden_act": "xielu"}, "hidden_act is 'xielu'; it must be one of 'silu'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "names method 'bitsandbytes'; implemented: awq, compressed",
        ),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; it must be one of float64"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; it must be one of float64"),
        ({"vocab_size": ...}, "vocab_size is None; it must be a whole number of at least 1"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5; it must be a whole number"),
        ({"hidden_size": float("inf")}, "hidden_size is inf; it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number of at least 1"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 3; it must be a multiple of num_key_value_heads = 2"),
        ({"head_dim": ..., "hidden_size": 31}, "hidden_size is 31; it must be a multiple of num_attention_heads = 3"),
        ({"head_dim": 9}, "head_dim is 9; the rotation needs an even number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it must be a positive number"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; it must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id or a list of token ids"),
        ({"sliding_window": 4096}, "sliding_window = 4096: not implemented for this model; if the checkpoint"),
        (
            {"final_logit_softcapping": 30.0, "num_experts": 8, "alibi": False, "clip_qkv": None},
            "final_logit_softcapping = 30.0, num_experts = 8: not implemented",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; one set of parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; rope scaling 'default' turns whole heads"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_name_is_registered_once() -> None:
    assert {"llama", "qwen2", "qwen3"} <= set(model_types())
    with pytest.raises(ConfigError, match="model_type 'llama' is registered twice"):
        register("llama", ["Other"], read=llama.read, build=llama.build)
