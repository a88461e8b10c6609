"""Latent attention through the engine: its cache keeps one vector a token, and nothing else changes by that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model_parity import OPTIONS, prompts
from tiny_models import reference

from headrace import LLM, SamplingParams
from headrace.layers.latent import LatentAttention
from headrace.step import LayerState


def run(directory: Path, **options: object) -> tuple[list[list[int]], LLM]:
    """Tokens of forked, preempted and swapped requests, four samples a prompt."""
    llm = LLM(
        model=str(directory),
        dtype="float64",
        device="cpu",
        skip_tokenizer_init=True,
        page_size=4,
        num_pages=40,
        max_num_batched_tokens=11,
        max_model_len=64,
        check_invariants=True,
        **options,
    )
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=2, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts(131, 29, 8, 17)], params)
    llm.engine.check_idle()
    return [sample.token_ids for output in outputs for sample in output.outputs], llm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"evictor": "streaming_llm", "cache_budget": 16, "cache_interval": 8, "preemption": "swap"},
        {"evictor": "key_norm", "cache_budget": 16, "cache_interval": 8},
        {"selector": "quest", "selector_budget": 8},
        {"codec": "fp8"},
        {"decoder": "ngram"},
    ],
    ids=str,
)
def test_values_in_keys_are_values_apart(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config = OPTIONS["deepseek-v3"]
    reference(family, tmp_path, **config)
    once, here = run(tmp_path, **options)
    state = LatentAttention.state.fget
    assert state is not None

    def apart(self: LatentAttention) -> LayerState:
        return replace(state(self), values_in_keys=False)

    monkeypatch.setattr(LatentAttention, "state", property(apart))
    twice, there = run(tmp_path, **options)
    assert once == twice
    tokens = 14 + 6, 14
    if "codec" not in options:  # fp8 keeps keys and values apart: each has a scale of its own
        share = here.engine.cache.allocated_bytes / there.engine.cache.allocated_bytes
        assert share == tokens[0] / sum(tokens)
    assert here.engine.stats.forks == there.engine.stats.forks > 0
    assert torch.float64 == here.engine.dtype
