"""Writes a trained model in the Hugging Face layout: bfloat16 safetensors shards, configuration and tokenizer.

What is written is read back with transformers, and its logits are compared with those of the training model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .model import LlamaLM
from .settings import BOS, BOS_ID, PAD, PAD_ID, ModelShape

MAX_SHARD_BYTES = 12_000_000
LOGIT_TOLERANCE = 1e-3
# A base model has no notion of turns; comments are the nearest thing to a conversation in its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}# {{ message['role'] }}: {{ message['content'] | trim | replace('\\n', '\\n# ') }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant:\n{% endif %}"
)


def model_config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
    }


def tokenizer_config(shape: ModelShape) -> dict[str, Any]:
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position_embeddings,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": BOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(BOS_ID): {"content": BOS} | special, str(PAD_ID): {"content": PAD} | special},
        "chat_template": CHAT_TEMPLATE,
    }


def shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Groups tensors in order so that no group exceeds the shard limit."""
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        size = sum(t.nbytes for t in groups[-1].values())
        if groups[-1] and size + tensor.nbytes > MAX_SHARD_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    return groups


def write_weights(tensors: dict[str, Tensor], out: Path) -> None:
    groups = shards(tensors)
    if len(groups) == 1:
        save_file(groups[0], out / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(group, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def export(model: LlamaLM, tokenizer: Path, manifest: Path, out: Path) -> float:
    """Writes everything but the model card; returns the largest logit difference found on reading it back."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    write_weights(tensors, out)
    (out / "config.json").write_text(json.dumps(model_config(model.shape), indent=1) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": BOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(model.shape), indent=1) + "\n")
    shutil.copy(tokenizer, out / "tokenizer.json")
    shutil.copy(manifest, out / "corpus_manifest.json")
    for file in out.iterdir():
        file.chmod(0o644)  # the writer of safetensors makes files that only their owner can read
    difference = logit_difference(model, out)
    size = sum(t.nbytes for t in tensors.values())
    print(f"export: {out.name}: {size:,} bytes of weights; logits differ by at most {difference:.2e}", flush=True)
    if not difference < LOGIT_TOLERANCE:
        raise ValueError(f"the exported model's logits differ by {difference}")
    return difference


@torch.no_grad()
def logit_difference(model: LlamaLM, folder: Path) -> float:
    """The largest difference of logits between the training model and transformers, both in float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'def add(a: int, b: int = 12) -> int:\n    """Adds."""\n    return a + b\n'
    ids = tokenizer(text)["input_ids"]
    if tokenizer.decode(ids) != text:
        raise ValueError("the exported tokenizer does not give the text back")
    random_T = torch.randint(2, model.shape.vocab_size, (400,), generator=torch.Generator().manual_seed(1))
    ids_BT = torch.cat((torch.tensor(ids), random_T))[None]
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference_BTV = load_exported(folder, model.shape, torch.device("cpu"))(ids_BT)
    own = LlamaLM(model.shape)
    own.load_state_dict({k: v.detach().cpu().to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    theirs_BTV = other(ids_BT).logits
    return float(max((own(ids_BT) - theirs_BTV).abs().max(), (reference_BTV - theirs_BTV).abs().max()))


def load_exported(folder: Path, shape: ModelShape, device: torch.device) -> LlamaLM:
    """The exported weights in a model of this recipe, held in float32."""
    model = LlamaLM(shape)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    model.load_state_dict({k: v.float() for k, v in tensors.items()})
    return model.to(device).eval()
