"""Every registered evictor, and two of the tests, against what an evicted cache is by definition."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import keepers
import pytest
import torch
from keepers import alone_of
from masked import random_model, run_masked, window_model
from tiny import VOCAB, make_engine, run_all

from headrace.engine.engine import Engine
from headrace.errors import ConfigError, RequestError
from headrace.eviction.base import EVICTORS, Cells, select
from headrace.params import SamplingParams
from headrace.parts import EVICTORS as LOADED
from headrace.request import Request

BUDGET, INTERVAL = 11, 5
PROMPTS = [tuple((5 * i * (j + 1) + j) % VOCAB for i in range(3 + 14 * j)) for j in range(4)]


@pytest.fixture(autouse=True)
def _keepers() -> Iterator[None]:
    with keepers.registered(keepers.KEEPERS):
        yield


ALL = [*LOADED.names(), *keepers.KEEPERS]
EVICTING = [name for name in ALL if name != "full"]


def engine_with(name: str, **options: Any) -> Engine:
    settings: dict[str, Any] = {"cache_interval": INTERVAL, "model": random_model(), **options}
    if name != "full":
        settings.setdefault("cache_budget", BUDGET)
    return make_engine(evictor=name, **settings)


def layers_of(engine: Engine) -> list[tuple[int, ...]]:
    return [group.layers for group in engine.cache.groups]


def serve(engine: Engine, prompt: tuple[int, ...] = PROMPTS[2], **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, **params}
    (request,) = engine.add(prompt, SamplingParams(**settings), request_id="r")
    run_all(engine)
    engine.check_idle()
    return request


@pytest.mark.parametrize("name", ALL)
def test_an_unbounded_budget_is_the_whole_cache(name: str) -> None:
    engine = engine_with(name, **({} if name == "full" else {"cache_budget": 10**6}))
    plain = make_engine(model=random_model())
    for prompt in PROMPTS:
        assert serve(engine, prompt).output_ids == serve(plain, prompt).output_ids
    assert engine.upkeep.stats.compactions == 0


@pytest.mark.parametrize("budget_rows", [1, 4, 4096])
@pytest.mark.parametrize("name", EVICTING)
def test_a_compacted_cache_is_dense_attention_under_its_mask(name: str, budget_rows: int) -> None:
    """Contents after every compaction, every drawn token, and every log-prob of prompt and output."""
    for prompt in PROMPTS:
        first = serve(engine_with(name), prompt)
        engine = engine_with(name, max_num_batched_tokens=budget_rows)
        expected = run_masked(
            random_model(), first.tokens, len(prompt), engine.evictors[name], BUDGET, layers_of(engine)
        )
        assert len(expected.after) == (len(first.tokens) - BUDGET) // INTERVAL > 2
        params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        (request,) = engine.add(prompt, params, request_id="r")
        checked = 0
        while engine.has_work:
            engine.step()
            if request.n_done in expected.after:
                checked += 1
                for g, group in enumerate(engine.cache.groups):
                    keys, values = engine.cache.keys(request, g), engine.cache.values(request, g)
                    for i, layer in enumerate(group.layers):
                        kept = expected.after[request.n_done][layer]
                        torch.testing.assert_close(keys[i], torch.stack(kept.k_K), rtol=1e-11, atol=1e-11)
                        torch.testing.assert_close(values[i], torch.stack(kept.v_K), rtol=1e-11, atol=1e-11)
        # What ends at a trigger is not compacted any more.
        assert checked == sum(trigger < len(first.tokens) - 1 for trigger in expected.after) > 2
        assert request.tokens == first.tokens
        assert request.output_ids == expected.logits_TV[len(prompt) - 1 : -1].argmax(1).tolist()
        logprobs = expected.logits_TV.log_softmax(1)
        for t in range(1, len(request.tokens)):
            inside = t < len(prompt)
            position = request.prompt_logprobs[t] if inside else request.top_logprobs[t - len(prompt)]
            assert position is not None
            value = position[request.tokens[t]].logprob
            assert value == pytest.approx(float(logprobs[t - 1, request.tokens[t]]), abs=2e-5)


def test_cells_keep_different_slots() -> None:
    """Otherwise the comparison above would not notice a mix-up of cells."""
    engine = engine_with("key_norm")
    first = serve(engine)
    masked = run_masked(
        random_model(), first.tokens, first.prompt_len, engine.evictors["key_norm"], BUDGET, layers_of(engine)
    )
    kept = {tuple(tokens) for layer in masked.after[max(masked.after)] for tokens in layer.tokens_K}
    assert len(kept) > 3


def cells(n: int, budget: int, keys: torch.Tensor | None = None) -> Cells:
    def read() -> torch.Tensor:
        assert keys is not None
        return keys.clone()

    return Cells((0, 1), 2, n, budget, read, torch.device("cpu"))


def test_streaming_llm_keeps_sinks_and_the_last_tokens() -> None:
    evictor = LOADED["streaming_llm"].make(5)
    kept = select(evictor.score(cells(17, 9)), cells(17, 9), 9)
    assert kept.shape == (2, 2, 9)
    assert kept.flatten(0, 1).tolist() == [[0, 1, 2, 3, 12, 13, 14, 15, 16]] * 4


def test_key_norm_keeps_low_norms_sinks_and_the_recent_quarter() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 2, 30, 4, generator=generator, dtype=torch.float64)
    evictor = LOADED["key_norm"].make(5)
    here = cells(30, 16, keys)
    kept = select(evictor.score(here), here, 16)
    for layer in range(2):
        for head in range(2):
            middle = sorted(range(4, 26), key=lambda s: float(keys[layer, head, s].norm()))[:8]
            assert kept[layer, head].tolist() == sorted([*range(4), *middle, *range(26, 30)])


def test_equal_scores_keep_the_oldest() -> None:
    here = cells(6, 3)
    assert select(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, -torch.inf]), here, 3)[0, 0].tolist() == [0, 2, 3]
    assert select(torch.tensor([-torch.inf] * 5 + [torch.inf]), here, 3)[0, 0].tolist() == [0, 1, 5]


@pytest.mark.parametrize("name", EVICTING)
def test_triggers_and_lengths_depend_on_the_request_alone(name: str) -> None:
    evictor = EVICTORS[name].make(INTERVAL)
    for prompt_len in (1, 40, 400):
        at, seen = 0, []
        while at < 60:
            at = evictor.next_trigger(prompt_len, at, BUDGET)
            seen.append(at)
        assert seen[0] == BUDGET + INTERVAL
        assert all(b - a == INTERVAL for a, b in itertools.pairwise(seen))
        for n_done in range(60):
            assert evictor.next_trigger(prompt_len, n_done, BUDGET) == min(t for t in seen if t > n_done)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", EVICTING)
def test_pages_return_and_what_is_reported_is_what_is_allocated(name: str, page_size: int) -> None:
    engine = engine_with(name, page_size=page_size, max_num_batched_tokens=7, num_pages=200)
    evictor = engine.evictors[name]
    (request,) = engine.add(PROMPTS[3], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True), request_id="r")
    bound = evictor.reserve(request.prompt_len, request.limit, BUDGET)
    assert bound == BUDGET + INTERVAL
    page_bytes = engine.cache.allocated_bytes / 200 / len(engine.cache.groups)
    grown, most_bytes, most_pages = 0, 0.0, 0
    while engine.has_work:
        before = engine.cache.available
        compactions = engine.upkeep.stats.compactions
        engine.step()
        if not request.pages:
            break
        held = [pool.held for pool in engine.cache.pools]
        assert engine.cache.held_bytes(request) == sum(held) * page_bytes
        if engine.upkeep.stats.compactions > compactions:
            assert held == [-(-request.slots(g) // page_size) for g in range(len(held))]
            grown += sum(engine.cache.available) > sum(before)
        most_bytes, most_pages = max(most_bytes, sum(held) * page_bytes), max(most_pages, *held)
    bound_pages = -(-bound // page_size)
    assert request.peak_cache_slots <= bound_pages * page_size
    assert most_bytes <= request.peak_cache_bytes <= bound_pages * page_bytes * len(engine.cache.groups)
    assert most_pages * page_size <= request.peak_cache_slots
    if page_size < INTERVAL:
        assert grown > 3
    engine.check_idle()
    whole = serve(make_engine(model=random_model(), page_size=page_size, num_pages=200), PROMPTS[3], max_tokens=40)
    assert whole.peak_cache_slots >= len(whole.tokens) - 1 > 2 * bound


@pytest.mark.parametrize("name", EVICTING)
def test_published_pages_survive_for_others(name: str) -> None:
    """Others that read a prefix while, before and after it is compacted: no page that they see changes."""
    engine = engine_with(f"{name},full", page_size=2, cache_budget=BUDGET)
    whole = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True, evictor="full")
    bounded = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    prompt = PROMPTS[2]
    (reader,) = engine.add(prompt, whole, request_id="reader")
    engine.step()
    shared = [list(pages[: len(prompt) // 2]) for pages in reader.pages]

    def checksum() -> list[torch.Tensor]:
        pools = zip(engine.cache.planes, shared, strict=True)
        return [plane[:, :, pages].clone() for planes, pages in pools for plane in planes]

    before = checksum()
    (writer,) = engine.add(prompt, bounded, request_id="writer")
    engine.step()
    # The hit ends before the first trigger.
    assert writer.hit_tokens == (BUDGET + INTERVAL - 1) // 2 * 2
    while writer.n_done < 40:
        engine.step()
    assert engine.upkeep.stats.copies == 1
    assert engine.upkeep.stats.compactions > 3
    assert all(torch.equal(a, b) for a, b in zip(before, checksum(), strict=True))
    run_all(engine)
    (late,) = engine.add(prompt, whole, request_id="late")
    run_all(engine)
    assert late.hit_tokens == (len(prompt) - 1) // 2 * 2
    assert reader.output_ids == late.output_ids
    assert tuple(reader.output_ids) == alone_of(reader)[0]
    assert tuple(writer.output_ids) == alone_of(writer, evictors=f"full,{name}", interval=INTERVAL)[0]
    engine.check_idle()


@pytest.mark.parametrize("name", EVICTING)
def test_a_hit_changes_no_token_and_what_is_evicted_is_never_published(name: str) -> None:
    """Warm = cold at every length around units and triggers."""
    cold = {}
    for length in range(1, 40, 1):
        prompt = PROMPTS[3][:length]
        cold[length] = serve(engine_with(name, enable_prefix_caching=False), prompt, max_tokens=12).tokens
    engine = engine_with(name, page_size=4)
    serve(engine, PROMPTS[3], max_tokens=12)
    hits = 0
    for length in range(1, 40, 1):
        request = serve(engine, PROMPTS[3][:length], max_tokens=12)
        assert request.tokens == cold[length]
        hits += request.hit_tokens > 0
        assert request.hit_tokens < BUDGET + INTERVAL
    assert hits > 20
    # Units up to the first trigger at most, however long the sequences are.
    tokens = {node.tokens for node in engine.cache.index._nodes.values()}
    starts = {tuple(t[k : k + 4]) for t in cold.values() for k in range(0, BUDGET + INTERVAL - 3, 4)}
    starts |= {tuple(PROMPTS[3][k : k + 4]) for k in range(0, BUDGET + INTERVAL - 3, 4)}
    assert tokens <= starts


@pytest.mark.parametrize("name", EVICTING)
def test_preempted_anywhere_it_continues_with_the_same_tokens(name: str) -> None:
    expected = serve(engine_with(name)).tokens
    rng = random.Random(1)
    for caching in (False, True):
        for _ in range(12):
            engine = engine_with(name, max_num_batched_tokens=rng.choice([3, 50]), enable_prefix_caching=caching)
            (request,) = engine.add(
                PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), request_id="r"
            )
            while engine.has_work:
                engine.step()
                if request.index >= 0 and rng.random() < 0.12:
                    engine._preempt(request)
            engine.check_idle()
            assert request.tokens == expected


@pytest.mark.parametrize("name", EVICTING)
def test_a_record_continues_under_the_same_eviction_or_not_at_all(name: str) -> None:
    expected = serve(engine_with(name)).tokens
    for stop_after in range(1, 30, 3):
        engine = engine_with(name)
        (request,) = engine.add(
            PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), request_id="r"
        )
        for _ in range(stop_after):
            engine.step()
        record = engine.export(request)
        # The other engine's own evictor and budget are not the request's.
        other = engine_with(f"full,{name}", cache_budget=30)
        resumed = other.resume(record)
        run_all(other)
        assert resumed.tokens == expected
        with pytest.raises(RequestError, match="same cache_interval; here it is 6"):
            engine_with(name, cache_interval=6).resume(record)
        with pytest.raises(RequestError, match=f"evictor='{name}' is not loaded"):
            make_engine(model=random_model()).resume(record)


@pytest.mark.parametrize("name", EVICTING)
def test_samples_share_a_prompt_that_is_not_evicted(name: str) -> None:
    params = SamplingParams(n=3, temperature=0.9, seed=1, max_tokens=20, ignore_eos=True)
    for length in (5, 15, 16, 17, 30):
        engine = engine_with(name)
        samples = engine.add(PROMPTS[3][:length], params, request_id="r")
        run_all(engine)
        engine.check_idle()
        # A prompt that reaches the trigger is compacted before its other samples begin.
        assert engine.stats.forks == (2 if length < BUDGET + INTERVAL else 0)
        single = engine_with(name, enable_prefix_caching=False, max_num_seqs=1)
        own = single.add(PROMPTS[3][:length], params, request_id="own")
        for sample in own:
            sample.parent = None
        run_all(single)
        assert single.stats.forks == 0
        assert [s.output_ids for s in samples] == [s.output_ids for s in own]


def test_a_compaction_waits_for_pages_and_nobody_deadlocks() -> None:
    """A cache so small that copies of shared pages do not fit beside those who share them."""
    waits = 0
    for spare in range(12):
        engine = engine_with(
            "streaming_llm,full", page_size=1, num_pages=1 + 60 + spare, max_model_len=60, cache_budget=BUDGET
        )
        requests = [
            engine.add(
                (*PROMPTS[2][:20], i),
                SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, evictor=kind),
                request_id=str(i),
            )[0]
            for i, kind in enumerate(["streaming_llm", "full", "streaming_llm", "streaming_llm", "full"])
        ]
        run_all(engine)
        engine.check_idle()
        waits += engine.upkeep.stats.waits
        for request in requests:
            expected = alone_of(request, evictors="full,streaming_llm", interval=INTERVAL)
            assert (tuple(request.output_ids), request.finish.reason) == expected
    assert waits > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evictor": "nope"}, "evictor='nope' is not a known evictor; known: full, "),
        ({"evictor": "streaming_llm"}, "evictor='streaming_llm' needs cache_budget"),
        (
            {"evictor": "streaming_llm", "cache_budget": 4},
            "cache_budget is 4; evictor='streaming_llm' needs at least 5",
        ),
        ({"evictor": "full,key_norm", "cache_budget": 7}, "evictor='key_norm' needs at least 8"),
        ({"cache_budget": 100}, "evictor='full' keeps everything: leave it out, or load one of "),
        ({"evictor": "key_norm", "cache_budget": 0}, "cache_budget is 0; it must be at least 1"),
        ({"cache_interval": 0}, "cache_interval is 0; it must be at least 1"),
        ({"evictor": "test_cell", "cache_budget": 9}, "needs a length for each key/value head"),
        ({"evictor": "key_norm", "cache_budget": 9, "model": "window"}, "the model has sliding-window layers"),
    ],
)
def test_engines_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    class PerHead(keepers.Scattered):
        group = "cell"

    if options.get("model") == "window":
        options = {**options, "model": window_model()}
    with keepers.registered({"test_cell": PerHead}), pytest.raises(ConfigError, match=message):
        make_engine(**options)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"evictor": "test_per_layer"}, "evictor='test_per_layer' is not loaded; this engine has full, key_norm"),
        ({"evictor": "key_norm"}, "evictor='key_norm' needs cache_budget"),
        ({"evictor": "key_norm", "cache_budget": 3}, "cache_budget is 3; evictor='key_norm' needs at least 8"),
        ({"cache_budget": 30}, "cache_budget is 30, but evictor='full' keeps everything"),
        ({"evictor": "key_norm", "cache_budget": 2**30}, "it must be at most"),
    ],
)
def test_requests_that_cannot_work_are_refused(params: dict[str, Any], message: str) -> None:
    engine = make_engine(evictor="full,key_norm")
    with pytest.raises(RequestError, match=message):
        engine.add(PROMPTS[0], SamplingParams(**params), request_id="r")
    with pytest.raises(RequestError, match="cache_budget is 0; it must be at least 1"):
        SamplingParams(cache_budget=0)
    engine.check_idle()
