"""Law 1 with everything on at once: decoders, evictors, samples, priorities, famine, moves between engines, lag."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import keepers
import pytest
import tenants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, examples, make_engine, pad, run_all

from headrace.engine.engine import Engine
from headrace.params import SamplingParams
from headrace.parts import DECODERS, EVICTORS, SCHEDULERS
from headrace.request import Finish, Request, State

LONGEST = 80
INTERVAL = 5
SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(30)) for j in range(2)]
EVICTED = [part.name for part in EVICTORS if part.label != "exact"]
CONSTRAINTS: list[dict[str, Any]] = [
    {"regex": "[a-m]{2,9}(:[0-9]{1,3}){0,3}"},
    {"grammar": 'root ::= "[" item ("," item)* "]"\nitem ::= root | [a-f] | "null"'},
    {"json_schema": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}}},
    {"choice": ["abcabc", "abab", "cd12", "null"]},
]


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    with keepers.registered({"test_scattered": keepers.Scattered}), tenants.registered(*tenants.TENANTS.items()):
        yield


@functools.cache
def alone(prompt: tuple[int, ...], params_key: str, evictors: str) -> tuple[tuple[tuple[int, ...], str | None], ...]:
    """Tokens and end of each sample in an engine for itself: plain, no cache of prefixes, no sharing of samples."""
    params = SamplingParams.from_dict(json.loads(params_key))
    engine = make_engine(
        evictor=evictors, cache_interval=INTERVAL, enable_prefix_caching=False, max_num_seqs=1, async_scheduling=False
    )
    samples = engine.add(prompt, params, request_id="alone")
    for sample in samples:
        sample.parent = None
    run_all(engine)
    return tuple((tuple(s.output_ids), s.finish.reason) for s in samples)


@dataclass
class Arrival:
    """A request, and what happens to it after so many steps."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    fate: str
    after: int
    samples: list[Request] = field(default_factory=list)


def arrival(rng: random.Random, decoders: list[str]) -> Arrival:
    head = rng.choice(SHARED)[: rng.choice([0, 3, 17, 30])]
    prompt = (*head, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))))
    evictor = rng.choice(["full", "full", *EVICTED, "test_scattered"])
    params = SamplingParams(
        n=rng.choice([1, 1, 2, 4]),
        temperature=rng.choice([0.0, 0.8]),
        seed=rng.randrange(3),
        max_tokens=rng.choice([1, 9, 30]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        ignore_eos=rng.random() < 0.5,
        decoder=rng.choice([None, None, *decoders]),
        evictor=evictor,
        cache_budget=None if evictor == "full" else rng.choice([8, 13]),
    )
    if rng.random() < 0.3:
        constraint = rng.choice(CONSTRAINTS)
        params = replace(params, ignore_eos=False, **constraint)
    fate = rng.choice(["", "", "", "abort", "move", "move"])
    return Arrival(rng.choice([0, 0, 1, 4, 12]), prompt, params, fate, rng.randint(1, 14))


def move(engine: Engine, request_id: str, samples: list[Request]) -> list[Request]:
    """Take the portable records of samples that run or wait, end them, and go on from the records."""
    open_ = [s for s in samples if s.state is not State.FINISHED]
    records = [json.loads(json.dumps(engine.export(s))) for s in open_]
    engine.abort(request_id)
    resumed = {record["sample"]: engine.resume(record) for record in records}
    return [resumed.get(s.sample, s) for s in samples]


@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_tokens_are_those_of_the_request_alone(scheduler: str, drafter: str, events: Counter[str]) -> None:
    kinds = (
        "famine,hit,fork,abort,moved,evicted and moved,compaction,mixed decoders,speculated,constrained,whole,replayed"
    )
    events.update(dict.fromkeys([*kinds.split(","), "chunk", "swap", "planned ahead", "steady"], 0))
    decoders = [name for name in DECODERS.names() if name != "test_soft"]
    loaded = ",".join(["full", *EVICTED, "test_scattered"])

    @settings(max_examples=examples(80), deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        rng = random.Random(seed)
        arrivals = sorted((arrival(rng, decoders) for _ in range(rng.randint(2, 7))), key=lambda a: a.step)
        for one in arrivals:
            plain = alone(one.prompt, key(one.params), loaded)
            tenants.teach(one.prompt, plain[0][0])
        page_size = rng.choice([1, 2, 4, 16])
        options: dict[str, Any] = {
            "decoder": ",".join(["autoregressive", *decoders]),
            "draft_model": drafter,
            "draft_tokens": rng.randint(1, 5),
            "evictor": loaded,
            "cache_interval": INTERVAL,
            "max_num_batched_tokens": rng.choice([3, 20, 4096]),
            "page_size": page_size,
            "num_pages": 1 + -(-LONGEST // page_size) + rng.choice([0, 0, 3, 1000]),
            "max_model_len": LONGEST,
            "max_num_seqs": rng.choice([2, 8]),
            "enable_prefix_caching": rng.random() < 0.8,
            "async_scheduling": rng.random() < 0.7,
            "preemption": rng.choice(["recompute", "swap"]),
        }
        engine = make_engine(scheduler=scheduler, **options)
        if rng.random() < 0.5:
            pad(engine)
        play(engine, arrivals, events)
        engine.check_idle()
        events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens > 0
        events["fork"] += engine.stats.forks
        events["swap"] += engine.stats.swaps
        events["compaction"] += engine.upkeep.stats.compactions
        events["planned ahead"] += engine.stats.ahead
        events["steady"] += engine.stats.steady
        events["replayed"] += engine.runner.graphs.replays if engine.runner.graphs else 0
        events["chunk"] += engine.stats.chunks
        for one in arrivals:
            expected = alone(one.prompt, key(one.params), loaded)
            for sample, (tokens, reason) in zip(one.samples, expected, strict=True):
                if sample.finish is Finish.ABORT:
                    assert tuple(sample.output_ids) == tokens[: len(sample.output_ids)]
                    continue
                assert (tuple(sample.output_ids), sample.finish.reason) == (tokens, reason)
                events["constrained"] += one.params.constraint is not None
                events["whole"] += one.params.constraint is not None and sample.finish is Finish.STOP
                events["speculated"] += sample.decoder != "autoregressive"

    run()


def key(params: SamplingParams) -> str:
    return json.dumps(replace(params, decoder=None).to_dict())


def play(engine: Engine, arrivals: list[Arrival], events: Counter[str]) -> None:
    waiting = list(enumerate(arrivals))
    for step in range(20_000):
        while waiting and waiting[0][1].step <= step:
            number, one = waiting.pop(0)
            one.samples = engine.add(one.prompt, one.params, request_id=str(number), priority=number % 2)
        for number, one in enumerate(arrivals):
            if step != one.step + one.after or not one.samples:
                continue
            if one.fate == "abort":
                events["abort"] += len(engine.abort(str(number)))
            if one.fate == "move":
                before = one.samples
                evicted = sum(any(s.dropped) for s in before if s.index >= 0)
                one.samples = move(engine, str(number), before)
                events["moved"] += sum(a is not b for a, b in zip(before, one.samples, strict=True))
                events["evicted and moved"] += evicted
        engine.step()
        events["mixed decoders"] += len({r.decoder for r in engine.running}) > 1
        if not waiting and not engine.has_work:
            return
    raise AssertionError("no progress")
