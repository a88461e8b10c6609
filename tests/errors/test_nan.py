"""Weights with NaN or infinity that one prompt meets: it fails, and nobody else notices, whatever is loaded.

Its keys and values lie in pages that others get next, in the prefix cache, in drafts, in statistics of pages.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import CONFIG, make_engine, run_all, tiny_model

from headrace.engine.engine import Engine
from headrace.errors import NumericalError
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.request import Finish, Request

BAD = 60
GOOD = [list(range(4, 20)), [7, 8, 9] * 5, [11, 12], [5] * 11]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 0.7, "seed": 6, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.0, "repetition_penalty": 1.2},
]
LOADS: list[dict[str, Any]] = [
    {},
    {"decoder": "ngram"},
    {"decoder": "draft_model"},
    {"evictor": "key_norm", "cache_budget": 16, "cache_interval": 8},
    {"codec": "fp8"},
    {"selector": "quest", "selector_budget": 8},
    {"num_pages": 26, "max_model_len": 60, "preemption": "swap"},
]


def damaged(value: float) -> CausalLM:
    model = copy.deepcopy(tiny_model())
    with torch.no_grad():
        model.embed_VE[BAD] = value
        model.head_VE.mul_(20.0)
        model.head_VE[BAD] = 0.0  # far below the best: nobody draws it
    return model


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("drafter")
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: views[0].contiguous().clone() for name, views in tiny_model().tensors().items()}
    save_file(tensors, str(Path(path) / "model.safetensors"))
    return str(path)


def add(engine: Engine, number: int, prompt: list[int], name: str, n: int = 1) -> list[Request]:
    params = SamplingParams(**{"max_tokens": 20, "ignore_eos": True, "n": n, **PARAMS[number % len(PARAMS)]})
    return engine.add(prompt, params, request_id=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", LOADS, ids=lambda options: next(iter(options.values()), "plain"))
def test_only_the_request_fails(options: dict[str, Any], value: float, drafter: str) -> None:
    if options.get("decoder") == "draft_model":
        options = {**options, "draft_model": drafter}
    model = damaged(value)

    def engine() -> Engine:
        return make_engine(model=model, max_num_batched_tokens=24, max_num_seqs=3, **options)

    without = engine()
    expected = [add(without, i, prompt, f"good-{i}")[0] for i, prompt in enumerate(GOOD)]
    run_all(without)
    assert all(request.finish is Finish.LENGTH for request in expected)
    beside = engine()
    # Alone, as two samples, and behind a prefix that a good prompt shares.
    bad = add(beside, 0, [5, 6, BAD, 7, 8, 9, 10, 11], "bad-0", n=2) + add(beside, 1, [BAD], "bad-1")
    good = [add(beside, i, prompt, f"good-{i}")[0] for i, prompt in enumerate(GOOD[:2])]
    bad += add(beside, 2, [*range(4, 16), BAD], "bad-2") + add(beside, 3, [7, 8, 9, BAD], "bad-3")
    good += [add(beside, i + 2, prompt, f"good-{i + 2}")[0] for i, prompt in enumerate(GOOD[2:])]
    run_all(beside)
    beside.check_idle()
    # Once more, over the pages that the bad ones have left.
    again = [add(beside, i, prompt, f"again-{i}")[0] for i, prompt in enumerate(GOOD)]
    run_all(beside)
    beside.check_idle()
    wanted = [request.output_ids for request in expected]
    assert [request.output_ids for request in good] == wanted
    assert [request.output_ids for request in again] == wanted
    for request in bad:
        assert (request.finish, request.output_ids) == (Finish.ERROR, [])
        assert isinstance(request.error, NumericalError)


def test_a_request_that_meets_it_later_keeps_its_tokens() -> None:
    """The bad token is drawn, not given: what came before stands."""
    engine = make_engine(model=damaged(float("nan")))
    forced = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, logit_bias={BAD: 1e4})
    (request,) = engine.add([5, 6, 7], forced, request_id="forced")
    run_all(engine)
    assert (request.finish, request.output_ids) == (Finish.ERROR, [BAD])
    assert "the logits of token 4 hold NaN" in str(request.error)
    engine.check_idle()
