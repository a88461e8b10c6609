"""Small checkpoints for tests: by transformers with random weights, or tensor by tensor from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

CLASSES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "phi3": "Phi3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "olmo2": "Olmo2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "gpt2": "GPT2",
    "gpt_oss": "GptOss",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
}
CONFIGS = {"gemma3_text": "Gemma3TextConfig"}
MODELS = {"gpt2": "GPT2LMHeadModel"}
LATENT = {
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 5,
    "n_group": 3,
    "topk_group": 2,
}
EXPERTS = {"intermediate_size": 92, "num_local_experts": 5, "num_experts_per_tok": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "head_dim": 12},
    "mixtral": EXPERTS,
    "gemma2": {"head_dim": 12, "sliding_window": 5},
    "gemma3_text": {"head_dim": 12, "sliding_window": 5, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_oss": EXPERTS | {"head_dim": 12, "sliding_window": 5},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"first_k_dense_replace": 1},
}
"""What families need besides, by default."""


def reference(family: str, directory: Path, *, seed: int = 0, max_shard_size: str = "1GB", **options: Any) -> Any:
    """A transformers model of odd sizes with lively random weights, saved to the directory."""
    options = (
        {
            "vocab_size": 131,
            "hidden_size": 60,
            "intermediate_size": 90,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | DEFAULTS.get(family, {})
        | options
    )
    options = {key: value for key, value in options.items() if value is not ...}
    config = getattr(transformers, CONFIGS.get(family, CLASSES[family] + "Config"))(**options)
    model = getattr(transformers, MODELS.get(family, CLASSES[family] + "ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Much larger than an initialisation: attention is then far from uniform, and norms and biases matter.
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def llama_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors of the checkpoint that CONFIG describes."""
    e, f, v, q, kv = 30, 44, 97, 30, 10
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, e)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (e,),
            f"{name}.self_attn.q_proj.weight": (q, e),
            f"{name}.self_attn.k_proj.weight": (kv, e),
            f"{name}.self_attn.v_proj.weight": (kv, e),
            f"{name}.self_attn.o_proj.weight": (e, q),
            f"{name}.post_attention_layernorm.weight": (e,),
            f"{name}.mlp.gate_proj.weight": (f, e),
            f"{name}.mlp.up_proj.weight": (f, e),
            f"{name}.mlp.down_proj.weight": (e, f),
        }
    shapes |= {"model.norm.weight": (e,), "lm_head.weight": (v, e)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).mul_(0.2).to(dtype) for name, shape in shapes.items()}


def write_config(directory: Path, **changes: Any) -> Path:
    """config.json of CONFIG with changes; a change to ... removes the entry."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_single(directory: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A checkpoint in one file."""
    write_config(directory, **changes)
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_sharded(directory: Path, tensors: dict[str, Tensor], shards: int = 3, **changes: Any) -> dict[str, str]:
    """A checkpoint in several files; returns the index that was written."""
    write_config(directory, **changes)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    """The index of a sharded checkpoint."""
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
