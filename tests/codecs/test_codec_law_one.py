"""Law 1 under codecs: tokens are those of the request alone, whatever runs beside it and however it is cut.

Codecs by slot and with sealed pages, under famine, hits, aborts, samples that fork, and decoders that draft across
seals; beside evictors where the codec allows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import coders
import keepers
import pytest
import tenants
from coders import alone_of, coded_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, cut
from tiny import most_examples as examples

from headrace.engine.engine import Engine
from headrace.params import SamplingParams
from headrace.request import Finish, Request

LONGEST = 80
SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(40)) for j in range(2)]
DRAFTERS = {"test_tree": tenants.Tree, "test_sometimes_right": tenants.SometimesRight, "test_jacobi": tenants.Jacobi}
EVICTORS = {"fp8": "full,key_norm,test_scattered", "test_uneven": "full,test_scattered"}


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    with coders.registered(), keepers.registered(keepers.KEEPERS), tenants.registered(*DRAFTERS.items()):
        yield


@st.composite
def arrival(draw: st.DrawFn, evictors: list[str]) -> tuple[int, tuple[int, ...], SamplingParams, int | None]:
    head = draw(st.sampled_from(SHARED))[: draw(st.sampled_from([0, 2, 17, 24, 40]))]
    prompt = (*head, *draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)))
    kind = draw(st.sampled_from(evictors))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.8])),
        seed=draw(st.integers(0, 2)),
        n=draw(st.sampled_from([1, 1, 1, 3])),
        max_tokens=draw(st.sampled_from([1, 8, 30])),
        ignore_eos=draw(st.booleans()),
        presence_penalty=draw(st.sampled_from([0.0, 0.7])),
        evictor=kind,
        cache_budget=None if kind == "full" else draw(st.sampled_from([8, 9, 16])),
        decoder=draw(st.sampled_from([None, None, "ngram", *DRAFTERS])),
    )
    if params.greedy:
        params = replace(params, n=1)
    abort = draw(st.sampled_from([None, None, None, 0, 3, 11]))
    return draw(st.sampled_from([0, 0, 0, 1, 3, 9, 25])), prompt, params, abort


def serve(engine: Engine, arrivals: list[tuple[int, tuple[int, ...], SamplingParams, int | None]]) -> list[Request]:
    """Play the arrivals: (step, prompt, parameters, steps until an abort)."""
    queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    requests: list[Request] = []
    aborts: dict[int, list[str]] = {}
    for step in range(20_000):
        while queue and queue[0][1][0] <= step:
            number, (_, prompt, params, abort_after) = queue.pop(0)
            requests += engine.add(prompt, params, request_id=str(number), priority=number % 2)
            if abort_after is not None:
                aborts.setdefault(step + abort_after, []).append(str(number))
        for request_id in aborts.pop(step, ()):
            engine.abort(request_id)
        engine.step()
        if not queue and not engine.has_work:
            return requests
    raise AssertionError("no progress")


@pytest.mark.parametrize("codec", ["fp8", *coders.CODERS])
def test_tokens_are_those_of_the_request_alone(codec: str, events: Counter[str]) -> None:
    seals = codec.startswith("test_sealed")
    counted = ["chunk", "famine", "abort", "hit", "reclaimed", "fork", "drafts", "in pieces"]
    events.update(dict.fromkeys([*counted, *(["seal", "cut at a trigger"] if seals else [])], 0))
    evictors = EVICTORS.get(codec, "full")
    if evictors != "full":
        events["compaction"] = 0

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival(evictors.split(",")), min_size=3, max_size=7),
        budget=st.sampled_from([1, 7, 64, 10**6]),
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 2, 1000]),
        seats=st.sampled_from([1, 1, 3, 8]),
        caching=st.booleans() | st.just(True),
        tight=st.sampled_from([True, False, False]),
    )
    def run(
        arrivals: Any, budget: int, page_size: int, spare_pages: int, seats: int, caching: bool, tight: bool
    ) -> None:
        if tight:  # all at once, to the end, with room for one: pages run out
            arrivals = [(0, prompt, replace(p, max_tokens=30, ignore_eos=True), a) for _, prompt, p, a in arrivals]
            spare_pages, seats = 0, 8
        alone = {"codec": codec, "page_size": page_size, "evictors": evictors, "interval": 5}
        for _, prompt, params, _ in arrivals:
            plain = coded_engine(codec, page_size=page_size, evictor=evictors, cache_interval=5)
            first = plain.add(prompt, replace(params, decoder=None, n=1), request_id="plain")[0]
            tenants.teach(prompt, alone_of(first, **alone)[0])
        engine = coded_engine(
            codec,
            decoder=",".join(["autoregressive", "ngram", *DRAFTERS]),
            evictor=evictors,
            cache_interval=5,
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-LONGEST // page_size) + spare_pages,
            max_model_len=LONGEST,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
        )
        if len(arrivals) % 2:
            cut(engine)
        for request in serve(engine, arrivals):
            tokens, reason = alone_of(request, **alone)
            if request.finish is Finish.ABORT:
                events["abort"] += 1
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["drafts"] += request.decoder != "autoregressive"
        events["in pieces"] += engine.runner.pieces.replays if engine.runner.pieces else 0
        engine.check_idle()
        events["examples"] += 1
        events["chunk"] += engine.stats.chunks
        events["famine"] += engine.stats.preemptions
        events["fork"] += engine.stats.forks
        events["hit"] += engine.cache.hit_tokens > 0
        events["reclaimed"] += sum(pool.reclaimed for pool in engine.cache.pools)
        if seals:
            events["seal"] += engine.upkeep.stats.seals
            events["cut at a trigger"] += engine.stats.trigger_cuts
        if evictors != "full":
            events["compaction"] += engine.upkeep.stats.compactions

    run()
