"""Law 1: a result is a function of (model, prompt, parameters, seed), whatever else happens.

Random arrivals, budgets, page sizes, page famine, aborts and prefix hits: each request's tokens equal those of
the same request alone, greedy and sampled. The model is float64, where a difference is a bug.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import MODEL_LEN, VOCAB, alone_of, cut, examples, make_engine, pad

from headrace.engine.engine import Engine
from headrace.params import SamplingParams
from headrace.parts import SCHEDULERS
from headrace.request import Finish, Request

SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(40)) for j in range(2)]

params_strategy = st.one_of(
    st.builds(SamplingParams, temperature=st.just(0.0), max_tokens=st.integers(1, 30), ignore_eos=st.booleans()),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.6, 1.0]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.9]),
        min_p=st.sampled_from([0.0, 0.05]),
        max_tokens=st.integers(1, 30),
        seed=st.integers(0, 3),
        presence_penalty=st.sampled_from([0.0, 0.7]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
    ),
)


@st.composite
def prompt_strategy(draw: st.DrawFn) -> tuple[int, ...]:
    head = draw(st.sampled_from(SHARED))[: draw(st.sampled_from([0, 2, 5, 17, 40]))]
    return (*head, *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)))


arrival_strategy = st.tuples(
    st.sampled_from([0, 0, 0, 1, 3, 9, 25]),
    prompt_strategy(),
    params_strategy,
    st.one_of(st.none(), st.none(), st.integers(0, 12)),
)


def serve(engine: Engine, arrivals: list[tuple[int, tuple[int, ...], SamplingParams, int | None]]) -> list[Request]:
    """Play the arrivals: (step, prompt, parameters, steps until an abort)."""
    queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    requests: dict[int, Request] = {}
    aborts: dict[int, list[str]] = {}
    step = 0
    while queue or engine.has_work:
        while queue and queue[0][1][0] <= step:
            number, (_, prompt, params, abort_after) = queue.pop(0)
            (requests[number],) = engine.add(prompt, params, request_id=str(number))
            if abort_after is not None:
                aborts.setdefault(step + abort_after, []).append(str(number))
        for request_id in aborts.pop(step, ()):
            engine.abort(request_id)
        engine.step()
        step += 1
        assert step < 20_000, "no progress"
    return [requests[i] for i in range(len(arrivals))]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_tokens_are_those_of_the_request_alone(scheduler: str, ahead: bool, events: Counter[str]) -> None:
    """`ahead`: steps are planned while the one before runs, and padded to the shapes that a GPU records. Without, they
    run in the pieces that a GPU records, some of them."""
    counted = ["chunk", "famine", "abort", "hit", "eviction", "sampled", "greedy", "stopped by a token"]
    counted += ["in pieces", "stopped late"]
    events.update(dict.fromkeys([*counted, "planned ahead", "padded shape", "steady"] if ahead else counted[:-1], 0))

    @settings(max_examples=examples(250), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival_strategy, min_size=1, max_size=7),
        budget=st.sampled_from([1, 7, 64, 768, 10**6]),
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 2, 1000]),
        seats=st.sampled_from([1, 3, 8, 8]),
        caching=st.booleans() | st.just(True),
        tight=st.booleans(),
        again=st.booleans(),
        in_pieces=st.booleans(),
    )
    def run(
        arrivals: Any,
        budget: int,
        page_size: int,
        spare_pages: int,
        seats: int,
        caching: bool,
        tight: bool,
        again: bool,
        in_pieces: bool,
    ) -> None:
        longest = 80
        if again:  # a prompt that was there before is found in the cache
            arrivals = [*arrivals, (9, arrivals[0][1], arrivals[-1][2], None)]
        if tight:  # all at once, to the end, with room for one: pages run out
            arrivals = [(0, prompt[-4:], replace(p, max_tokens=30), None) for _, prompt, p, _ in arrivals]
            spare_pages, seats = 0, 8
        engine = make_engine(
            scheduler=scheduler,
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-longest // page_size) + spare_pages,
            max_model_len=longest,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
            async_scheduling=ahead,
        )
        if ahead:
            pad(engine)
        elif in_pieces:
            cut(engine)
        requests = serve(engine, arrivals)
        for request in requests:
            tokens, reason = alone_of(request)
            if request.finish is Finish.ABORT:
                events["abort"] += 1
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["greedy" if request.params.greedy else "sampled"] += 1
            events["stopped by a token"] += reason == "stop"
        engine.check_idle()
        events["examples"] += 1
        events["chunk"] += engine.stats.chunks
        events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens > 0
        events["eviction"] += sum(pool.reclaimed for pool in engine.cache.pools)
        events["in pieces"] += engine.runner.pieces.replays if engine.runner.pieces else 0
        if ahead:
            assert engine.runner.graphs is not None
            events["planned ahead"] += engine.stats.ahead
            events["steady"] += engine.stats.steady
            events["stopped late"] += engine.stats.ahead and any(r.finish is Finish.STOP for r in requests)
            events["padded shape"] += len(engine.runner.graphs.keys)

    run()


def test_a_record_taken_at_any_step_continues_with_the_same_tokens() -> None:
    """Interrupt at each step of a short run, resume in another engine: nothing differs."""
    params = SamplingParams(temperature=0.9, max_tokens=12, seed=5, logprobs=2, ignore_eos=True, frequency_penalty=0.3)
    prompt = SHARED[0][:19]
    whole = make_engine()
    (expected,) = whole.add(prompt, params, request_id="r")
    while whole.has_work:
        whole.step()
    for stop_after in range(14):
        first = make_engine(max_num_batched_tokens=7)
        (request,) = first.add(prompt, params, request_id="r")
        for _ in range(stop_after):
            first.step()
        if not first.has_work:
            break
        record = request.to_record()
        first.abort("r")
        first.check_idle()
        second = make_engine(page_size=16)
        resumed = second.resume(record)
        while second.has_work:
            second.step()
        assert resumed.tokens == expected.tokens
        assert resumed.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-5)
        assert [sorted(p) for p in resumed.top_logprobs] == [sorted(p) for p in expected.top_logprobs]
        second.check_idle()
    assert stop_after >= 12


def test_seedless_requests_are_keyed_by_their_number_and_report_the_seed() -> None:
    params = SamplingParams(temperature=1.0, max_tokens=10, ignore_eos=True)
    first, second = make_engine(), make_engine(max_num_batched_tokens=3)
    (one,) = first.add(SHARED[0][:9], params, request_id="a", number=4)
    (two,) = second.add(SHARED[0][:9], params, request_id="b", number=4)
    (other,) = second.add(SHARED[0][:9], params, request_id="c", number=5)
    for engine in (first, second):
        while engine.has_work:
            engine.step()
    assert one.output_ids == two.output_ids
    assert one.output_ids != other.output_ids
    third = make_engine()
    (again,) = third.add(SHARED[0][:9], SamplingParams(**{**params.to_dict(), "seed": one.seed}), request_id="d")
    while third.has_work:
        third.step()
    assert again.output_ids == one.output_ids


def test_samples_differ_and_each_is_reproducible() -> None:
    params = SamplingParams(n=4, temperature=1.0, max_tokens=10, seed=1, ignore_eos=True)
    runs = []
    for budget in (3, 4096):
        engine = make_engine(max_num_batched_tokens=budget)
        samples = engine.add(SHARED[1][:20], params, request_id="s")
        while engine.has_work:
            engine.step()
        runs.append([sample.output_ids for sample in samples])
        engine.check_idle()
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == 4


def test_the_longest_request_fits_an_engine_of_its_size() -> None:
    pages = 1 + MODEL_LEN // 4
    engine = make_engine(num_pages=pages, max_num_batched_tokens=5)
    samples = [
        engine.add(
            SHARED[0][:30], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True), request_id=str(i)
        )[0]
        for i in range(3)
    ]
    while engine.has_work:
        engine.step()
    assert {len(s.tokens) for s in samples} == {MODEL_LEN}
    assert engine.stats.preemptions > 0
    engine.check_idle()
