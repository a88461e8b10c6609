"""Law 1 with adapters: tokens are those of the merged model alone, whoever runs beside, and whatever happens.

Adapters and none mixed in steps, prompts cut, pages lacking, prefixes found, samples forked, drafts accepted, adapters
loaded and unloaded on the way, names given to others.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from adapted import KINDS, adapted_engine, alone, contents, merged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import CONFIG, VOCAB, examples, make_engine, pad, run_all, tiny_model

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.runner import Granted
from headrace.errors import AdapterError, RequestError
from headrace.params import SamplingParams
from headrace.parts import REGISTRIES
from headrace.registry import Part
from headrace.request import Request

LONGEST = 72
SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(30)) for j in range(2)]
NAMES = ("x", "y", "z")


@pytest.fixture(scope="module")
def drafter() -> Iterator[str]:
    """The tiny model without its adapters: often right."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        tensors = {name: views[0].cpu().contiguous() for name, views in tiny_model().tensors().items()}
        save_file(tensors, str(Path(directory) / "model.safetensors"))
        yield directory


@st.composite
def arrival_strategy(draw: st.DrawFn) -> dict[str, Any]:
    head = draw(st.sampled_from(SHARED))[: draw(st.sampled_from([2, 9, 17, 30]))]
    return {
        "step": draw(st.sampled_from([0, 0, 1, 3, 9, 20])),
        "prompt": (*head, *draw(st.lists(st.integers(0, VOCAB - 1), max_size=4))),
        "name": draw(st.sampled_from([None, *NAMES])),
        "decoder": draw(st.sampled_from(["autoregressive", "ngram", "draft_model"])),
        "params": {
            "temperature": draw(st.sampled_from([0.0, 0.8])),
            "seed": draw(st.integers(0, 2)),
            "max_tokens": draw(st.integers(1, 24)),
            "n": draw(st.sampled_from([1, 1, 2])),
            "prompt_logprobs": draw(st.sampled_from([None, None, None, 0])),
        },
        "abort_after": draw(st.sampled_from([None, None, None, 4])),
    }


class Play:
    """Plays arrivals, counts what happens."""

    def __init__(self, engine: Engine, names: dict[str, str], events: Counter[str]) -> None:
        self.engine, self.names, self.events = engine, dict(names), events
        self.requests: list[tuple[str | None, Request]] = []
        launch = engine.runner.launch

        def watched(granted: list[Granted], processors: Any = ()) -> Any:
            kinds = {g.request.adapter for g in granted}
            events["steps of several adapters"] += len(kinds - {0}) > 1
            events["steps of some with none"] += 0 in kinds and len(kinds) > 1
            events["steps without adapters"] += kinds == {0}
            return launch(granted, processors)

        engine.runner.launch = watched  # type: ignore[method-assign]

    def add(self, number: int, arrival: dict[str, Any]) -> None:
        name = arrival["name"]
        params = SamplingParams(**arrival["params"], decoder=arrival["decoder"], adapter=name)
        try:
            samples = self.engine.add(arrival["prompt"], params, request_id=str(number))
        except RequestError:
            assert name not in self.names
            self.events["unknown adapter"] += 1
            return
        kind = self.names[name] if name else None
        self.requests += [(kind, sample) for sample in samples]
        if self.engine.cache.prefix_caching:
            mine = self.engine.cache.look_up(samples[0]).tokens
            index = self.engine.cache.index
            for other in [b"", *(b"\0" + content.digest.encode() for content in contents().values())]:
                keys: list[bytes] = []
                index.extend_keys(keys, samples[0].tokens, other)
                theirs = len(list(index.match(keys, samples[0].tokens, len(keys))))
                # Entries of the same tokens are there, and another adapter's: they must not be found.
                self.events["prefix of another adapter passed over"] += not mine and theirs > 0

    def change(self, name: str, kind: str) -> None:
        """Give a name to another adapter, if nobody uses it."""
        try:
            if name in self.names:
                self.engine.unload_adapter(name)
                del self.names[name]
            self.engine.load_adapter(name, contents()[kind])
            self.names[name] = kind
            self.events["loaded beside others"] += self.engine.has_work
        except AdapterError:
            assert any(r.params.adapter == name and not r.finish for _, r in self.requests)
            self.events["unload refused"] += 1

    def run(self, arrivals: list[dict[str, Any]], changes: list[tuple[int, str, str]]) -> None:
        step, queue = 0, sorted(enumerate(arrivals), key=lambda item: item[1]["step"])
        aborts: dict[int, str] = {}
        engine = self.engine
        while queue or engine.has_work:
            for when, name, kind in changes:
                if when == step:
                    self.change(name, kind)
            while queue and queue[0][1]["step"] <= step:
                number, arrival = queue.pop(0)
                self.add(number, arrival)
                if arrival["abort_after"]:
                    aborts[step + arrival["abort_after"]] = str(number)
            if step in aborts:
                engine.abort(aborts[step])
            before = {id(r): r.n_tok for _, r in self.requests}
            for request in engine.step():
                self.events["accepted drafts"] += request.n_tok - before.get(id(request), request.n_tok) > 1
            step += 1
            assert step < 20_000, "no progress"


@pytest.mark.parametrize("ahead", [False, True])
def test_tokens_are_those_of_the_merged_model_alone(ahead: bool, drafter: str, events: Counter[str]) -> None:
    counted = [
        "steps of several adapters", "steps of some with none", "steps without adapters", "unknown adapter",
        "prefix of another adapter passed over", "prefix of the same adapter found", "loaded beside others",
        "unload refused", "accepted drafts", "preempted", "swapped", "forked", "cut prompts", "greedy", "sampled",
    ]  # fmt: skip
    events.update(dict.fromkeys([*counted, "planned ahead", "recorded"] if ahead else counted, 0))

    @settings(max_examples=examples(45), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival_strategy(), min_size=2, max_size=8),
        changes=st.lists(
            st.tuples(st.integers(2, 25), st.sampled_from(NAMES), st.sampled_from(list(KINDS))), max_size=3
        ),
        budget=st.sampled_from([5, 64, 4096]),
        spare=st.sampled_from([0, 4, 1000]),
        preemption=st.sampled_from(["recompute", "swap"]),
        seats=st.sampled_from([3, 8]),
        one_decoder=st.booleans(),
        tight=st.booleans(),
    )
    def run(
        arrivals: Any,
        changes: Any,
        budget: int,
        spare: int,
        preemption: str,
        seats: int,
        one_decoder: bool,
        tight: bool,
    ) -> None:
        if tight:  # all at once, to the end, with room for one: pages run out
            arrivals = [{**a, "step": 0, "params": {**a["params"], "max_tokens": 24}} for a in arrivals]
            spare, seats = 0, 8
        if one_decoder:
            arrivals = [{**arrival, "decoder": "autoregressive"} for arrival in arrivals]
        names = {"x": "all", "y": "one"}
        engine = adapted_engine(
            3,
            names,
            decoder="autoregressive,ngram,draft_model",
            draft_model=drafter,
            max_num_batched_tokens=budget,
            num_pages=1 + -(-LONGEST // 4) + spare,
            max_model_len=LONGEST,
            max_num_seqs=seats,
            preemption=preemption,
            async_scheduling=ahead,
        )
        if ahead:
            pad(engine)
        play = Play(engine, names, events)
        play.run(arrivals, changes)
        for kind, request in play.requests:
            expected = alone(kind, request, max_model_len=LONGEST)
            found = tuple(request.output_ids)
            if request.finish.reason == "abort":
                assert found == expected[: len(found)]
                continue
            assert found == expected
            events["greedy" if request.params.greedy else "sampled"] += kind is not None
            events["preempted"] += kind is not None and request.preemptions > 0
            events["prefix of the same adapter found"] += kind is not None and request.hit_tokens > 0
            events["forked"] += kind is not None and request.sample > 0
        engine.check_idle()
        for name in list(play.names):
            engine.unload_adapter(name)
        assert engine.model.adapters is not None
        assert not engine.model.adapters.pattern
        events["cut prompts"] += engine.stats.chunks
        events["swapped"] += engine.stats.swaps
        if ahead:
            assert engine.runner.graphs is not None
            events["planned ahead"] += engine.stats.ahead
            events["recorded"] += engine.runner.graphs.replays

    run()


def test_adapters_and_none_give_different_tokens() -> None:
    """Otherwise the comparison would show nothing."""
    engine = adapted_engine(4, {kind: kind for kind in KINDS})
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    for kind in (None, *KINDS):
        engine.add(SHARED[0], SamplingParams(**params, adapter=kind), request_id=str(kind))
    requests = [request for samples in engine._by_id.values() for request in samples]
    run_all(engine)
    assert len({tuple(request.output_ids) for request in requests}) == 1 + len(KINDS)


ENGINE = {f.name for f in dataclasses.fields(EngineConfig)}
PROMPTS = [SHARED[0][:23], SHARED[0][:24], SHARED[1][:21], SHARED[0][:23]]


@pytest.mark.parametrize("part", [pytest.param(part, id=part.name) for seam in REGISTRIES for part in seam])
def test_every_part_runs_beside_adapters(part: Part[Any], drafter: str) -> None:
    """Mixed in one batch, each request has the tokens that the part gives it alone under the merged weights."""
    asked = {k: drafter if v == "<checkpoint>" else v for k, v in part.example.items()}
    options = {k: v for k, v in asked.items() if k in ENGINE}
    params = {"temperature": 0.8, "max_tokens": 20} | {k: v for k, v in asked.items() if k not in ENGINE}
    engine = adapted_engine(2, {"x": "all", "y": "odd"}, max_num_batched_tokens=13, **options)
    kinds = ["all", None, "odd", "odd"]
    requests = []
    for i, (prompt, name) in enumerate(zip(PROMPTS, ("x", None, "y", "y"), strict=True)):
        requests += engine.add(prompt, SamplingParams(**params, seed=i, adapter=name), request_id=str(i))
        engine.step()
    run_all(engine)
    engine.check_idle()
    for kind, request in zip(kinds, requests, strict=True):
        keeps = {k: v for k, v in options.items() if part.label != "exact"}
        assert tuple(request.output_ids) == alone(kind, request, **keeps)


def test_a_recording_holds_as_long_as_the_same_maps_change() -> None:
    """Loading an adapter that changes other maps brings other recordings; one that changes the same maps does not."""
    engine = adapted_engine(4, {"x": "one"}, num_pages=64)
    pad(engine)
    graphs = engine.runner.graphs
    assert graphs is not None

    def serve(name: str | None) -> int:
        engine.add(SHARED[0][:5], SamplingParams(temperature=0.0, max_tokens=9, adapter=name), request_id="r")
        run_all(engine)
        engine.cache.drop_idle()
        return len(graphs.keys)

    first = serve("x")
    assert serve("x") == first
    without = serve(None)
    assert without > first
    engine.load_adapter("again", contents()["one"])
    assert serve("again") == without
    engine.load_adapter("more", contents()["all"])
    assert serve("x") > without
    assert serve(None) == serve("more") == serve("x")


def test_as_many_scored_prompt_tokens_as_rows() -> None:
    """Wanted rows of the last layer are as many as all rows, but in another order."""
    engine = adapted_engine(1, {"x": "all"})
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=0, adapter="x")
    (request,) = engine.add(SHARED[0][:12], params, request_id="r")
    run_all(engine)
    assert tuple(request.output_ids) == alone("all", request)
    plain = make_engine(model=merged("all"))
    (other,) = plain.add(SHARED[0][:12], dataclasses.replace(params, adapter=None), request_id="r")
    run_all(plain)
    mine = [p and next(iter(p.values())).logprob for p in request.prompt_logprobs]
    theirs = [p and next(iter(p.values())).logprob for p in other.prompt_logprobs]
    assert mine[1:] == pytest.approx(theirs[1:], abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types_lose_no_more_than_without_adapters(dtype: str) -> None:
    """Log-probs of a prompt against those in float64, under an adapter and without one."""
    loss = {}
    for kind in (None, "all"):
        scored = []
        for engine in (adapted_engine(1, {"x": "all"}, dtype), make_engine(model=merged(kind))):
            name = "x" if kind and engine.adapters.loaded else None
            params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0, adapter=name)
            (request,) = engine.add(SHARED[0], params, request_id="r")
            run_all(engine)
            scored.append([p[t].logprob for p, t in zip(request.prompt_logprobs[1:], SHARED[0][1:], strict=True) if p])
        loss[kind] = sum(abs(a - b) for a, b in zip(*scored, strict=True)) / len(scored[0])
    assert 0.0 < loss["all"] < 4.0 * loss[None] < {"float32": 1e-4, "bfloat16": 1.0}[dtype]
