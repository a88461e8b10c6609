"""Victims whose cache goes to host memory and back: nothing differs from a request that was never interrupted.

Swaps at each step of short runs, for every evictor, decoder, window and fixed state; then law one under famine. What
comes back is compared bit for bit, and the choice between a copy and a new evaluation with figures of the tests.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coders
import keepers
import pytest
import tenants
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked import random_model, window_model
from safetensors.torch import save_file
from tiny import CONFIG, DEVICE, VOCAB, make_engine, run_all, tiny_model
from tiny import most_examples as examples
from torch import Tensor
from toy import toy

from headrace.cache.swap import SwapSpace
from headrace.engine.engine import Engine
from headrace.engine.preempt import Costs, SwapStats
from headrace.errors import ConfigError, InvariantError
from headrace.params import SamplingParams
from headrace.parts import DECODERS, EVICTORS, SCHEDULERS
from headrace.request import Finish, Request, State
from headrace.scheduling.base import Schedule

BUDGET, INTERVAL = 11, 5
PROMPT = tuple((5 * i * 3 + 2) % VOCAB for i in range(19))
REPEATING = (7, 8, 9, 10) * 5
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
BOUNDED = [name for name in EVICTORS.names() if name != "full"]
GIB = 2**30


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    with keepers.registered(keepers.KEEPERS), tenants.registered(*tenants.TENANTS.items()):
        yield


@pytest.fixture(scope="module")
def drafter() -> Iterator[str]:
    """A checkpoint with the tiny model's own weights, slightly disturbed: it is often right, and not always."""
    generator = torch.Generator().manual_seed(7)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        tensors = {}
        for name, views in tiny_model().tensors().items():
            noise = torch.randn(views[0].shape, generator=generator, dtype=torch.float64)
            tensors[name] = (views[0].cpu() * (1 + 0.1 * noise)).contiguous()
        save_file(tensors, str(Path(directory) / "model.safetensors"))
        yield directory


def swapping(**options: Any) -> Engine:
    return make_engine(**{"preemption": "swap", **options})


def evicting(name: str, **options: Any) -> Engine:
    if name != "full":
        options.setdefault("cache_budget", BUDGET)
    return swapping(**{"evictor": name, "cache_interval": INTERVAL, "model": random_model(), **options})


def contents(engine: Engine, request: Request) -> dict[str, Any]:
    """Everything that a request has in tables, pages and states, drafts excepted."""
    i, groups = request.index, range(len(engine.cache.groups))
    seen: list[Tensor] = [torch.tensor(table) for table in engine.table.clocks(i)]
    seen += [engine.table.hist[i, : request.n_tok].clone(), engine.table.n_done[i].clone()]
    seen += [engine.table.trigger[i].clone(), engine.table.n_tok[i].clone()]
    for g in groups:
        # Slots behind a window read the trash page, whose contents nobody defined.
        first = request.freed[g] * engine.cache.page_size
        seen += [engine.cache.keys(request, g)[:, :, first:], engine.cache.values(request, g)[:, :, first:]]
    seen += [engine.states.state(layer, i).clone() for layer in engine.states.layers]
    names = ["n_done", "trigger", "dropped", "freed", "exact_len", "published", "tokens", "cache_budget"]
    return {"tensors": seen, "books": {name: json.loads(json.dumps(getattr(request, name))) for name in names}}


def come_back(engine: Engine, request: Request) -> None:
    """Restore a request without any rows."""
    engine._admit(Schedule(admitted=[request.arrival]))
    engine.table.flush()
    engine.cache.flush()
    engine.audit()


def swap_here(engine: Engine, request: Request) -> None:
    """Out and back, bit for bit."""
    before, swaps = contents(engine, request), engine.stats.swaps
    running, drafts = engine._view(request), request.drafted
    engine._preempt(request)
    engine.audit()
    view, free = engine._view(request), engine.cache.available
    if not drafts:
        assert view.most == running.most
    assert all(a >= b for a, b in zip(view.kv_len, running.kv_len, strict=True))
    assert (request.state, request.index, request.pages) == (State.PREEMPTED, -1, [])
    assert engine.stats.swaps == swaps + 1
    assert engine.swap.held_bytes > 0
    come_back(engine, request)
    # The scheduler was told what the way back takes.
    taken = [a - b for a, b in zip(free, engine.cache.available, strict=True)]
    idle = view.idle_hits or (0,) * len(view.pages)
    counted = [len(pages) - n + i for pages, n, i in zip(request.pages, view.pages, idle, strict=True)]
    assert all(a <= b for a, b in zip(taken, counted, strict=True))
    assert taken == counted or len(taken) > 1
    after = contents(engine, request)
    assert engine.swap.held_bytes == 0
    assert after["books"] == before["books"]
    assert all(torch.equal(a, b) for a, b in zip(after["tensors"], before["tensors"], strict=True))


def every_step(
    make: Callable[[], Engine], prompt: tuple[int, ...] = PROMPT, params: SamplingParams = GREEDY
) -> list[Engine]:
    """Interrupt a short run after each of its steps, once in each of as many engines, then after every step in one.
    Between the halves the free pages are scribbled over. Returns the engines."""
    whole = make()
    (expected,) = whole.add(prompt, params, request_id="r")
    run_all(whole)
    engines, stop_after = [], 0
    while True:
        stop_after += 1
        engine = make()
        (request,) = engine.add(prompt, params, request_id="r")
        for _ in range(stop_after):
            engine.step()
        if request.finish:
            break
        swap_here(engine, request)
        engine._preempt(request)
        engine.cache.drop_idle()
        scribble(engine)
        run_all(engine)
        engine.check_idle()
        assert request.tokens == expected.tokens
        assert request.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-5)
        engines.append(engine)
    always = make()
    (request,) = always.add(prompt, params, request_id="r")
    while always.has_work:
        always.step()
        if not request.finish and request.n_done:
            swap_here(always, request)
            always._preempt(request)
    always.check_idle()
    assert request.tokens == expected.tokens
    assert always.stats.swaps > 8
    return [*engines, always]


def scribble(engine: Engine) -> None:
    """Nothing is held: whoever reads a page that was not copied back gets NaN."""
    assert not any(pool.held for pool in engine.cache.pools)
    for g in range(len(engine.cache.pools)):
        for plane in engine.cache.planes[g]:
            plane.fill_(float("nan") if plane.is_floating_point() else 127)


# Swap at each step


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("name", ["full", *BOUNDED, *keepers.KEEPERS])
def test_every_evictor(name: str, rows: int) -> None:
    engines = every_step(lambda: evicting(name, max_num_batched_tokens=rows, page_size=4))
    assert all(engine.stats.swaps for engine in engines)
    if name != "full":
        assert engines[-1].upkeep.stats.compactions > 2


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_windows(page_size: int, caching: bool) -> None:
    engines = every_step(
        lambda: swapping(
            model=window_model(), page_size=page_size, max_num_batched_tokens=7, enable_prefix_caching=caching
        )
    )
    windows = [g for g, group in enumerate(engines[0].cache.groups) if group.state.window]
    assert windows


def test_pages_behind_a_window_are_neither_kept_nor_taken() -> None:
    engine = swapping(model=window_model(9), page_size=2)
    (request,) = engine.add(PROMPT, replace(GREEDY, max_tokens=40), request_id="r")
    while request.n_done < 50:
        engine.step()
    (window,) = (g for g, group in enumerate(engine.cache.groups) if group.state.window)
    held = [pool.held for pool in engine.cache.pools]
    assert held[window] <= 6 < held[1 - window]
    engine._preempt(request)
    spilled = engine.swap.get(request)
    assert spilled is not None
    assert spilled.planes[window][0].shape[2] <= held[window]
    engine.cache.drop_idle()
    come_back(engine, request)
    assert engine.cache.pools[window].held <= held[window]
    run_all(engine)
    engine.check_idle()


@pytest.mark.parametrize("pattern", ["RAWRAW", "RR"])
@pytest.mark.parametrize("decoder", ["autoregressive", "test_sometimes_right", "test_jacobi"])
def test_fixed_states(pattern: str, decoder: str) -> None:
    prompt = tuple(token % 31 for token in PROMPT)
    options: dict[str, Any] = {"num_pages": None} if pattern == "RR" else {}

    def make(decoder: str = decoder) -> Engine:
        return swapping(model=toy(pattern), decoder=decoder, draft_tokens=3, max_num_batched_tokens=7, **options)

    plain = make("autoregressive")
    (request,) = plain.add(prompt, GREEDY, request_id="plain")
    run_all(plain)
    tenants.teach(prompt, tuple(request.output_ids))
    every_step(make, prompt)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", [*(n for n in DECODERS.names() if n not in tenants.TENANTS), *tenants.TENANTS])
def test_every_decoder(name: str, sampled: bool, drafter: str) -> None:
    params = replace(GREEDY, temperature=0.8, seed=3, presence_penalty=0.5) if sampled else GREEDY
    plain = make_engine()
    (request,) = plain.add(REPEATING, params, request_id="plain")
    run_all(plain)
    tenants.teach(REPEATING, tuple(request.output_ids))
    options = {"draft_model": drafter} if name == "draft_model" else {}
    engines = every_step(lambda: swapping(decoder=name, draft_tokens=3, **options), REPEATING, params)
    (found,) = engines[-1].add(REPEATING, params, request_id="again")
    run_all(engines[-1])
    assert found.tokens == request.tokens


def test_the_cache_of_a_draft_model_comes_back(drafter: str) -> None:
    """Not only tokens: drafts are accepted as if nothing had happened."""

    def steps(interrupted: bool) -> tuple[int, list[int]]:
        engine = swapping(decoder="draft_model", draft_model=drafter, draft_tokens=3)
        (request,) = engine.add(PROMPT, replace(GREEDY, max_tokens=40), request_id="r")
        count = 0
        while engine.has_work:
            engine.step()
            count += 1
            if interrupted and count == 5:
                swap_here(engine, request)
                engine._preempt(request)
                engine.cache.drop_idle()
                scribble(engine)
        return count, request.tokens

    (plain, tokens), (swapped, again) = steps(False), steps(True)
    assert again == tokens
    # The drafts of one step are lost.
    assert plain <= swapped <= plain + 2


# Pages that others see


def test_published_pages_are_shared_again() -> None:
    engine = swapping(page_size=4)
    (request,) = engine.add(PROMPT, GREEDY, request_id="r")
    for _ in range(3):
        engine.step()
    mine = [list(pages) for pages in request.pages]
    whole = request.n_done // 4
    engine._preempt(request)
    assert engine.cache.pools[0].held == 0
    come_back(engine, request)
    assert [pages[:whole] for pages in request.pages] == [pages[:whole] for pages in mine]
    engine._preempt(request)
    (reader,) = engine.add((*PROMPT[:12], 1, 2), replace(GREEDY, max_tokens=30), request_id="reader")
    engine.step()
    assert reader.hit_tokens == 12
    assert reader.pages[0][:3] == mine[0][:3] == request.pages[0][:3]
    run_all(engine)
    engine.check_idle()


def test_what_was_forgotten_meanwhile_is_copied_and_offered_again() -> None:
    engine = swapping(page_size=4)
    (request,) = engine.add(PROMPT, GREEDY, request_id="r")
    engine.step()
    engine._preempt(request)
    engine.cache.drop_idle()
    assert engine.cache.look_up(request).tokens == 0
    run_all(engine)
    (again,) = engine.add(PROMPT, GREEDY, request_id="again")
    run_all(engine)
    assert again.hit_tokens == 16
    assert again.tokens == request.tokens


def test_a_page_that_only_looks_like_the_one_it_was_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compacted page goes to somebody who publishes the request's own prefix in it."""
    engine = evicting("streaming_llm,full", page_size=4)
    (request,) = engine.add(PROMPT, replace(GREEDY, max_tokens=30), request_id="r")
    while not any(request.dropped):
        engine.step()
    before = contents(engine, request)
    rewritten = request.pages[0][1]
    engine._preempt(request)
    engine.cache.drop_idle()
    taken = []
    while engine.cache.pools[0]._free[-2] != rewritten:
        taken.append(engine.cache.pools[0].take())
    reading = replace(GREEDY, evictor="full", cache_budget=None, max_tokens=1)
    (reader,) = engine.add(PROMPT, reading, request_id="reader", priority=-1)
    monkeypatch.setattr(engine.scheduler, "admits", lambda view, *rest: view.key == reader.arrival)
    monkeypatch.setattr(engine, "audit", lambda: None)  # the taken pages are nobody's
    engine.step()
    assert reader.finish
    assert engine.cache.index.holds(0, rewritten)
    monkeypatch.undo()
    for page in taken:
        engine.cache.pools[0].drop(page, keep=False)
    come_back(engine, request)
    assert rewritten not in request.pages[0]
    after = contents(engine, request)
    assert all(torch.equal(a, b) for a, b in zip(after["tensors"], before["tensors"], strict=True))
    run_all(engine)
    engine.check_idle()


@pytest.mark.parametrize("n", [2, 4])
def test_samples_and_their_first_one(n: int) -> None:
    """Siblings wait for a swapped first sample, and a swapped sibling goes on from its own cache."""
    params = SamplingParams(n=n, temperature=0.9, seed=1, max_tokens=8, ignore_eos=True)
    plain = make_engine()
    expected = [sample.tokens for sample in plain.add(PROMPT, params, request_id="r")]
    run_all(plain)
    for victim in range(n):
        for stop_after in range(1, 9):
            engine = swapping(max_num_batched_tokens=5)
            samples = engine.add(PROMPT, params, request_id="r")
            for _ in range(stop_after):
                engine.step()
            if samples[victim].index >= 0:
                engine._preempt(samples[victim])
            run_all(engine)
            engine.check_idle()
            assert [sample.tokens for sample in samples] == expected


def test_a_swapped_sample_does_not_begin_again_as_a_fork() -> None:
    """It began its prompt alone, because its first sample had evicted; that one begins again and could be forked."""
    params = SamplingParams(n=2, temperature=0.9, seed=1, max_tokens=12, ignore_eos=True)
    prompt = PROMPT[:14]
    plain = evicting("streaming_llm", preemption="recompute")
    expected = [sample.tokens for sample in plain.add(prompt, params, request_id="r")]
    run_all(plain)
    assert plain.stats.forks == 1
    engine = evicting("streaming_llm", max_num_batched_tokens=13, enable_prefix_caching=False)
    engine.budget = 4
    first, second = engine.add(prompt, params, request_id="r")
    engine._waiting.remove(second)
    while not any(first.dropped):
        engine.step()
    engine._waiting.append(second)
    engine.step()
    assert 0 < second.n_done < 13
    engine._preempt(second)
    engine._waiting.remove(second)
    engine.preemption.mode = "recompute"
    engine._preempt(first)
    engine.audit = lambda: None  # type: ignore[method-assign]  # one that waits is out of the line
    engine.step()
    assert first.n_done == 4
    engine._waiting.append(second)
    assert [view.key for view in engine.snapshot().waiting] == [second.arrival]  # it does not wait for the first
    engine._waiting.remove(second)
    engine.budget = 9
    engine.step()
    assert engine.cache.can_fork(first, 13)
    engine._waiting.append(second)
    del engine.audit
    run_all(engine)
    engine.check_idle()
    assert (engine.stats.forks, engine.stats.swaps) == (0, 1)
    assert [first.tokens, second.tokens] == expected


# The life of a swapped request


@pytest.mark.parametrize("name", ["fp8", *coders.CODERS])
def test_every_codec(name: str) -> None:
    """Scales, sealed pages and pages of odd sizes come back as they were."""
    with coders.registered():
        for engine in every_step(lambda: swapping(codec=name, page_size=4, model=random_model())):
            assert engine.stats.swaps > 0


def swapped_one(**options: Any) -> tuple[Engine, Request]:
    engine = evicting("streaming_llm", **options)
    (request,) = engine.add(PROMPT, replace(GREEDY, max_tokens=30), request_id="r", deadline_s=10.0)
    for _ in range(6):
        engine.step()
    engine._preempt(request)
    assert engine.swap.held_bytes == engine.swap.get(request).nbytes > 0
    engine.audit()
    return engine, request


def test_an_abort_drops_the_copy() -> None:
    engine, request = swapped_one()
    engine.abort("r")
    assert (request.finish, len(engine.swap), engine.swap.held_bytes) == (Finish.ABORT, 0, 0)
    engine.check_idle()


def test_a_deadline_drops_the_copy() -> None:
    now = [0.0]
    engine, request = swapped_one(clock=lambda: now[0])
    now[0] = 11.0
    engine.step()
    assert (request.finish, len(engine.swap), engine.swap.held_bytes) == (Finish.TIMEOUT, 0, 0)
    engine.check_idle()


def test_a_record_of_a_swapped_request_continues_elsewhere() -> None:
    engine, request = swapped_one()
    record = engine.export(request)
    other = evicting("streaming_llm", preemption="recompute")
    resumed = other.resume(json.loads(json.dumps(record)))
    run_all(other)
    run_all(engine)
    assert resumed.tokens == request.tokens
    engine.check_idle()
    other.check_idle()


def test_full_host_memory_is_counted_and_the_victim_recomputed() -> None:
    engine = evicting("streaming_llm")
    requests = [engine.add(PROMPT, replace(GREEDY, max_tokens=30), request_id=str(i))[0] for i in range(3)]
    for _ in range(4):
        engine.step()
    engine.swap.limit_bytes = 2 * engine.swap.bytes_of(requests[0])
    for request in reversed(requests):
        engine._preempt(request)
    assert [engine.swap.get(request) is not None for request in requests] == [False, True, True]
    assert (engine.stats.swaps, engine.stats.swap_full) == (2, 1)
    engine.audit()
    run_all(engine)
    engine.check_idle()
    assert len({tuple(request.tokens) for request in requests}) == 1
    assert tuple(requests[0].output_ids) == keepers.alone_of(requests[0], evictors="full,streaming_llm", interval=5)[0]


def test_bytes_and_seconds_are_counted() -> None:
    engine, request = swapped_one(enable_prefix_caching=False)
    nbytes = engine.swap.held_bytes
    per_slot = sum(p.numel() * p.element_size() for p in engine.cache.planes[0]) // (512 * 4)
    assert nbytes == -(-engine.swap.get(request).slots[0] // 4) * 4 * per_slot
    run_all(engine)
    assert engine.stats.swapped_bytes == 2 * nbytes
    assert engine.stats.swap_s > 0


def test_books_that_do_not_balance_are_found() -> None:
    engine, request = swapped_one()
    engine.swap.held_bytes += 1
    with pytest.raises(InvariantError, match="host memory"):
        engine.audit()
    engine.swap.held_bytes -= 1
    come_back(engine, request)
    engine.swap.limit_bytes = 0
    with pytest.raises(InvariantError, match="in host memory already, or does not fit"):
        engine.swap.spill(request)
    engine.swap.limit_bytes = GIB
    engine._preempt(request)
    engine._waiting.remove(request)
    with pytest.raises(InvariantError, match="requests that do not wait"):
        engine.audit()
    del engine._by_id["r"]
    monkey, engine.audit = engine.audit, lambda: None  # type: ignore[method-assign]
    with pytest.raises(InvariantError, match="is idle and holds the caches of 1"):
        engine.check_idle()
    engine.audit = monkey  # type: ignore[method-assign]


# The choice


def test_the_choice_goes_by_measured_seconds() -> None:
    costs = Costs(row_s=1e-3, byte_s=1e-9)
    assert costs.swap_is_cheaper(100, 10**6)  # 2 ms against 100 ms
    assert not costs.swap_is_cheaper(100, 10**8)  # 200 ms against 100 ms
    assert not costs.swap_is_cheaper(1, 500_000)  # as long: no reason to copy
    for _ in range(50):
        costs.saw_copy(1000, 1000 * 1e-6)
    assert costs.byte_s == pytest.approx(1e-6, rel=1e-3)
    assert not costs.swap_is_cheaper(100, 10**6)
    for _ in range(50):
        costs.saw_step(100, 100 * 1.0)
    assert costs.row_s == pytest.approx(1.0, rel=1e-3)
    assert costs.swap_is_cheaper(100, 10**6)


def test_small_steps_count_until_the_first_large_one() -> None:
    costs = Costs()
    costs.saw_step(2, 1.0)
    assert costs.row_s == 0.5
    costs.saw_step(2, 2.0)
    assert costs.row_s == pytest.approx(0.6)
    costs.saw_step(100, 1.0)
    assert costs.row_s == pytest.approx(0.01)
    costs.saw_step(2, 5.0)
    assert costs.row_s == pytest.approx(0.01)
    assert costs.swap_is_cheaper(1, 10**9)  # no copy was measured yet: the first tells
    costs.saw_copy(10, 20.0)
    assert costs.byte_s == 2.0
    measured = Costs(row_s=0.02)
    measured.saw_step(2, 5.0)
    assert measured.row_s == 0.02


@pytest.mark.parametrize("model", ["evicted", "states", "whole"])
@pytest.mark.parametrize("cheap", ["swap", "recompute"])
def test_auto_swaps_where_it_is_cheaper_and_something_was_evicted(model: str, cheap: str) -> None:
    if model == "evicted":
        engine = evicting("streaming_llm", preemption="auto")
    else:
        engine = make_engine(model=toy("RAWRAW") if model == "states" else random_model(), preemption="auto")
    prompt = tuple(token % 31 for token in PROMPT)
    (request,) = engine.add(prompt, replace(GREEDY, max_tokens=30), request_id="r")
    for _ in range(6):
        engine.step()
    engine.preemption.costs = Costs(row_s=1.0, byte_s=1e-12) if cheap == "swap" else Costs(row_s=1e-12, byte_s=1.0)
    engine._preempt(request)
    assert engine.stats.swaps == (cheap == "swap" and model != "whole")
    run_all(engine)
    engine.check_idle()
    plain = make_engine(
        model=engine.model,
        **({"evictor": "streaming_llm", "cache_interval": INTERVAL} if model == "evicted" else {}),
        **({"cache_budget": BUDGET} if model == "evicted" else {}),
    )
    (expected,) = plain.add(prompt, replace(GREEDY, max_tokens=30), request_id="r")
    run_all(plain)
    assert request.tokens == expected.tokens


def test_costs_are_measured_at_the_start_and_by_what_is_done() -> None:
    engine = evicting("streaming_llm", preemption="auto", max_num_batched_tokens=None)
    assert engine.preemption.costs.byte_s > 0
    # On a GPU one step is timed, which need not be one of the whole budget.
    rows = engine.budget if engine.device.type == "cpu" else max(engine.step_times_s)
    assert engine.preemption.costs.row_s == engine.step_times_s[rows] / rows
    engine = swapping()
    assert engine.preemption.costs.row_s == 0
    (request,) = engine.add(PROMPT, GREEDY, request_id="r")
    began = time.perf_counter()
    engine.step()
    assert 0 < engine.preemption.costs.row_s * len(PROMPT) < time.perf_counter() - began
    before = engine.preemption.costs.byte_s
    engine._preempt(request)
    assert engine.preemption.costs.byte_s != before
    assert make_engine(preemption="recompute").preemption.costs.byte_s == 0


def test_a_request_whose_compaction_waits_is_recomputed() -> None:
    engine = evicting("streaming_llm")
    (request,) = engine.add(PROMPT, GREEDY, request_id="r")
    while not any(request.dropped):
        engine.step()
    engine.upkeep._due[request.arrival] = request, {}
    engine._preempt(request)
    assert (engine.stats.swaps, len(engine.swap), engine.stats.preemptions) == (0, 0, 1)
    run_all(engine)
    engine.check_idle()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preemption": "nope"}, "preemption is 'nope'; choose from auto, recompute, swap"),
        ({"swap_space_gib": -1.0, "preemption": "auto"}, "swap_space_gib is -1.0; it must be a number of GiB"),
        ({"swap_space_gib": float("nan"), "preemption": "auto"}, "swap_space_gib is nan; it must be a number of GiB"),
        ({"swap_space_gib": 0.0, "preemption": "swap"}, "keeps copies in host memory: give it more"),
        ({"swap_space_gib": 1.0, "preemption": "recompute"}, "makes no copies: leave it out"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(**options)


def test_host_memory_is_bounded_by_the_option() -> None:
    assert make_engine(preemption="auto", swap_space_gib=0.25).swap.limit_bytes == GIB // 4
    assert make_engine(preemption="auto", swap_space_gib=0.0).swap.limit_bytes == 0
    assert make_engine(preemption="recompute").swap.limit_bytes == 0
    assert make_engine(preemption="auto").swap.limit_bytes == (GIB // 2 if DEVICE == "cpu" else 4 * GIB)
    assert SwapStats() == SwapStats(swaps=0, swap_full=0, swapped_bytes=0, swap_s=0.0)


# Law one


SHARED = [tuple((7 * i + 3 * j + 5) % VOCAB for i in range(40)) for j in range(2)]
DRAFTERS = ["test_tree", "test_sometimes_right", "test_jacobi"]
KINDS = [*BOUNDED, *keepers.KEEPERS]
LONGEST = 62


def alone(prompt: tuple[int, ...], params: str, evictors: str, interval: int = INTERVAL) -> tuple[Any, Any]:
    return keepers._alone(prompt, params, evictors, interval, 0)


def arrival(rng: random.Random) -> tuple[int, tuple[int, ...], SamplingParams, int | None, int | None, int]:
    head = rng.choice(SHARED)[: rng.choice([0, 9, 17, 26])]
    prompt = (*head, *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))))
    kind = rng.choice(["full", *KINDS])
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.8]),
        seed=rng.randrange(3),
        max_tokens=rng.choice([8, 30, 30]),
        ignore_eos=rng.random() < 0.8,
        presence_penalty=rng.choice([0.0, 0.7]),
        evictor=kind,
        cache_budget=None if kind == "full" else rng.choice([9, 16, 21]),
        decoder=rng.choice([None, None, "ngram", *DRAFTERS]),
    )
    ends = rng.choice([None] * 5 + [11, 25, 40]), rng.choice([None] * 5 + [20, 30, 50])
    comes = rng.choice([0, 0, 0, 2, 5, 9, 15, 25, 40])
    # Who comes later is often more urgent, and others have to make room.
    return comes, prompt, params, *ends, rng.choice([3, 3 - min(comes, 30) // 10])


def play(engine: Engine, arrivals: list[Any], now: list[float], events: Counter[str]) -> list[Request]:
    """Play the arrivals: (step, prompt, parameters, steps until an abort, steps until the deadline, priority)."""
    queue = sorted(enumerate(arrivals), key=lambda item: item[1][0])
    requests: dict[int, Request] = {}
    aborts: dict[int, list[Request]] = {}
    for step in range(20_000):
        now[0] = float(step)
        while queue and queue[0][1][0] <= step:
            number, (_, prompt, params, abort_after, deadline, priority) = queue.pop(0)
            (requests[number],) = engine.add(
                prompt, params, request_id=str(number), priority=priority, deadline_s=deadline
            )
            if abort_after is not None:
                aborts.setdefault(step + abort_after, []).append(requests[number])
        waiting = {r.arrival for r in requests.values() if engine.swap.get(r) is not None}
        for request in aborts.pop(step, ()):
            if request.arrival in waiting:
                events["abort while swapped"] += 1
            engine.abort(request.request_id)
        engine.step()
        for request in requests.values():
            if request.arrival in waiting:
                if request.finish is Finish.TIMEOUT:
                    events["timeout while swapped"] += 1
                events["restore"] += request.index >= 0
            elif (spilled := engine.swap.get(request)) is not None:
                events["swap"] += 1
                events["swap of an evicted request"] += any(spilled.dropped)
                if request.n_tok - spilled.n_done > 1:
                    events["swap amid a prompt"] += 1
        if not queue and not engine.has_work:
            return [requests[i] for i in range(len(arrivals))]
    raise AssertionError("no progress")


@pytest.mark.parametrize("mode", ["swap", "auto"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.names())
def test_tokens_are_those_of_the_request_alone(
    scheduler: str, mode: str, events: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = ["famine", "swap", "swap of an evicted request", "restore", "compaction", "copy", "whole"]
    if mode == "swap":
        counted += ["swap amid a prompt", "host memory full", "shared again"]
        counted += ["abort while swapped", "timeout while swapped"]
    else:
        counted += ["recomputed by choice"]
    events.update(dict.fromkeys(counted, 0))
    loaded = ",".join(["full", *KINDS])
    count_sharing(monkeypatch, events)

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed: int) -> None:
        rng = random.Random(seed)
        arrivals = [arrival(rng) for _ in range(rng.randint(5, 12))]
        interval, page_size = rng.choice([1, 3, 5, 16]), rng.choice([1, 2, 4, 16])
        room, cheap = rng.choice([1.0, 1.0, 0.2]), rng.choice([1.0, 0.1, 30.0])
        for _, prompt, params, *_ in arrivals:
            plain = replace(params, decoder=None)
            tenants.teach(prompt, alone(prompt, json.dumps(plain.to_dict()), loaded, interval)[0])
        now = [0.0]
        engine = make_engine(
            model=random_model(),
            clock=lambda: now[0],
            scheduler=scheduler,
            decoder=",".join(["autoregressive", "ngram", *DRAFTERS]),
            evictor=loaded,
            cache_interval=interval,
            max_num_batched_tokens=rng.choice([1, 7, 64, 4096]),
            page_size=page_size,
            num_pages=1 + -(-LONGEST // page_size) + rng.choice([0, 0, 2, 30]),
            max_model_len=LONGEST,
            max_num_seqs=rng.choice([3, 8, 8]),
            enable_prefix_caching=rng.random() < 0.7,
            preemption=mode,
        )
        engine.swap.limit_bytes = int(room * engine.cache.allocated_bytes) if room < 1 else GIB
        # By rows and bytes alone, so that the same happens in every run.
        slot_bytes = engine.cache.bytes_of_pages([1] * len(engine.cache.groups)) / page_size
        engine.preemption.costs = FixedCosts(row_s=1.0, byte_s=cheap / slot_bytes / 2)
        for request in play(engine, arrivals, now, events):
            plain = replace(request.params, decoder=None, cache_budget=request.cache_budget or None)
            prompt = tuple(request.tokens[: request.prompt_len])
            tokens, reason = alone(prompt, json.dumps(plain.to_dict()), loaded, interval)
            if request.finish in (Finish.ABORT, Finish.TIMEOUT):
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
            events["whole"] += request.evictor == "full"
        engine.check_idle()
        events["examples"] += 1
        events["famine"] += engine.stats.preemptions
        if engine.stats.swap_full:
            events["host memory full"] += engine.stats.swap_full
        events["compaction"] += engine.upkeep.stats.compactions
        events["copy"] += engine.upkeep.stats.copies
        recomputed = engine.stats.preemptions - engine.stats.swaps - engine.stats.swap_full
        if recomputed:
            events["compaction waits" if mode == "swap" else "recomputed by choice"] += recomputed

    run()


class FixedCosts(Costs):
    """Learns nothing."""

    def saw_step(self, rows: int, seconds: float) -> None:
        pass

    def saw_copy(self, nbytes: int, seconds: float) -> None:
        pass


def count_sharing(monkeypatch: pytest.MonkeyPatch, events: Counter[str]) -> None:
    """Count restored pages that were not copied."""
    before = SwapSpace.restore

    def restore(space: SwapSpace, request: Request, index: int) -> Any:
        spilled = before(space, request, index)
        if any(spilled.claimed):
            events["shared again"] += sum(map(len, spilled.claimed))
        return spilled

    monkeypatch.setattr(SwapSpace, "restore", restore)


def test_famine_with_windows_and_fixed_states(events: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Random famine over a model with windows, and one with states of both kinds."""
    events.update(dict.fromkeys(["window", "states", "restore", "shared again"], 0))
    count_sharing(monkeypatch, events)
    rng = random.Random(4)
    for round_ in range(24):
        kind = ["window", "states"][round_ % 2]
        model = window_model() if kind == "window" else toy("RAWRAW")
        vocab = VOCAB if kind == "window" else 31
        options: dict[str, Any] = {"model": model, "max_num_batched_tokens": rng.choice([3, 9, 60])}
        arrivals = [
            ((*(t % vocab for t in SHARED[i % 2][: rng.choice([3, 20, 30])]), i), rng.choice([5, 20])) for i in range(7)
        ]
        tight = swapping(page_size=2, num_pages=32, max_model_len=60, **options)
        requests = []
        for i, (prompt, count) in enumerate(arrivals):
            params = replace(GREEDY, temperature=rng.choice([0.0, 0.8]), seed=i, max_tokens=count)
            requests += tight.add(prompt, params, request_id=str(i))
            for _ in range(rng.choice([0, 0, 2])):
                tight.step()
        run_all(tight)
        tight.check_idle()
        events[kind] += tight.stats.swaps
        events["restore"] += tight.stats.swaps
        for request in requests:
            single = make_engine(model=model, enable_prefix_caching=False)
            (expected,) = single.add(request.tokens[: request.prompt_len], request.params, request_id="alone")
            run_all(single)
            assert request.tokens == expected.tokens
