"""Steps that are not composed: the engine must do what it would have done had it composed them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_law_one import arrival_strategy, serve
from tiny import examples, make_engine, pad

from headrace.engine.engine import Engine
from headrace.params import SamplingParams

LONGEST = 80


def run_logged(engine: Engine, arrivals: Any) -> list[tuple[list[tuple[int, int, int]], tuple[int, ...]]]:
    """The grants of every step (request, rows, steps ahead), and the pages that were free when it began."""
    log = []
    launch = engine.runner.launch

    def logged(granted: Any, processors: Any = ()) -> Any:
        log.append(([(g.request.arrival, g.rows, g.ahead) for g in granted], engine.cache.available))
        return launch(granted, processors)

    engine.runner.launch = logged  # type: ignore[method-assign]
    serve(engine, arrivals)
    engine.check_idle()
    return log


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_are_those_that_would_have_been_composed(ahead: bool, events: Counter[str]) -> None:
    events.update(dict.fromkeys(["steady", "famine", "compaction", "abort", "pages taken"], 0))

    @settings(max_examples=examples(120), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival_strategy, min_size=1, max_size=6),
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 3, 1000]),
        seats=st.sampled_from([2, 8]),
        evictor=st.sampled_from(["full", "streaming_llm"]),
        scheduler=st.sampled_from(["splitfuse", "prefill_first"]),
        tight=st.booleans(),
    )
    def run(
        arrivals: Any, page_size: int, spare_pages: int, seats: int, evictor: str, scheduler: str, tight: bool
    ) -> None:
        if tight:
            arrivals = [(0, prompt[-4:], replace(p, max_tokens=30), None) for _, prompt, p, _ in arrivals]
            spare_pages = 0
        logs, engines = [], []
        for steady in (True, False):
            engine = make_engine(
                page_size=page_size,
                num_pages=1 + -(-LONGEST // page_size) + spare_pages,
                max_model_len=LONGEST,
                max_num_seqs=seats,
                evictor=evictor,
                cache_budget=9 if evictor != "full" else None,
                cache_interval=4,
                async_scheduling=ahead,
                scheduler=scheduler,
            )
            if ahead:
                pad(engine)
            engine.scheduler.steady = steady
            logs.append(run_logged(engine, arrivals))
            engines.append(engine)
        assert logs[0] == logs[1]
        stats = engines[0].stats
        assert not engines[1].stats.steady
        events["steady"] += stats.steady
        events["famine"] += stats.preemptions
        events["compaction"] += engines[0].upkeep.stats.compactions
        events["abort"] += stats.aborts
        events["pages taken"] += page_size == 1 and stats.steady

    run()


def test_a_long_batch_is_hardly_ever_composed() -> None:
    engine = make_engine(async_scheduling=True, check_invariants=False)
    for i in range(4):
        engine.add([5, 6, 7, i + 1], SamplingParams(max_tokens=60, ignore_eos=True), request_id=str(i))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert engine.stats.steady >= steps - 6


def test_who_comes_is_let_in_at_once() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.add([5, 6, 7], params, request_id="a")
    for _ in range(5):
        engine.step()
    assert engine.stats.steady
    (late,) = engine.add([5, 6], params, request_id="b")
    engine.step()
    assert late.n_tok == 3


def test_an_index_beside_the_batch_is_not_in_it() -> None:
    """Clocks of requests that are not of the batch are their own."""
    engine = make_engine(async_scheduling=True, check_invariants=False)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.add([5, 6, 7], params, request_id="a")
    for _ in range(5):
        engine.step()
    (late,) = engine.add([5, 6, 8], params, request_id="b")
    engine.step()
    assert (late.n_done, late.n_tok) == (0, 3)
    assert len(engine.running) == 2
