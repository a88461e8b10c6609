"""Every registered selector, and two of the tests: what rows read, and law 1."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coders
import keepers
import pickers
import pytest
import tenants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked import random_model, window_model
from pickers import alone_of, picking_engine, run_selected
from test_codec_law_one import DRAFTERS, LONGEST, arrival
from test_codec_law_one import serve as play
from tiny import VOCAB, cut, examples, make_engine, run_all

from headrace.engine.engine import Engine
from headrace.errors import ConfigError, RequestError
from headrace.params import SamplingParams
from headrace.parts import SELECTORS as LOADED
from headrace.request import Finish, Request
from headrace.selection.base import SELECTORS

PROMPTS = [tuple((5 * i * (j + 1) + j) % VOCAB for i in range(3 + 14 * j)) for j in range(4)]
ALL = [*LOADED.names(), *pickers.PICKERS]
SELECTING = [name for name in ALL if name != "all"]
LOSSY = [name for name in SELECTING if name != "test_whole_pages"]


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Tiny models are short: their bases have to lie closer.
    monkeypatch.setattr("headrace.selection.quest.Quest.interval", 7)
    with (
        pickers.registered(),
        coders.registered(),
        keepers.registered(keepers.KEEPERS),
        tenants.registered(*tenants.TENANTS.items()),
    ):
        yield


def serve(engine: Engine, prompt: tuple[int, ...] = PROMPTS[2], **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **params}
    (request,) = engine.add(prompt, SamplingParams(**settings), request_id="r")
    run_all(engine)
    engine.check_idle()
    return request


def test_choosing_every_page_changes_no_bit() -> None:
    engine, plain = picking_engine("test_whole_pages"), make_engine(model=random_model())
    for prompt in PROMPTS:
        ours, theirs = serve(engine, prompt), serve(plain, prompt)
        assert ours.output_ids == theirs.output_ids
        assert ours.token_logprobs == theirs.token_logprobs


@pytest.mark.parametrize("codec", ["model", "fp8", "test_uneven"])
@pytest.mark.parametrize(("page_size", "budget_rows"), [(1, 4096), (4, 3), (4, 4096), (8, 5)])
@pytest.mark.parametrize("name", LOSSY)
def test_selected_reads_are_dense_attention_under_a_mask(
    name: str, page_size: int, budget_rows: int, codec: str
) -> None:
    """Every drawn token and every log-prob of prompt and output; the definition picks pages row by row."""
    for prompt in PROMPTS:
        engine = picking_engine(name, page_size=page_size, max_num_batched_tokens=budget_rows, codec=codec)
        request = serve(engine, prompt, logprobs=0, prompt_logprobs=0)
        logits_TV, passed_over = run_selected(random_model(), request.tokens, len(prompt), engine.selector, codec)
        assert passed_over > 20
        assert request.output_ids == logits_TV[len(prompt) - 1 : -1].argmax(1).tolist()
        logprobs = logits_TV.log_softmax(1)
        for t in range(1, len(request.tokens)):
            inside = t < len(prompt)
            position = request.prompt_logprobs[t] if inside else request.top_logprobs[t - len(prompt)]
            assert position is not None
            assert position[request.tokens[t]].logprob == pytest.approx(
                float(logprobs[t - 1, request.tokens[t]]), abs=2e-5
            )


@pytest.mark.parametrize("decoder", ["ngram", *tenants.TENANTS])
@pytest.mark.parametrize("name", SELECTING)
def test_every_decoder_emits_what_plain_decoding_emits(name: str, decoder: str) -> None:
    """Drafts and trees across bases, rejected at every offset."""
    for draw, params in enumerate([{"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.6}]):
        for prompt in PROMPTS[draw : draw + 3]:
            plain = serve(picking_engine(name), prompt, **params)
            tenants.teach(prompt, tuple(plain.output_ids))
            for budget in (5, 4096):
                engine = picking_engine(name, decoder=decoder, max_num_batched_tokens=budget)
                assert serve(engine, prompt, **params).tokens == plain.tokens


@pytest.mark.parametrize("name", LOSSY)
def test_only_the_prompt_is_published(name: str) -> None:
    """A prompt that ends with another request's output has seen all of it."""
    engine = picking_engine(name)
    first = serve(engine)
    second = tuple(first.tokens)
    (request,) = engine.add(second, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True), request_id="2")
    engine.step()
    assert request.hit_tokens == first.prompt_len // 4 * 4
    run_all(engine)
    alone = picking_engine(name, enable_prefix_caching=False)
    assert request.tokens == serve(alone, second, max_tokens=10).tokens


@pytest.mark.parametrize("name", ALL)
def test_a_record_taken_at_any_step_continues_with_the_same_tokens(name: str) -> None:
    expected = serve(picking_engine(name)).tokens
    for stop_after in range(1, 40, 5):
        engine = picking_engine(name, max_num_batched_tokens=7)
        (request,) = engine.add(
            PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True), request_id="r"
        )
        for _ in range(stop_after):
            engine.step()
        record = engine.export(request)
        other = picking_engine(name, max_num_batched_tokens=11)
        resumed = other.resume(record)
        run_all(other)
        assert resumed.tokens == expected
        if name != "all":
            with pytest.raises(RequestError, match=f"selector='{name}', selector_budget=8, page_size=4, here with"):
                picking_engine(name, selector_budget=12).resume(record)


@pytest.mark.parametrize("codec", ["model", "test_sealed"])
@pytest.mark.parametrize("selector", SELECTING)
def test_tokens_are_those_of_the_request_alone(selector: str, codec: str, events: Counter[str]) -> None:
    """Law 1: arrivals, famine, hits, aborts, forks, drafts; with sealed pages too."""
    counted = ["chunk", "famine", "abort", "hit", "fork", "drafts", "cut at a trigger", "in pieces"]
    events.update(dict.fromkeys([*counted, *(["seal"] if codec != "model" else [])], 0))

    @settings(max_examples=examples(30), deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        arrivals=st.lists(arrival(["full"]), min_size=3, max_size=7),
        budget=st.sampled_from([1, 7, 64, 10**6]),
        page_size=st.sampled_from([1, 2, 4, 8]),
        spare_pages=st.sampled_from([0, 0, 2, 1000]),
        seats=st.sampled_from([1, 3, 8, 8]),
        tight=st.sampled_from([True, False, False]),
    )
    def run(arrivals: Any, budget: int, page_size: int, spare_pages: int, seats: int, tight: bool) -> None:
        if tight:
            arrivals = [(0, prompt, replace(p, max_tokens=30, ignore_eos=True), a) for _, prompt, p, a in arrivals]
            spare_pages, seats = 0, 8
        for _, prompt, params, _ in arrivals:
            first = make_engine().add(prompt, replace(params, decoder=None, n=1), request_id="plain")[0]
            tenants.teach(prompt, alone_of(first, selector, codec, page_size)[0])
        engine = picking_engine(
            selector,
            codec=codec,
            decoder=",".join(["autoregressive", "ngram", *DRAFTERS]),
            max_num_batched_tokens=budget,
            page_size=page_size,
            num_pages=1 + -(-LONGEST // page_size) + spare_pages,
            max_model_len=LONGEST,
            max_num_seqs=seats,
        )
        if len(arrivals) % 2:
            cut(engine)
        for request in play(engine, arrivals):
            tokens, reason = alone_of(request, selector, codec, page_size)
            if request.finish is Finish.ABORT:
                events["abort"] += 1
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["drafts"] += request.decoder != "autoregressive"
        engine.check_idle()
        events["examples"] += 1
        events["in pieces"] += engine.runner.pieces.replays if engine.runner.pieces else 0
        events["chunk"] += engine.stats.chunks
        events["famine"] += engine.stats.preemptions
        events["fork"] += engine.stats.forks
        events["hit"] += engine.cache.hit_tokens > 0
        events["cut at a trigger"] += engine.stats.trigger_cuts
        if codec != "model":
            events["seal"] += engine.upkeep.stats.seals

    run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "nope"}, "selector='nope' is not a known selector; known: all, "),
        ({"selector": "quest"}, "selector='quest' needs selector_budget"),
        ({"selector_budget": 8}, "selector_budget is 8, but selector='all' reads everything"),
        ({"selector": "quest", "selector_budget": 3}, "selector_budget is 3, less than a page of 4 slots"),
        ({"selector": "quest", "selector_budget": 0}, "selector_budget is 0; it must be at least 1"),
        (
            {"selector": "quest", "selector_budget": 8, "evictor": "key_norm", "cache_budget": 20},
            "selector='quest' chooses among whole pages of tokens, and evictor='key_norm' moves slots",
        ),
        ({"selector": "quest", "selector_budget": 8, "model": "window"}, "the model has sliding-window layers"),
    ],
)
def test_engines_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    model = window_model() if options.get("model") == "window" else random_model()
    with pytest.raises(ConfigError, match=message):
        make_engine(**{**options, "model": model})


SOURCE = '''
"""The last of the older pages."""

import torch

from headrace.selection.base import SELECTORS, Selector


@SELECTORS.register("last", label="lossy", summary="The last of the older pages.")
class Last(Selector):
    interval = 5

    def score(self, q_XHD, k_KTSD, page_XP):
        return torch.arange(page_XP.shape[1]).expand(page_XP.shape).double()
'''


def test_a_selector_from_a_file(tmp_path: Path) -> None:
    """A new method is one file: the engine runs it without having heard of it."""
    path = tmp_path / "last.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("last", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        engine = picking_engine("last", codec="fp8", decoder="ngram")
        requests = [
            engine.add(prompt, SamplingParams(max_tokens=12, seed=i), request_id=str(i))[0]
            for i, prompt in enumerate(PROMPTS)
        ]
        run_all(engine)
        engine.check_idle()
        for request in requests:
            assert (tuple(request.output_ids), request.finish.reason) == alone_of(request, "last", "fp8")
    finally:
        SELECTORS.remove("last")
