"""Priorities and deadlines: they decide when tokens come and how many, never which."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_law_one import params_strategy, prompt_strategy
from tiny import alone_of, examples, make_engine, run_all

from headrace.engine.engine import Engine
from headrace.errors import InvariantError, RequestError
from headrace.params import SamplingParams
from headrace.parts import SCHEDULERS
from headrace.request import Finish, Request, State

PROMPT = [5, 9, 2, 44, 17, 8, 30, 21, 13]
LONG = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def add(engine: Engine, name: str, params: SamplingParams = LONG, **urgency: Any) -> Request:
    (request,) = engine.add(PROMPT, params, request_id=name, **urgency)
    return request


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_tokens_depend_on_neither_priority_nor_deadline(scheduler: str, events: Counter[str]) -> None:
    """Arrivals with priorities and deadlines (a step is a second) under famine: tokens are those of the request
    alone, or the first of them where time ran out; every request ends, and nothing is left behind."""
    counted = ["overtake", "preemption by priority", "famine", "timeout waiting", "timeout running", "in time", "hit"]
    events.update(dict.fromkeys(counted, 0))

    @settings(max_examples=examples(200), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(
            st.tuples(
                st.sampled_from([0, 0, 0, 1, 3, 9, 25]),
                prompt_strategy(),
                params_strategy,
                st.sampled_from([0, 0, 1, -3]),
                st.none() | st.sampled_from([0.5, 4.0, 20.0, 1000.0]),
            ),
            min_size=1,
            max_size=7,
        ),
        budget=st.sampled_from([1, 7, 64]),
        page_size=st.sampled_from([1, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 4, 1000]),
        seats=st.sampled_from([1, 3, 8]),
        caching=st.booleans(),
    )
    def run(arrivals: list[Any], budget: int, page_size: int, spare_pages: int, seats: int, caching: bool) -> None:
        clock = Clock()
        engine = make_engine(
            clock=clock,
            scheduler=scheduler,
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-80 // page_size) + spare_pages,
            max_model_len=80,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
        )
        queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
        requests: list[Request] = []
        step = 0
        while queue or engine.has_work:
            while queue and queue[0][1][0] <= step:
                number, (_, prompt, params, priority, deadline_s) = queue.pop(0)
                requests += engine.add(prompt, params, request_id=str(number), priority=priority, deadline_s=deadline_s)
            before = {r.request_id: (r.state, r.preemptions) for r in requests}
            changed = engine.step()
            note(events, requests, before)
            for request in changed:
                if request.finish is Finish.TIMEOUT:
                    was_running = before[request.request_id][0] is State.RUNNING
                    events["timeout running" if was_running else "timeout waiting"] += 1
            step += 1
            clock.now_s += 1.0
            assert step < 20_000, "no progress"
        for request in requests:
            tokens, reason = alone_of(request)
            length = len(request.output_ids)
            if request.finish is Finish.TIMEOUT:
                assert request.deadline_at_s is not None
                assert tuple(request.output_ids) == tokens[:length]
                assert request.finish_s is not None
                assert 0.0 <= request.finish_s - request.deadline_at_s < 1.0
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["in time"] += request.deadline_at_s is not None
        engine.check_idle()
        events["examples"] += 1
        events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens > 0

    run()


def note(events: Counter[str], requests: list[Request], before: dict[str, tuple[State, int]]) -> None:
    """Count overtakes and preemptions by a waiting request of a higher priority."""
    line = (State.WAITING, State.PREEMPTED)
    admitted = [r for r in requests if before[r.request_id][0] in line and r.state is State.RUNNING]
    waiting = [r for r in requests if r.state in line]
    for request in admitted:
        assert all(request.rank < r.rank for r in waiting), "a request was overtaken by one behind it"
        events["overtake"] += any(r.arrival < request.arrival for r in waiting)
        preempted = [r for r in waiting if r.preemptions > before[r.request_id][1]]
        events["preemption by priority"] += any(r.priority > request.priority for r in preempted)


# Priorities


def test_the_lower_number_goes_first() -> None:
    engine = make_engine(max_num_seqs=1)
    requests = [add(engine, str(i), priority=p) for i, p in enumerate([0, 5, -1, 0])]
    ended: list[Request] = []
    while engine.has_work:
        ended += [r for r in engine.step() if r.finish]
    assert [requests.index(r) for r in ended] == [2, 0, 3, 1]
    assert engine.stats.preemptions == 0
    engine.check_idle()


def test_an_urgent_request_takes_a_seat_at_once() -> None:
    engine = make_engine(max_num_seqs=2)
    low = [add(engine, str(i), priority=1) for i in range(2)]
    for _ in range(5):
        engine.step()
    urgent = add(engine, "urgent")
    engine.step()
    assert [r.state for r in (*low, urgent)] == [State.RUNNING, State.PREEMPTED, State.RUNNING]
    assert len(urgent.output_ids) == 1
    run_all(engine)
    assert [r.preemptions for r in low] == [0, 1]
    assert len({tuple(r.output_ids) for r in (*low, urgent)}) == 1
    engine.check_idle()


def test_equals_do_not_take_from_each_other() -> None:
    engine = make_engine(max_num_seqs=1)
    first, second = add(engine, "0", priority=3), add(engine, "1", priority=3)
    while not first.finish:
        engine.step()
        assert second.state is State.WAITING or first.finish
    run_all(engine)
    assert engine.stats.preemptions == 0


def test_a_stream_of_urgent_requests_starves_only_lower_ones() -> None:
    """As long as they come the low one does not move; the one in the middle of the line does."""
    engine = make_engine(max_num_seqs=1)
    short = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    low, equal = add(engine, "low", priority=2), add(engine, "equal", short, priority=1)
    for i in range(30):
        add(engine, str(i), short, priority=1)
        engine.step()
    assert equal.finish is Finish.LENGTH
    assert low.output_ids == []
    run_all(engine)
    assert low.finish is Finish.LENGTH


# Deadlines


def test_a_request_ends_at_its_deadline_and_keeps_its_tokens() -> None:
    clock = Clock()
    engine = make_engine(clock=clock, max_num_seqs=2)
    timed, other, waiting = add(engine, "t", deadline_s=2.0), add(engine, "o"), add(engine, "w", deadline_s=2.0)
    for _ in range(4):
        engine.step()
    clock.now_s += 1.999
    engine.step()
    assert not timed.finish
    held = sum(pool.held for pool in engine.cache.pools)
    clock.now_s += 0.001
    changed = engine.step()
    assert timed in changed
    assert waiting in changed
    assert timed.finish.reason == waiting.finish.reason == "timeout"
    assert len(timed.output_ids) == 5
    assert waiting.output_ids == []
    assert sum(pool.held for pool in engine.cache.pools) < held
    assert engine.stats.timeouts == 2
    run_all(engine)
    assert other.output_ids[:5] == timed.output_ids
    assert other.finish is Finish.LENGTH
    engine.check_idle()


def test_a_request_without_neighbours_times_out() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    request = add(engine, "t", deadline_s=0.25)
    clock.now_s += 1.0
    assert engine.step() == [request]
    assert not engine.has_work
    engine.check_idle()


def test_all_samples_share_the_deadline_and_the_arrival_may_lie_back() -> None:
    clock = Clock()
    engine = make_engine(clock=clock)
    params = SamplingParams(n=3, temperature=1.0, max_tokens=10, seed=0)
    samples = engine.add(PROMPT, params, request_id="s", deadline_s=5.0, arrival_s=clock.now_s - 4.0)
    engine.step()
    clock.now_s += 1.0
    engine.step()
    assert {s.finish for s in samples} == {Finish.TIMEOUT}
    # The others share the cache that the first one made, so they begin a step later.
    assert [len(s.output_ids) for s in samples] == [1, 0, 0]
    engine.check_idle()


@pytest.mark.parametrize(
    ("urgency", "message"),
    [
        ({"deadline_s": 0.0}, "deadline_s is 0.0; it must be a positive number of seconds"),
        ({"deadline_s": -1}, "deadline_s is -1;"),
        ({"deadline_s": math.inf}, "deadline_s is inf;"),
        ({"deadline_s": math.nan}, "deadline_s is nan;"),
        ({"deadline_s": "1"}, "deadline_s is '1';"),
        ({"deadline_s": True}, "deadline_s is True;"),
        ({"priority": 0.5}, "priority is 0.5; it must be a whole number"),
        ({"priority": None}, "priority is None;"),
    ],
)
def test_bad_urgency_is_refused(urgency: dict[str, Any], message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        add(engine, "r", **urgency)
    engine.check_idle()


def test_a_record_carries_priority_and_the_seconds_left() -> None:
    clock = Clock()
    first = make_engine(clock=clock)
    request = add(first, "r", priority=-2, deadline_s=5.0)
    for _ in range(3):
        first.step()
    clock.now_s += 3.0
    with pytest.raises(InvariantError, match=r"pass now_s, or call Engine\.export"):
        request.to_record()
    record = json.loads(json.dumps(first.export(request)))
    assert record["deadline_left_s"] == 2.0
    later = Clock()
    later.now_s = 7.0  # another machine's clock
    second = make_engine(clock=later)
    resumed = second.resume(record)
    assert (resumed.priority, resumed.deadline_at_s, resumed.arrival_s) == (-2, 9.0, 7.0)
    second.step()
    assert resumed.output_ids[:3] == request.output_ids
    later.now_s = 9.0
    second.step()
    assert resumed.finish is Finish.TIMEOUT
    assert len(resumed.output_ids) == 4
    second.check_idle()
    now_s, clock.now_s = clock.now_s, 200.0
    overdue_record = first.export(request)
    clock.now_s = now_s
    run_all(first)
    assert request.output_ids[:4] == resumed.output_ids
    late = make_engine(clock=clock)
    overdue = late.resume(overdue_record)
    late.step()
    assert overdue.finish is Finish.TIMEOUT
    late.check_idle()
