"""Recorded steps: a replay computes what the same padded step computes, and tokens do not change with either."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from tiny import VOCAB, run_all, tiny_model
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.graphs import Pool, StepGraphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


class Unrecorded(StepGraphs):
    """Pads steps, and runs each of them as it is."""

    def run(self, key: Hashable, step: Callable[[], Tensor], is_wide: bool = False) -> Tensor:
        return step()


def tiny_requests(**options: Any) -> tuple[Engine, list[list[int]]]:
    model = tiny_model(device="cuda")
    engine = Engine(EngineConfig(num_pages=400, page_size=4, max_num_seqs=8, **options), model, eos_ids=[3])
    requests = []
    for i in range(14):
        prompt = [(5 * i * (j + 2) + j) % VOCAB for j in range(3 + 2 * i)]
        params = SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=10 + 3 * i)
        requests += engine.add(prompt, params, request_id=str(i))
        engine.step()
    run_all(engine)
    engine.check_idle()
    return engine, [r.output_ids for r in requests]


@pytest.mark.parametrize("decoder", ["autoregressive", "ngram"])
def test_tokens_are_those_without_graphs_and_without_planning_ahead(decoder: str, events: Counter[str]) -> None:
    _, expected = tiny_requests(decoder=decoder, cuda_graphs=False, async_scheduling=False)
    for ahead in (False, True):
        engine, tokens = tiny_requests(decoder=decoder, async_scheduling=ahead)
        assert tokens == expected
        assert engine.runner.graphs is not None
        events["replayed steps"] += engine.runner.graphs.replays
        events["shapes"] += len(engine.runner.graphs.keys)
        if ahead and decoder == "autoregressive":
            events["planned ahead"] += engine.stats.ahead
            assert engine.stats.ahead > 20


@pytest.mark.parametrize("decoder", ["autoregressive", "ngram", "draft_model"])
def test_a_replay_has_the_bits_of_its_step(decoder: str, events: Counter[str]) -> None:
    prompts = ["def add(a, b):\n", "import os\n\n\ndef walk(path):\n", "class Stack:\n", "x = [1, 2, 3]\n"] * 3
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=48)
    runs = []
    for kind in (StepGraphs, Unrecorded):
        # Steps that are planned ahead depend on the clock's moods for nothing, but are cut alike without.
        llm = LLM(device="cuda", decoder=decoder, kv_cache_gib=0.5, async_scheduling=False, max_num_batched_tokens=64)
        llm.engine.runner.graphs = kind(llm.engine.device)
        outputs = llm.generate(prompts, params)
        runs.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
        events["replayed steps"] += llm.engine.runner.graphs.replays
        llm.engine.check_idle()
    assert runs[0] == runs[1]
    events["tokens"] += sum(len(ids) for ids, _ in runs[0])


def test_a_wide_replay_has_the_bits_of_its_step(events: Counter[str]) -> None:
    """Prompts of up to 60 tokens, many at once: steps of more rows than a bucket that are recorded whole."""
    events["wide replays"] = 0
    runs = []
    for kind in (StepGraphs, Unrecorded):
        llm = LLM(
            device="cuda",
            kv_cache_gib=0.5,
            async_scheduling=False,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
        )
        device = llm.engine.device
        graphs = llm.engine.runner.graphs = kind(device, 1024, Pool(device, 2**20))
        graphs.recent.meetings = 1
        runs.append([])
        for wave in range(4):
            prompts = [[5 + (7 * i * (wave + 1) + j * j) % 300 for j in range(40 + i % 20)] for i in range(60)]
            params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=6 + i % 9) for i in range(60)]
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
            runs[-1] += [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]
        events["wide replays"] += graphs.wide_replays
        llm.engine.check_idle()
    assert runs[0] == runs[1]
