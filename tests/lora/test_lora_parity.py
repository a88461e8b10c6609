"""Logits and tokens under an adapter are those of a transformers model with the change merged into its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import ALL, modules_of, write_adapter
from tiny_models import reference

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.layers.adapters import AdapterBank
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams

PROMPT = [(17 * i * i + 5) % 131 for i in range(37)]
LOGPROBS = 2e-5
"""Largest difference of a log-probability in float32."""

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "rank 1": {"rank": 1},
    "rank 8": {"rank": 8, "alpha": 16},
    "rank 7": {"rank": 7, "alpha": 3},
    "query and value": {"targets": ("q_proj", "v_proj")},
    "key": {"targets": ("k_proj",)},
    "out": {"targets": ("o_proj",)},
    "gate": {"targets": ("gate_proj",)},
    "up and down": {"targets": ("up_proj", "down_proj")},
    "rslora": {"use_rslora": True},
    "ranks": {"ranks": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 1.5}},
    "second layer": {"layers": [1], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By family: the reference, and its directory."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            options = {"num_key_value_heads": 5} if family == "gpt2" else {}
            made[family] = reference(family, directory, **options), directory
        return made[family]

    return get


def merged(model: Any, factors: Any, scales: dict[str, float], is_transposed: bool) -> Any:
    changed = copy.deepcopy(model)
    weights = dict(changed.named_parameters())
    with torch.no_grad():
        for module, (a, b) in factors.items():
            change = scales[module] * (b @ a)
            weights[f"{module}.weight"] += change.t() if is_transposed else change
    return changed


LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
TARGETS = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "deepseek_v3": (*LATENT, *ALL[3:]),
    "mixtral": ALL[:4],
}
"""Of families where a target has another name, or room is lacking for some."""
FAMILIES = ["qwen2", "qwen3", "phi3", "gpt2", "gemma2", "granite", "deepseek_v3", "mixtral"]
RUNS = [("llama", case) for case in CASES] + [(family, "all") for family in FAMILIES] + [("qwen3", "ranks")]


@pytest.mark.parametrize(("family", "case"), RUNS)
def test_tokens_and_log_probs_are_those_of_the_merged_model(
    family: str, case: str, models: Any, tmp_path: Path
) -> None:
    model, directory = models(family)
    options = dict(CASES[case])
    targets = options.pop("targets", TARGETS.get(family, ALL))
    is_transposed = family == "gpt2"
    shapes = modules_of(dict(model.named_parameters()), targets, options.pop("layers", None), is_transposed)
    assert {module.rpartition(".")[2] for module in shapes} == set(targets)
    factors = write_adapter(tmp_path / "a", shapes, **options)
    alphas = {module: options.get("alpha", 8) for module in shapes}
    for pattern in options.get("alpha_pattern", {}):
        alphas |= {module: 1.5 for module in shapes if module.endswith("layers.1.mlp.down_proj")}
        assert pattern
    scales = {
        module: alphas[module] / (a.shape[0] ** 0.5 if options.get("use_rslora") else a.shape[0])
        for module, (a, _) in factors.items()
    }
    changed = merged(model, factors, scales, is_transposed)
    network = load_model(directory, device="cpu", adapters=AdapterBank(2, 8))
    config = EngineConfig(
        num_pages=64, max_num_seqs=4, max_num_batched_tokens=16, max_adapters=2, check_invariants=True
    )
    engine = Engine(config, network)
    engine.load_adapter("a", tmp_path / "a")
    (request,) = engine.add(
        PROMPT,
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0, adapter="a"),
        request_id="a",
    )
    (plain,) = engine.add(
        PROMPT, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0), request_id="plain"
    )
    while engine.has_work:
        engine.step()
    engine.check_idle()
    for mine, theirs in ((request, changed), (plain, model)):
        with torch.no_grad():
            logits = theirs(torch.tensor([mine.tokens])).logits[0]
        assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == mine.output_ids
        expected = logits.log_softmax(-1)[torch.arange(len(mine.tokens) - 1), torch.tensor(mine.tokens[1:])]
        scored = [p[t].logprob for p, t in zip(mine.prompt_logprobs[1:], PROMPT[1:], strict=True) if p]
        found = torch.tensor(scored + mine.token_logprobs)
        assert (found - expected).abs().max() < LOGPROBS * 3
    assert request.output_ids != plain.output_ids or request.token_logprobs != plain.token_logprobs
