"""Every family through the engine: the tokens of a batch that is chunked, preempted and cached are those of the dense
oracle."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from dense_context import dense_greedy, dense_logits
from test_model_parity import OPTIONS, prompts
from tiny import cut
from tiny_models import CLASSES, reference

from headrace import LLM, SamplingParams
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.models.registry import model_types

NAMES = [next(name for name, (family, _) in OPTIONS.items() if family == wanted) for wanted in CLASSES]
COUNT = 24
NEAR = 1e-3
"""Difference of logits, relative to the largest, below which float32 may choose the other token."""


def test_every_family_is_here() -> None:
    assert sorted(CLASSES) == model_types()
    assert {family for family, _ in OPTIONS.values()} == set(CLASSES)


def generated(
    directory: Path, sequences: list[list[int]], events: Counter[str], in_pieces: bool = False, **options: object
) -> list[list[int]]:
    """What the engine makes of the prompts in a small cache and small steps, the second time with prefixes cached.

    `in_pieces`: every forward is recorded in pieces.
    """
    llm = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        page_size=4,
        num_pages=26,
        max_num_seqs=4,
        max_num_batched_tokens=11,
        max_model_len=64,
        check_invariants=True,
        **options,
    )
    if in_pieces:
        llm.engine.runner.graphs = None
        cut(llm.engine)
    params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
    results = []
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in sequences], params)
        results.append([output.outputs[0].token_ids for output in outputs])
    assert results[0] == results[1]
    llm.engine.check_idle()
    events["chunk"] += llm.engine.stats.chunks
    events["famine"] += llm.engine.stats.preemptions
    events["hit"] += llm.engine.cache.hit_tokens
    if in_pieces and llm.engine.runner.pieces is not None:
        events["in pieces"] += llm.engine.runner.pieces.replays
    return results[0]


def make(name: str, directory: Path) -> tuple[CausalLM, list[list[int]]]:
    """The oracle's model, and prompts of which two begin alike."""
    family, options = OPTIONS[name]
    reference(family, directory, **options)
    sequences = prompts(131, 29, 1, 8, 30, 17)
    sequences[3][:24] = sequences[0][:24]
    return load_model(directory, device="cpu", dtype="float64"), sequences


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_oracle(name: str, tmp_path: Path, events: Counter[str]) -> None:
    events.update({"chunk": 0, "famine": 0, "hit": 0, "in pieces": 0})
    model, sequences = make(name, tmp_path)
    expected = [dense_greedy(model, prompt, COUNT) for prompt in sequences]
    for in_pieces in (False, True):
        assert generated(tmp_path, sequences, events, in_pieces, dtype="float64", device="cpu") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_on_a_gpu_are_those_of_the_oracle(
    name: str, in_pieces: bool, tmp_path: Path, events: Counter[str]
) -> None:
    """In float32; where a token differs, the oracle must have found both about as likely."""
    events.update({"chunk": 0, "hit": 0, "equal": 0})
    model, sequences = make(name, tmp_path)
    got = generated(tmp_path, sequences, events, in_pieces, dtype="float32", device="cuda")
    for prompt, tokens in zip(sequences, got, strict=True):
        logits_TV = dense_logits(model, [prompt + tokens])[0][len(prompt) - 1 : -1]
        for token, logits_V in zip(tokens, logits_TV, strict=True):
            best = logits_V.max()
            near = float((best - logits_V[token]) / logits_V.abs().max())
            assert near < NEAR
            events["equal" if near == 0 else "near ties"] += 1
