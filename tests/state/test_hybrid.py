"""Engines over models with fixed states: every token and every committed state equals one naive forward.

The oracle evaluates a request's whole sequence at once, with recurrences in closed form; it shares no scan, no cache
and no step with the engine, only the projections and the keyed draw.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tenants
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import cut, run_all
from torch import Tensor
from toy import EOS, MODEL_LEN, RING, VOCAB, Naive, Toy, naive, toy

from headrace.cache.states import group_states, state_bytes
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.sizing import GIB
from headrace.errors import CapacityError, ConfigError, InvariantError
from headrace.kernels.draw import DrawParams, draw
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.parts import SCHEDULERS
from headrace.request import Finish, Request

HYBRID, PURE = "RAWRAW", "RR"
DECODERS = ["autoregressive", "ngram", "test_always_right", "test_always_wrong", "test_jacobi", "test_sometimes_right"]
TOLERANCE = 1e-12

Snapshot = tuple[Request, int, dict[int, Tensor]]
"""A request, its committed tokens, and its states by layer."""


@pytest.fixture(autouse=True)
def _tenants() -> Iterator[None]:
    with tenants.registered(*tenants.TENANTS.items()):
        yield


def make(pattern: str, **options: Any) -> Engine:
    """An engine that audits itself after every step; without pages where no layer keeps any."""
    defaults: dict[str, Any] = {"max_num_batched_tokens": 4096, "max_num_seqs": 4, "page_size": 4, "draft_tokens": 3}
    defaults["preemption"] = "recompute"  # the default goes by measured seconds, and tests should not
    if pattern != PURE:
        defaults["num_pages"] = 256
    config = EngineConfig(**{**defaults, "check_invariants": True, "device": "cpu", **options})
    return Engine(config, toy(pattern), eos_ids=(EOS,))


@cache
def oracle(pattern: str, tokens: tuple[int, ...]) -> Naive:
    return naive(toy(pattern), tokens)


def plain_draws(request: Request, logits_TV: Tensor) -> list[int]:
    """What each position of the sequence draws for the next."""
    count, params = logits_TV.shape[0], request.params

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype)

    drawing = DrawParams(
        column(params.temperature, torch.float32),
        column(params.top_k, torch.int32),
        column(params.top_p, torch.float32),
        column(params.min_p, torch.float32),
    )
    stream_T2 = torch.tensor([request.stream] * count, dtype=torch.int32)
    drawn = draw(logits_TV.float(), drawing, stream_T2, torch.arange(1, count + 1, dtype=torch.int32))
    return drawn.id_M.tolist()


def check_tokens(pattern: str, request: Request) -> None:
    """Token for token the naive forward's, and ended where plain decoding ends."""
    draws = plain_draws(request, oracle(pattern, tuple(request.tokens)).logits_TV)
    assert request.output_ids == draws[request.prompt_len - 1 : -1]
    ends = [i for i, token in enumerate(request.output_ids) if token == EOS and not request.params.ignore_eos]
    if request.finish is Finish.ABORT:
        return
    if ends:
        assert (ends[0], request.finish) == (len(request.output_ids) - 1, Finish.STOP)
    else:
        assert (request.n_tok, request.finish) == (request.limit, Finish.LENGTH)


def take_down(engine: Engine, seen: list[Snapshot]) -> None:
    """The states of every running request, to be compared once all its tokens are known."""
    for request in engine.running:
        states = {layer: engine.states.state(layer, request.index).clone() for layer in engine.states.layers}
        seen.append((request, request.n_done, states))


def compare_states(pattern: str, seen: list[Snapshot]) -> None:
    for request, n_done, states in seen:
        expected = oracle(pattern, tuple(request.tokens)).states
        assert states.keys() == expected.keys()
        for layer, state in states.items():
            truth = expected[layer][n_done - 1] if n_done else torch.zeros_like(state)
            torch.testing.assert_close(state, truth, rtol=TOLERANCE, atol=TOLERANCE)


def teach(pattern: str, prompt: tuple[int, ...], params: SamplingParams) -> None:
    """The scripted drafters read what the request makes alone."""
    tenants.teach(prompt, alone(pattern, prompt, json.dumps(replace(params, decoder=None).to_dict())))


@cache
def alone(pattern: str, prompt: tuple[int, ...], params: str) -> tuple[int, ...]:
    engine = make(pattern)
    (request,) = engine.add(prompt, SamplingParams.from_dict(json.loads(params)), request_id="alone")
    run_all(engine)
    return tuple(request.output_ids)


REPEATS = tuple((5, 9, 14, 5, 9, 22) * 4)

prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=12).map(tuple),
    st.integers(1, len(REPEATS)).map(lambda n: REPEATS[:n]),
)
params_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_k=st.sampled_from([0, 6]),
    seed=st.integers(0, 2),
    max_tokens=st.sampled_from([24, 14, 5, 1, 0]),
    ignore_eos=st.booleans(),
    decoder=st.sampled_from(DECODERS),
)
arrivals_of = st.tuples(
    st.sampled_from([0, 0, 0, 2, 7]), prompts, params_of, st.one_of(st.none(), st.none(), st.integers(0, 9))
)


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_any_schedule_equals_one_naive_forward(pattern: str, events: Counter[str]) -> None:
    """Random arrivals, chunks, seats, page famine, aborts and drafts, accepted or refused."""
    names = [
        "examples",
        "abort",
        "chunk",
        "greedy",
        "sampled",
        "stopped",
        "drafts refused",
        "drafts accepted",
        "commits",
    ]
    events.update(dict.fromkeys(names + ["famine"] * (pattern == HYBRID), 0))

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrivals_of, min_size=1, max_size=5),
        scheduler=st.sampled_from(SCHEDULERS.names()),
        budget=st.sampled_from([512, 16, 5, 1]),
        seats=st.sampled_from([4, 4, 1]),
        page_size=st.sampled_from([1, 4]),
        tight=st.booleans(),
    )
    def play(arrivals: Any, scheduler: str, budget: int, seats: int, page_size: int, tight: bool) -> None:
        pages = {"num_pages": 1 + -(-48 // page_size) + 200 * (not tight)} if pattern == HYBRID else {}
        if tight:
            arrivals = [(0, prompt, replace(params, max_tokens=24), None) for _, prompt, params, _ in arrivals]
        engine = make(
            pattern,
            scheduler=scheduler,
            decoder=",".join(DECODERS),
            max_num_batched_tokens=budget,
            max_num_seqs=seats,
            page_size=page_size,
            max_model_len=48,
            **pages,
        )
        for _, prompt, params, _ in arrivals:
            teach(pattern, prompt, params)
        seen: list[Snapshot] = []
        requests: dict[int, Request] = {}
        queue = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
        step = 0
        while queue or engine.has_work:
            while queue and arrivals[queue[0]][0] <= step:
                number = queue.pop(0)
                (requests[number],) = engine.add(arrivals[number][1], arrivals[number][2], request_id=str(number))
            for number, request in requests.items():
                after = arrivals[number][3]
                if after is not None and step == arrivals[number][0] + after and not request.finish:
                    engine.abort(request.request_id)
            before = {r.request_id: (r.n_done, r.drafted) for r in engine.running}
            engine.step()
            for request in engine.running:
                done, drafted = before.get(request.request_id, (0, 0))
                if drafted and budget > drafted * seats:  # otherwise drafts may have got no rows
                    events["drafts accepted"] += request.n_done - done - 1
                    events["drafts refused"] += drafted - (request.n_done - done - 1)
            take_down(engine, seen)
            step += 1
            assert step < 5000, "no progress"
        for request in requests.values():
            check_tokens(pattern, request)
            events["abort"] += request.finish is Finish.ABORT
            events["stopped"] += request.finish is Finish.STOP
            events["greedy" if request.params.greedy else "sampled"] += 1
        compare_states(pattern, seen)
        engine.check_idle()
        assert engine.cache.hit_tokens == 0
        events["commits"] += len(seen)
        events["chunk"] += engine.stats.chunks
        events["examples"] += 1
        if pattern == HYBRID:
            events["famine"] += engine.stats.preemptions

    play()


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_a_repeated_prompt_is_not_found_in_the_prefix_cache(pattern: str) -> None:
    """Pages without the states at their end would be worth nothing."""
    engine = make(pattern, enable_prefix_caching=True)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    for number in range(2):
        (request,) = engine.add(REPEATS, params, request_id=str(number))
        run_all(engine)
        assert request.hit_tokens == 0
        check_tokens(pattern, request)
    engine.check_idle()


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_a_forward_with_fixed_states_is_not_recorded_in_pieces(pattern: str) -> None:
    engine = make(pattern)
    cut(engine)
    (request,) = engine.add(REPEATS, SamplingParams(temperature=0.0, max_tokens=6), request_id="r")
    run_all(engine)
    check_tokens(pattern, request)
    assert engine.runner.pieces is not None
    assert not engine.runner.pieces.replays
    engine.check_idle()


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_samples_evaluate_the_prompt_for_themselves(pattern: str) -> None:
    """The first one's states have gone past the prompt when the others begin."""
    engine = make(pattern, max_num_batched_tokens=9)
    params = SamplingParams(n=4, temperature=1.0, max_tokens=8, seed=2, ignore_eos=True)
    samples = engine.add(REPEATS[:10], params, request_id="r")
    run_all(engine)
    for request in samples:
        check_tokens(pattern, request)
    assert len({tuple(request.output_ids) for request in samples}) == 4
    assert engine.stats.forks == 0
    engine.check_idle()


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_a_record_taken_at_any_step_continues_with_the_same_tokens(pattern: str) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)
    for stop_after in range(1, 12):
        first = make(pattern, max_num_batched_tokens=5, decoder="ngram")
        (request,) = first.add(REPEATS[:11], params, request_id="r")
        for _ in range(stop_after):
            first.step()
        if not first.has_work:
            break
        record = first.export(request)
        first.abort("r")
        first.check_idle()
        second = make(pattern)
        resumed = second.resume(record)
        run_all(second)
        check_tokens(pattern, resumed)
        assert len(resumed.output_ids) == 10
    assert stop_after > 5


@pytest.mark.parametrize("pattern", [HYBRID, PURE])
def test_measuring_steps_leaves_states_as_they_are(pattern: str) -> None:
    """Passes over ghost rows in the middle of a generation change no bit, not even of the trash."""
    engine = make(pattern)
    (request,) = engine.add(REPEATS[:7], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), request_id="r")
    while engine.has_work:
        engine.step()
        before = [pool.clone() for pool in engine.states.layers.values()]
        engine.runner.time_step(5)
        assert all(map(torch.equal, before, engine.states.layers.values()))
    check_tokens(pattern, request)


def test_the_audit_notices_a_state_that_missed_a_commit() -> None:
    engine = make(HYBRID)
    engine.add(REPEATS, SamplingParams(max_tokens=9, ignore_eos=True), request_id="r")
    engine.step()
    engine.audit()
    engine.states._tokens_S[1:] -= 1
    with pytest.raises(InvariantError, match="have taken up"):
        engine.audit()


def test_bytes_of_states_are_reported_and_subtracted() -> None:
    groups = group_states(toy(HYBRID).layer_states())
    engine = make(HYBRID, max_num_seqs=3)
    states = state_bytes(groups, 3, torch.float64)
    assert states == engine.states.allocated_bytes
    assert engine.allocated_bytes == engine.cache.allocated_bytes + states
    gib = (states + 3 * 4 * 4 * 2 * 2 * 3 * 8 * 10) / GIB
    small = make(HYBRID, max_num_seqs=3, num_pages=None, kv_cache_gib=gib)
    assert states < small.allocated_bytes <= gib * GIB
    with pytest.raises(CapacityError, match="max_num_seqs = 3 requests take"):
        make(HYBRID, max_num_seqs=3, num_pages=None, kv_cache_gib=0.5 * states / GIB)
    with pytest.raises(CapacityError, match="max_num_seqs = 3 requests take"):
        make(PURE, max_num_seqs=3, kv_cache_gib=0.5 * states / GIB)


def test_a_model_without_pages_serves_its_whole_length() -> None:
    engine = make(PURE)
    assert engine.max_model_len == MODEL_LEN
    assert engine.cache.allocated_bytes == 0
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    requests = [engine.add(REPEATS[: 3 + i], params, request_id=str(i))[0] for i in range(5)]
    run_all(engine)
    assert {request.n_tok for request in requests} == {MODEL_LEN}
    assert engine.stats.preemptions == 0
    for request in requests:
        check_tokens(PURE, request)
    engine.check_idle()
    with pytest.raises(ConfigError, match="num_pages is 9, but no layer"):
        make(PURE, num_pages=9)


class Branching(tenants.AlwaysWrong):
    """A decoder whose rows may branch."""

    tree = True


class OwnToy(tenants.AlwaysWrong):
    """A decoder that drafts with a recurrent model."""

    models: tuple[CausalLM, ...] = (Toy(PURE),)


def test_decoders_that_states_cannot_follow_are_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=f"draft_tokens to at most {RING}"):
        make(HYBRID, decoder="ngram", draft_tokens=RING + 1)
    make(HYBRID, decoder="ngram", draft_tokens=RING)
    with tenants.registered(("test_branching", Branching), ("test_own", OwnToy)):
        with pytest.raises(ConfigError, match="'test_branching' verifies trees"):
            make(HYBRID, decoder="test_branching")
        with pytest.raises(ConfigError, match="'test_own' has a model of its own"):
            make(HYBRID, decoder="test_own")
