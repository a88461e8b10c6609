"""The whole engine against transformers: greedy tokens equal for 64 steps, alone and in a batch with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_all
from tiny_models import reference

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams

STEPS = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3 scaling, odd vocabulary": ("llama", {"rope_parameters": LLAMA3, "vocab_size": 97, "head_dim": 10}),
    "llama, bias": ("llama", {"attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen2, two kinds of layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "num_attention_heads": 5, "num_key_value_heads": 5}),
}


def greedy_by_transformers(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else tokens that equal the padding's id would be masked
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    peer = reference(family, tmp_path, seed=3, **options)
    peer.generation_config.eos_token_id = None
    vocab = peer.config.vocab_size
    prompts = [[(i * 17 + j * 29 + 3) % vocab for j in range(n)] for i, n in enumerate((1, 7, 40, 18))]
    expected = [greedy_by_transformers(peer, prompt) for prompt in prompts]
    model = load_model(tmp_path, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    for batched in (False, True):
        config = EngineConfig(
            num_pages=400, page_size=4, max_num_batched_tokens=13, max_num_seqs=3, check_invariants=True
        )
        engine = Engine(config, model)
        requests = []
        for i, prompt in enumerate(prompts):
            requests += engine.add(prompt, params, request_id=str(i))
            if not batched:
                run_all(engine)
        run_all(engine)
        engine.check_idle()
        assert [request.output_ids for request in requests] == expected
        assert len(engine.cache.groups) == (2 if "two kinds" in variant else 1)
