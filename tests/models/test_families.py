"""Every family through the engine: the tokens of a batch that is chunked, preempted and cached are those of the dense
oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_context import dense_greedy
from test_model_parity import OPTIONS, prompts
from tiny_models import CLASSES, reference

from headrace import LLM, SamplingParams
from headrace.models.checkpoint import load_model
from headrace.models.registry import model_types

NAMES = [next(name for name, (family, _) in OPTIONS.items() if family == wanted) for wanted in CLASSES]


def test_every_family_is_here() -> None:
    assert sorted(CLASSES) == model_types()
    assert {family for family, _ in OPTIONS.values()} == set(CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_oracle(name: str, tmp_path: Path) -> None:
    family, options = OPTIONS[name]
    reference(family, tmp_path, **options)
    sequences = prompts(131, 29, 1, 8, 30, 17)
    sequences[3][:24] = sequences[0][:24]  # a common prefix
    model = load_model(tmp_path, device="cpu", dtype="float64")
    expected = [dense_greedy(model, prompt, 24) for prompt in sequences]
    llm = LLM(
        model=str(tmp_path),
        dtype="float64",
        device="cpu",
        skip_tokenizer_init=True,
        page_size=4,
        num_pages=40,
        max_num_seqs=4,
        max_num_batched_tokens=11,
        max_model_len=64,
        check_invariants=True,
    )
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in sequences], params)
        assert [output.outputs[0].token_ids for output in outputs] == expected
    assert torch.get_default_dtype() == torch.float32
