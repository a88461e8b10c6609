"""Law 1 under eviction: tokens are those of the request alone, whatever runs beside it and however it is cut.

Requests with different evictors and budgets and requests that keep everything share batches, prefixes and pages.
Also: a decoder that drafts across triggers emits what plain decoding emits, and keeps the same slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import keepers
import pytest
import tenants
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keepers import alone_of
from masked import random_model
from tiny import VOCAB, examples, make_engine
from torch import Tensor

from headrace.engine.engine import Engine
from headrace.params import SamplingParams
from headrace.parts import EVICTORS, SCHEDULERS
from headrace.request import Finish, Request

LONGEST = 80
SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(40)) for j in range(2)]
BOUNDED = [name for name in EVICTORS.names() if name != "full"]
DRAFTERS = {"test_tree": tenants.Tree, "test_sometimes_right": tenants.SometimesRight, "test_jacobi": tenants.Jacobi}


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    with keepers.registered(keepers.KEEPERS), tenants.registered(*DRAFTERS.items()):
        yield


@st.composite
def arrival(draw: st.DrawFn, kinds: list[str]) -> tuple[int, tuple[int, ...], SamplingParams, int | None]:
    head = draw(st.sampled_from(SHARED))[: draw(st.sampled_from([0, 2, 17, 24, 40]))]
    prompt = (*head, *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)))
    kind = draw(st.sampled_from(["full", *kinds, *kinds]))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8])),
        seed=draw(st.integers(0, 2)),
        max_tokens=draw(st.sampled_from([1, 8, 30])),
        ignore_eos=draw(st.booleans()),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        evictor=kind,
        cache_budget=None if kind == "full" else draw(st.sampled_from([8, 9, 16, 21])),
        decoder=draw(st.sampled_from([None, None, "ngram", *DRAFTERS])),
    )
    abort = draw(st.sampled_from([None, None, None, 0, 3, 11]))
    return draw(st.sampled_from([0, 0, 0, 1, 3, 9, 25])), prompt, params, abort


def serve(engine: Engine, arrivals: list[tuple[int, tuple[int, ...], SamplingParams, int | None]]) -> list[Request]:
    """Play the arrivals: (step, prompt, parameters, steps until an abort)."""
    queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    requests: dict[int, Request] = {}
    aborts: dict[int, list[str]] = {}
    for step in range(20_000):
        while queue and queue[0][1][0] <= step:
            number, (_, prompt, params, abort_after) = queue.pop(0)
            (requests[number],) = engine.add(prompt, params, request_id=str(number), priority=number % 2)
            if abort_after is not None:
                aborts.setdefault(step + abort_after, []).append(str(number))
        for request_id in aborts.pop(step, ()):
            engine.abort(request_id)
        before = {number: r.preemptions for number, r in requests.items()}
        engine.step()
        for number, times in before.items():
            # Otherwise it and the one that it gave way to could change places for ever.
            assert requests[number].preemptions == times or requests[number].index < 0, "a victim started again at once"
        if not queue and not engine.has_work:
            return [requests[i] for i in range(len(arrivals))]
    raise AssertionError("no progress")


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
@pytest.mark.parametrize("unit", ["request", "layer"])
def test_tokens_are_those_of_the_request_alone(scheduler: str, unit: str, events: Counter[str]) -> None:
    kinds = [*BOUNDED, "test_scattered", *(["test_per_layer"] if unit == "layer" else [])]
    counted = ["compaction", "copy", "cut at a trigger", "chunk", "famine", "abort", "hit", "reclaimed"]
    events.update(dict.fromkeys([*counted, "mixed batch", "drafts", "whole"], 0))
    loaded = ",".join(["full", *kinds])

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival(kinds), min_size=3, max_size=9),
        interval=st.sampled_from([1, 3, 5, 16]),
        budget=st.sampled_from([1, 7, 64, 10**6]),
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 2, 1000]),
        seats=st.sampled_from([1, 3, 8, 8]),
        caching=st.booleans() | st.just(True),
        tight=st.sampled_from([True, True, False]),
    )
    def run(
        arrivals: Any,
        interval: int,
        budget: int,
        page_size: int,
        spare_pages: int,
        seats: int,
        caching: bool,
        tight: bool,
    ) -> None:
        if tight:  # all at once, to the end, with room for one: pages run out
            arrivals = [(0, prompt, replace(p, max_tokens=30, ignore_eos=True), a) for _, prompt, p, a in arrivals]
            spare_pages, seats = 0, 8
        for _, prompt, params, _ in arrivals:
            plain = make_engine(model=random_model(), evictor=loaded, cache_interval=interval)
            (first,) = plain.add(prompt, replace(params, decoder=None), request_id="plain")
            tenants.teach(prompt, alone_of(first, evictors=loaded, interval=interval)[0])
        engine = make_engine(
            model=random_model(),
            scheduler=scheduler,
            decoder=",".join(["autoregressive", "ngram", *DRAFTERS]),
            evictor=loaded,
            cache_interval=interval,
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-LONGEST // page_size) + spare_pages,
            max_model_len=LONGEST,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
        )
        requests = serve(engine, arrivals)
        for request in requests:
            tokens, reason = alone_of(request, evictors=loaded, interval=interval)
            if request.finish is Finish.ABORT:
                events["abort"] += 1
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["drafts"] += request.decoder != "autoregressive" and request.evictor != "full"
            events["whole"] += request.evictor == "full"
        engine.check_idle()
        events["examples"] += 1
        events["mixed batch"] += len({request.evictor for request in requests}) > 2
        events["compaction"] += engine.upkeep.stats.compactions
        events["copy"] += engine.upkeep.stats.copies
        events["cut at a trigger"] += engine.stats.trigger_cuts
        events["chunk"] += engine.stats.chunks
        events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens > 0
        events["reclaimed"] += sum(pool.reclaimed for pool in engine.cache.pools)

    run()


def contents_after_triggers(engine: Engine, prompt: tuple[int, ...]) -> tuple[Request, dict[int, list[Tensor]]]:
    """Run a request; its keys after each compaction that a step ends with, by token index."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (request,) = engine.add(prompt, params, request_id="r")
    seen: dict[int, list[Tensor]] = {}
    while engine.has_work:
        engine.step()
        if (
            not request.finish
            and any(request.dropped)
            and request.trigger - request.n_done == engine.config.cache_interval
        ):
            seen[request.n_done] = [engine.cache.keys(request, g) for g in range(len(engine.cache.groups))]
    engine.check_idle()
    return request, seen


@pytest.mark.parametrize("name", [*BOUNDED, *keepers.KEEPERS])
@pytest.mark.parametrize("decoder", ["ngram", *DRAFTERS])
def test_drafts_across_a_trigger_keep_the_same_slots(name: str, decoder: str) -> None:
    """Triggers at every offset within a draft: after each the cache holds what it holds in plain decoding."""
    prompt = (*SHARED[0][:5], *SHARED[0][:5])
    for interval in (1, 2, 3, 7):
        runs = []
        for kind in ("autoregressive", decoder):
            engine = make_engine(
                model=random_model(), decoder=kind, evictor=name, cache_budget=11, cache_interval=interval
            )
            runs.append(contents_after_triggers(engine, prompt))
            tenants.teach(prompt, tuple(runs[0][0].output_ids))
        (plain, expected), (drafted, found) = runs
        assert drafted.tokens == plain.tokens
        assert found.keys() == expected.keys()
        assert len(found) == len(range(11 + interval, len(plain.tokens) - 1, interval))
        for n_done, keys in found.items():
            for a, b in zip(keys, expected[n_done], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
