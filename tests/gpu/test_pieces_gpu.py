"""Forwards recorded in pieces: a replay has the bits of the same padded step, sizes share memory, hosts are quick."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import VOCAB, run_all, tiny_model

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.graphs import BUCKETS
from headrace.engine.sizing import forward_bytes
from headrace.kernels.attention import gpu, squares
from headrace.request import Finish

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


def prompts(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Of 20 to 900 tokens."""
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randint(5, 300) for _ in range(rng.randint(20, 900))]} for _ in range(count)]


@pytest.mark.parametrize("codec", ["model", "fp8"])
@pytest.mark.parametrize("decoder", ["autoregressive", "ngram"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_replay_has_the_bits_of_its_step(dtype: str, decoder: str, codec: str, events: Counter[str]) -> None:
    params = [SamplingParams(temperature=0.7 * (i % 2), seed=i, max_tokens=8 + i) for i in range(24)]
    runs = []
    for recorded in (True, False):
        llm = LLM(
            device="cuda",
            dtype=dtype,
            decoder=decoder,
            codec=codec,
            kv_cache_gib=0.5,
            async_scheduling=False,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
        pieces = llm.engine.runner.pieces
        assert pieces is not None
        pieces.recent.meetings = 1
        if not recorded:
            pieces.pool = None  # pads steps, and runs each of them as it is
        runs.append([])
        for seed in (1, 2):
            outputs = llm.generate(prompts(24, seed), params)
            runs[-1] += [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]
        events["replays"] += pieces.replays
        events["wide sizes"] += sum(key[0] > BUCKETS[-1] for key in pieces.recent.keys)
        events["full steps"] += any(key[0] == 2048 for key in pieces.recent.keys)
        llm.engine.check_idle()
    assert runs[0] == runs[1]


def test_tokens_are_those_without_graphs_whatever_comes_between_replays(events: Counter[str]) -> None:
    """In float64: famine, aborts, waves of steps that mix prompts and decoding, planned ahead."""
    events.update(dict.fromkeys(["replays", "famine", "abort"], 0))
    model = tiny_model("float64", 0).cuda()
    runs = []
    for recorded in (False, True):
        engine = Engine(
            EngineConfig(num_pages=180, page_size=4, max_num_seqs=16, cuda_graphs=recorded, preemption="recompute"),
            model,
            eos_ids=[3],
        )
        if engine.runner.pieces is not None:
            engine.runner.pieces.recent.meetings = 1
        requests = []
        for number in range(5):
            for i in range(12):
                prompt = [(7 * i + 3 * j * (number + 1) + j * j) % VOCAB for j in range(50 + 2 * i)]
                params = SamplingParams(
                    temperature=0.8 * (i % 2), seed=i, max_tokens=12, presence_penalty=0.1 * (i % 3)
                )
                requests += engine.add(prompt, params, request_id=f"{number}-{i}")
            for _ in range(3):
                engine.step()
            engine.abort(f"{number}-{number}")
        run_all(engine)
        engine.check_idle()
        events["famine"] += engine.stats.preemptions
        events["abort"] += sum(r.finish is Finish.ABORT for r in requests)
        events["replays"] += engine.runner.pieces.replays if engine.runner.pieces else 0
        runs.append([None if r.finish is Finish.ABORT else r.output_ids for r in requests])
    assert runs[0] == runs[1]


def pool_bytes(llm: LLM) -> int:
    """Of the memory that recordings share."""
    pieces = llm.engine.runner.pieces
    assert pieces is not None
    assert pieces.pool is not None
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(pieces.pool.handle))


def test_the_memory_of_a_forward_is_that_of_its_widest_product_and_its_inputs() -> None:
    llm = LLM(device="cuda", dtype="bfloat16", kv_cache_gib=0.5)
    config = llm.engine.model.config
    gates = 2 * config.intermediate_size * 2
    found = forward_bytes(llm.engine.model, 4096, turns=True)
    assert 4096 * gates <= found <= 4096 * (4 * gates + 16 * config.hidden_size)


def test_sizes_share_one_arena() -> None:
    """From the narrowest to the widest, which would be the worst order without it."""
    llm = LLM(
        device="cuda",
        dtype="bfloat16",
        kv_cache_gib=1.0,
        max_num_batched_tokens=4096,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    pieces = llm.engine.runner.pieces
    assert pieces is not None
    assert pieces.pool is not None
    pieces.recent.meetings = 1
    arena_bytes = pieces.pool.arena_bytes
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=1)
    length = min(llm.engine.max_model_len - 2, 500)
    for rows in (600, 1000, 1500, 2100, 2900, 3500, 3900):
        parts = [length] * (rows // length) + ([rows % length] if rows % length else [])
        llm.generate([{"prompt_token_ids": [5 + i % 300 for i in range(n)]} for n in parts], [params] * len(parts))
    assert len({key[0] for key in pieces.recent.keys if key[0] > BUCKETS[-1]}) >= 3
    # Products want some room of their own.
    assert pool_bytes(llm) <= arena_bytes + 96 * 2**20


def test_the_host_launches_a_wide_step_in_less_time() -> None:
    """What it is for: medians of what `launch` takes, in pieces and without."""
    found = {}
    for recorded in (True, False):
        llm = LLM(
            device="cuda",
            dtype="bfloat16",
            kv_cache_gib=1.0,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            cuda_graphs=recorded,
        )
        llm.generate(prompts(64, 1), SamplingParams(temperature=0.0, max_tokens=1))
        launch, times = llm.engine.runner.launch, []

        def timed(*arguments: object, launch: object = launch, times: list[float] = times) -> object:
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            result = launch(*arguments)  # type: ignore[operator]
            times.append(time.perf_counter() - start_s)
            return result

        llm.engine.runner.launch = timed  # type: ignore[method-assign, assignment]
        llm.generate(prompts(64, 2), SamplingParams(temperature=0.0, max_tokens=1))
        found[recorded] = sorted(times)[len(times) // 2] * 1e3
    print(f"host: {found[True]:.2f} ms a step in pieces, {found[False]:.2f} ms without")
    assert found[True] < found[False]


def test_long_prompts_are_read_between_pieces_as_they_are_without(
    monkeypatch: pytest.MonkeyPatch, events: Counter[str]
) -> None:
    """Squares and pages, in prompts that are cut into several steps and beside requests that decode."""
    monkeypatch.setattr(squares, "GRAIN", 4)
    monkeypatch.setattr(squares, "LEAST", 4)
    original = gpu.attend_square

    def counted(*arguments: Any) -> Any:
        events["squares"] += 1
        return original(*arguments)

    monkeypatch.setattr(gpu, "attend_square", counted)
    runs = []
    for recorded in (True, False):
        options = {"max_num_batched_tokens": 128, "kv_cache_gib": 0.5, "async_scheduling": False}
        llm = LLM(device="cuda", dtype="bfloat16", enable_prefix_caching=False, **options)
        pieces = llm.engine.runner.pieces
        assert pieces is not None
        llm.engine.runner.graphs = None
        pieces.recent.meetings = 1
        if not recorded:
            pieces.pool = None
        outputs = llm.generate(prompts(12, 3), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        runs.append([(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs])
        events["replays"] += pieces.replays
    assert events["squares"]
    assert runs[0] == runs[1]
