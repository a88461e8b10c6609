"""Long runs: thousands of requests with aborts and famine, and every pair of settings against the request alone."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from tiny import VOCAB, alone_of, make_engine

from headrace.params import SamplingParams
from headrace.parts import SCHEDULERS
from headrace.request import Finish, Request

pytestmark = pytest.mark.slow


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 8]),
        top_p=rng.choice([1.0, 0.9]),
        seed=rng.randrange(4),
        max_tokens=rng.randint(1, 30),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([None, 2]),
        presence_penalty=rng.choice([0.0, 0.5]),
    )


def random_prompt(rng: random.Random) -> list[int]:
    shared = [(5 * i + 1) % VOCAB for i in range(40)]
    return shared[: rng.choice([0, 3, 16, 40])] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_three_thousand_requests_leak_nothing(scheduler: str, events: Counter[str]) -> None:
    """Bursts, aborts at any moment and famine; the books balance each time the engine is idle."""
    events.update(dict.fromkeys(["abort", "famine", "hit", "chunk", "idle", "checked alone"], 0))
    rng = random.Random(7)
    engine = make_engine(
        scheduler=scheduler, num_pages=60, page_size=2, max_num_batched_tokens=24, max_model_len=80, max_num_seqs=8
    )
    live: list[Request] = []
    added = 0
    while added < 3000 or engine.has_work:
        if added < 3000 and rng.random() < 0.3:
            for _ in range(rng.randint(1, 6)):
                live += engine.add(random_prompt(rng), random_params(rng), request_id=str(added))
                added += 1
        if live and rng.random() < 0.05:
            engine.abort(rng.choice(live).request_id)
            events["abort"] += 1
        engine.step()
        for request in [r for r in live if r.finish]:
            live.remove(request)
            if request.finish is not Finish.ABORT and rng.random() < 0.1:
                assert (tuple(request.output_ids), request.finish.reason) == alone_of(request)
                events["checked alone"] += 1
        if not engine.has_work:
            engine.check_idle()
            events["idle"] += 1
    engine.check_idle()
    events["famine"] += engine.stats.preemptions
    events["chunk"] += engine.stats.chunks
    events["hit"] += engine.cache.hit_tokens
    events["examples"] += added


def test_every_combination_of_settings_gives_the_same_tokens(events: Counter[str]) -> None:
    """Scheduler x budget x page size x seats x prefix cache x room, each with the same twelve requests."""
    rng = random.Random(1)
    requests = [(random_prompt(rng), random_params(rng)) for _ in range(12)]
    for scheduler, budget, page_size, seats, caching, spare in itertools.product(
        SCHEDULERS.names(), (1, 7, 64, 768), (1, 4, 16), (1, 3, 8), (False, True), (0, 300)
    ):
        engine = make_engine(
            scheduler=scheduler,
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-80 // page_size) + spare,
            max_model_len=80,
            max_num_seqs=seats,
            enable_prefix_caching=caching,
        )
        samples = [engine.add(p, params, request_id=str(i))[0] for i, (p, params) in enumerate(requests)]
        while engine.has_work:
            engine.step()
        engine.check_idle()
        for sample in samples:
            assert (tuple(sample.output_ids), sample.finish.reason) == alone_of(sample)
        events["examples"] += 1
        events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens > 0
