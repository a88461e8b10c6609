"""Every registered scheduler, run against a simulated cache: no tensor, no model, the same composer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.parts import SCHEDULERS
from headrace.scheduling.base import RequestView, Schedule, Snapshot, compose, pages_needed


@dataclass
class SimulatedRequest:
    arrival: int
    prompt: int
    outputs: int
    priority: int = 0
    comes: int = 0
    n_tok: int = 0
    n_done: int = 0
    pages: int = 0
    running: bool = False
    rows: list[int] = field(default_factory=list)

    @property
    def limit(self) -> int:
        return self.prompt + self.outputs

    @property
    def rank(self) -> tuple[int, int]:
        return self.priority, self.arrival

    def view(self) -> RequestView:
        pending = self.n_tok - self.n_done
        return RequestView(
            key=self.arrival,
            arrival=self.arrival,
            running=self.running,
            least=1,
            most=pending,
            decoding=self.running and pending == 1,
            kv_len=(self.n_done,),
            pages=(self.pages,),
            priority=self.priority,
        )


@dataclass
class Simulation:
    """The engine's part of the bargain, without an engine."""

    name: str
    budget: int
    page_size: int
    n_pages: int
    max_running: int
    requests: list[SimulatedRequest]
    events: Counter[str]
    steps: int = 0
    preemptions: int = 0
    first: SimulatedRequest | None = None
    idle_steps: int = 0

    def run(self) -> None:
        policy = SCHEDULERS[self.name].make()
        for request in self.requests:
            request.n_tok = request.prompt
        free = self.n_pages
        unfinished = list(self.requests)
        while unfinished:
            live = [r for r in unfinished if r.comes <= self.steps]
            if not live:
                self.steps += 1
                continue
            snapshot = Snapshot(
                running=[r.view() for r in live if r.running],
                waiting=[r.view() for r in live if not r.running],
                free_pages=(free,),
                page_size=self.page_size,
                budget=self.budget,
                max_running=self.max_running,
            )
            schedule = compose(policy, snapshot)
            free += self.apply(schedule, live)
            assert 0 <= free <= self.n_pages
            self.note_progress(schedule, live)
            unfinished = [r for r in unfinished if r.n_tok < r.limit]
            self.steps += 1
            bound = 20 + 4 * sum(r.limit for r in self.requests) * (2 + self.preemptions)
            assert self.steps < bound + max(r.comes for r in self.requests), "no progress"

    def note_progress(self, schedule: Schedule, live: list[SimulatedRequest]) -> None:
        """The first in rank moves; nobody is admitted before a request that stands before it."""
        first = min(live, key=lambda r: r.rank)
        if first is not self.first:
            self.first, self.idle_steps = first, 0
        elif schedule.victim is None and first.arrival not in schedule.grants:
            self.idle_steps += 1
        # A policy with phases may serve all prompts before the first one's decode row; splitfuse has one phase.
        most = 0 if self.name == "splitfuse" else sum(2 * r.limit for r in self.requests)
        assert self.idle_steps <= most, "the first in rank does not move"
        ranks = {r.arrival: r.rank for r in live}
        waiting = [r for r in live if not r.running]
        for key in schedule.admitted:
            assert all(ranks[key] < r.rank for r in waiting), "a request was overtaken by one behind it"
            self.events["overtake"] += any(r.arrival < key for r in waiting)

    def apply(self, schedule: Schedule, live: list[SimulatedRequest]) -> int:
        """Pages that became free."""
        by_key = {r.arrival: r for r in live}
        if schedule.victim is not None:
            victim = by_key[schedule.victim]
            assert victim.running
            assert victim.rank != min(r.rank for r in live), "the first in rank is never a victim"
            assert victim.rank == max(r.rank for r in live if r.running), "the last in rank gives way"
            assert not schedule.grants
            self.events["famine"] += 1
            ahead = [r for r in live if r.priority < victim.priority and not r.running]
            self.events["preemption by priority"] += bool(ahead)
            self.preemptions += 1
            back, victim.pages, victim.n_done, victim.running = victim.pages, 0, 0, False
            return back
        assert schedule.grants, "a step with work to do has rows"
        assert sum(schedule.grants.values()) <= self.budget
        back = 0
        for key, rows in schedule.grants.items():
            request = by_key[key]
            assert 1 <= rows <= request.n_tok - request.n_done
            if not request.running:
                assert key in schedule.admitted
                request.running = True
            (need,) = pages_needed(request.view(), rows, self.page_size)
            request.pages += need
            back -= need
            if rows < request.n_tok - request.n_done:
                self.events["chunk"] += 1
            elif request.n_tok > request.prompt:
                self.events["decode"] += 1
            request.n_done += rows
            request.rows.append(rows)
            if request.n_done == request.n_tok:
                request.n_tok += 1
            if request.n_tok >= request.limit:
                back += request.pages
                request.pages = 0
        assert sum(r.running for r in live) <= self.max_running
        return back


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_every_request_finishes(name: str, events: Counter[str]) -> None:
    """Any budget, any page size, famine: all requests end, no step is empty, the budget holds."""
    counted = ["chunk", "famine", "decode", "seats short", "overtake", "preemption by priority"]
    events.update(dict.fromkeys(counted, 0))

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        sizes=st.lists(
            st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from([0, 0, 0, -1, 5]), st.integers(0, 30)),
            min_size=1,
            max_size=12,
        ),
        budget=st.sampled_from([1, 7, 64, 768, 10**6]),
        page_size=st.sampled_from([1, 4, 16]),
        spare=st.integers(0, 20),
        seats=st.sampled_from([1, 3, 100]),
    )
    def run(sizes: list[tuple[int, int, int, int]], budget: int, page_size: int, spare: int, seats: int) -> None:
        longest = max(-(-(p + o) // page_size) for p, o, _, _ in sizes)
        sizes.sort(key=lambda size: size[3])
        requests = [SimulatedRequest(i, p, o, rank, comes) for i, (p, o, rank, comes) in enumerate(sizes)]
        Simulation(name, budget, page_size, longest + spare, seats, requests, events).run()
        events["examples"] += 1
        if seats < len(sizes):
            events["seats short"] += 1

    run()


def view(
    arrival: int, *, running: bool = True, most: int = 1, done: int = 0, pages: int = 0, priority: int = 0
) -> RequestView:
    decoding = running and most == 1
    return RequestView(arrival, arrival, running, 1, most, decoding, (done,), (pages,), priority=priority)


def snapshot(running: list[RequestView], waiting: list[RequestView], *, free: int = 100, budget: int = 64) -> Snapshot:
    return Snapshot(running, waiting, (free,), 16, budget, 100)


def test_splitfuse_serves_decoding_first_and_fills_up() -> None:
    running = [view(0, most=500, done=16, pages=1), *(view(i, done=20, pages=2) for i in range(1, 11))]
    schedule = compose(SCHEDULERS["splitfuse"].make(), snapshot(running, [view(11, running=False, most=30)]))
    assert schedule.grants == {0: 54, **dict.fromkeys(range(1, 11), 1)}


def test_splitfuse_gives_the_oldest_a_row_even_if_decoding_fills_the_budget() -> None:
    running = [view(0, most=500), *(view(i, done=20, pages=2) for i in range(1, 11))]
    schedule = compose(SCHEDULERS["splitfuse"].make(), snapshot(running, [], budget=4))
    assert schedule.grants == {0: 1, 1: 1, 2: 1, 3: 1}


def test_prefill_first_never_mixes() -> None:
    running = [view(0, done=20, pages=2), view(1, most=10, done=16, pages=2)]
    policy = SCHEDULERS["prefill_first"].make()
    assert compose(policy, snapshot(running, [view(2, running=False, most=5)])).grants == {1: 10, 2: 5}
    assert compose(policy, snapshot(running[:1], [])).grants == {0: 1}


def test_a_newcomer_waits_until_its_whole_prompt_fits() -> None:
    policy = SCHEDULERS["splitfuse"].make()
    running = [view(0, done=20, pages=2)]
    newcomers = [view(1, running=False, most=40), view(2, running=False, most=1)]
    # 40 rows need 3 pages, and the running request may need one more: nobody overtakes.
    assert compose(policy, snapshot(running, newcomers, free=3)).grants == {0: 1}
    assert set(compose(policy, snapshot(running, newcomers, free=5)).grants) == {0, 1}


def test_the_youngest_gives_its_pages() -> None:
    running = [view(i, done=16, pages=1) for i in range(4)]
    assert compose(SCHEDULERS["splitfuse"].make(), snapshot(running, [], free=0)).victim == 3


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_a_waiting_request_takes_pages_and_seats_from_a_lower_priority_only(name: str) -> None:
    policy = SCHEDULERS[name].make()
    running = [view(i, done=16, pages=1, priority=i % 2) for i in range(4)]
    urgent = view(4, running=False, most=30, priority=-1)
    equal = view(4, running=False, most=10, priority=1)
    assert compose(policy, snapshot(running, [urgent], free=3)).victim == 3
    full = Snapshot(running, [urgent], (100,), 16, 64, 4)
    assert compose(policy, full).victim == 3
    assert compose(policy, snapshot(running, [equal], free=4)).victim is None
    assert compose(policy, snapshot(running, [equal], free=4)).admitted == []


def test_nobody_gives_way_where_it_would_not_help() -> None:
    """All that the lower ones hold is not enough: they go on."""
    running = [view(0, done=160, pages=11), view(1, done=16, pages=2, priority=1)]
    urgent = view(2, running=False, most=200)
    schedule = compose(SCHEDULERS["splitfuse"].make(), snapshot(running, [urgent], free=3))
    assert schedule.victim is None
    assert schedule.grants == {0: 1, 1: 1}


def test_splitfuse_serves_a_class_before_the_next() -> None:
    policy = SCHEDULERS["splitfuse"].make()
    batch = [view(i, done=20, pages=2, priority=1) for i in range(10)]
    prompt = view(10, running=False, most=40)
    assert compose(policy, snapshot(batch, [prompt], budget=30)).grants == {10: 30}
    assert compose(policy, snapshot(batch, [prompt], budget=45)).grants == {10: 40, **dict.fromkeys(range(5), 1)}


def test_a_waiting_request_holds_up_no_running_one() -> None:
    """It stands before them, gets no pages, and nobody of lower priority holds any."""
    running = [view(1, done=20, pages=2), view(2, done=20, pages=2)]
    schedule = compose(SCHEDULERS["prefill_first"].make(), snapshot(running, [view(0, running=False, most=90)], free=3))
    assert schedule.grants == {1: 1, 2: 1}
