"""Speculation changes when a token is found, never which: every decoder equals plain decoding, token for token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tenants
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, alone_of, examples, make_engine, pad, run_all, tiny_model

from headrace.errors import ConfigError, RequestError
from headrace.params import SamplingParams
from headrace.parts import DECODERS
from headrace.request import Request

PROMPTS = [tuple((5 * i * (j + 1) + j) % VOCAB for i in range(3 + 9 * j)) for j in range(4)]
REPEATING = (7, 8, 9, 10) * 6


@pytest.fixture(autouse=True)
def _tenants() -> Iterator[None]:
    with tenants.registered(*tenants.TENANTS.items()):
        yield


def names() -> list[str]:
    """All decoders, those of the tests included."""
    return [*(name for name in DECODERS.names() if name not in tenants.TENANTS), *tenants.TENANTS]


ALL = names()


def params_of(draw: int, **more: Any) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": draw},
        {"temperature": 0.8, "seed": draw, "top_p": 0.9, "top_k": 9, "presence_penalty": 0.6, "frequency_penalty": 0.4},
        {"temperature": 0.8, "seed": draw, "min_tokens": 6, "repetition_penalty": 1.4},
    ]
    return SamplingParams(**{"max_tokens": 20, **kinds[draw % len(kinds)], **more})


def expect_plain(requests: list[Request]) -> None:
    for request in requests:
        assert (tuple(request.output_ids), request.finish.reason) == alone_of(request)


def learn(prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    engine = make_engine(enable_prefix_caching=False)
    (request,) = engine.add(prompt, replace(params, decoder=None), request_id="plain")
    run_all(engine)
    tenants.teach(prompt, tuple(request.output_ids))
    return tuple(request.output_ids)


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("name", ALL)
def test_tokens_equal_plain_decoding(name: str, draft_tokens: int, drafter: str) -> None:
    """Greedy, sampled, penalised and with a minimum length; alone and together; a stop token inside the drafts."""
    for draw in range(4):
        prompts = [*PROMPTS, REPEATING]
        params = params_of(draw)
        for prompt in prompts:
            learn(prompt, params)
        for budget in (5, 4096):
            engine = make_engine(
                decoder=name, draft_tokens=draft_tokens, draft_model=drafter, max_num_batched_tokens=budget
            )
            requests = [engine.add(p, params, request_id=str(i))[0] for i, p in enumerate(prompts)]
            run_all(engine)
            expect_plain(requests)
            engine.check_idle()


@pytest.mark.parametrize("name", ALL)
def test_padded_and_replayed_steps_bring_the_same_tokens(name: str, drafter: str, events: Counter[str]) -> None:
    """A replay keeps what its first step knew of the host: decoders that say they can be captured must not care."""
    for draw in range(3):
        params = SamplingParams(temperature=0.4 * draw, seed=draw, max_tokens=30)
        prompts = [*PROMPTS, REPEATING]
        for prompt in prompts:
            learn(prompt, params)
        engine = make_engine(decoder=name, draft_tokens=3, draft_model=drafter, async_scheduling=bool(draw))
        pad(engine)
        requests = []
        for i, prompt in enumerate(prompts):  # batches of all sizes, coming and going
            requests += engine.add(prompt, params, request_id=str(i))
            engine.step()
        run_all(engine)
        expect_plain(requests)
        engine.check_idle()
        assert engine.runner.graphs is not None
        if engine.decoders[name].captures(prompts=False):
            events["replays"] += engine.runner.graphs.replays
            assert engine.runner.graphs.replays > 0
        else:
            events["runs of decoders that are not captured"] += 1


def test_a_right_drafter_needs_few_steps_and_a_wrong_one_costs_none() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)
    learn(PROMPTS[1], params)
    steps = {}
    for name in ("autoregressive", "test_always_right", "test_always_wrong"):
        engine = make_engine(decoder=name, draft_tokens=4)
        engine.add(PROMPTS[1], params, request_id="r")
        run_all(engine)
        steps[name] = engine.runner.times.steps
    assert steps == {"autoregressive": 25, "test_always_right": 6, "test_always_wrong": 25}


def test_a_stop_token_inside_the_drafts_ends_the_output() -> None:
    """Drafts that are right go on behind a token that ends the output; what follows it must leave no trace."""
    inside = 0
    for seed in range(12):
        free = SamplingParams(temperature=1.0, max_tokens=30, seed=seed, ignore_eos=True)
        output = learn(PROMPTS[2], free)
        stop = output[3 + seed]
        engine = make_engine(decoder="test_over_long", draft_tokens=6)
        params = SamplingParams(temperature=1.0, max_tokens=30, seed=seed, ignore_eos=True, stop_token_ids=[stop])
        (request,) = engine.add(PROMPTS[2], params, request_id="r")
        run_all(engine)
        expect_plain([request])
        assert request.finish.reason == "stop"
        assert request.stop_reason == stop
        assert len(request.token_logprobs) == len(request.output_ids)
        # One token comes with the prompt, then seven a step.
        inside += (len(request.output_ids) - 1) % 7 != 0
        engine.check_idle()
    assert inside > 3


def test_log_probs_are_those_of_plain_decoding(drafter: str) -> None:
    params = SamplingParams(temperature=0.7, max_tokens=15, seed=2, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    learn(PROMPTS[3], params)
    found = []
    for name in ALL:
        engine = make_engine(decoder=name, draft_tokens=3, draft_model=drafter, max_num_batched_tokens=9)
        (request,) = engine.add(PROMPTS[3], params, request_id="r")
        run_all(engine)
        found.append(request)
    for request in found[1:]:
        assert request.token_logprobs == pytest.approx(found[0].token_logprobs, abs=1e-5)
        assert [list(p) for p in request.top_logprobs] == [list(p) for p in found[0].top_logprobs]
        assert len(request.prompt_logprobs) == len(PROMPTS[3])


def test_the_cache_after_every_commit_is_that_of_plain_decoding(drafter: str) -> None:
    """Keys and values of all committed slots, clocks and history, at equal numbers of committed tokens."""
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=1, ignore_eos=True)
    learn(PROMPTS[2], params)

    def states(name: str) -> dict[int, tuple[list[int], Tensors]]:
        engine = make_engine(decoder=name, draft_tokens=3, draft_model=drafter)
        (request,) = engine.add(PROMPTS[2], params, request_id="r")
        seen = {}
        while engine.has_work:
            engine.step()
            if request.index >= 0:
                n, layers = request.n_done, len(tiny_model().layer_states())
                slots = torch.arange(n, device=engine.device)
                zero_B = torch.zeros_like(engine.table.n_tok)
                place = engine.cache.place(0, zero_B, torch.full_like(slots, request.index), slots)
                pools = [pool.flatten(1, 2)[:, place] for i in range(layers) for pool in engine.cache.layer_pools(i)]
                seen[n] = request.tokens[: n + 1], pools
        return seen

    plain = states("autoregressive")
    for name in ALL:
        found = states(name)
        assert found.keys() <= plain.keys()
        for n, (tokens, pools) in found.items():
            assert tokens == plain[n][0]
            for mine, theirs in zip(pools, plain[n][1], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


Tensors = list[torch.Tensor]


def test_mixed_decoders_share_a_batch(drafter: str, events: Counter[str]) -> None:
    """Law 1 with random decoders a request, chunks, famine, hits and aborts."""
    events.update(dict.fromkeys(["mixed steps", "famine", "chunk", "hit", "accepted", "rejected", "abort", *ALL], 0))

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        rng = random.Random(data.draw(st.integers(0, 2**32)))
        page_size = data.draw(st.sampled_from([1, 2, 4, 16]))
        engine = make_engine(
            decoder=",".join(ALL),
            draft_tokens=data.draw(st.integers(1, 5)),
            draft_model=drafter,
            max_num_batched_tokens=data.draw(st.sampled_from([1, 7, 30, 4096])),
            page_size=page_size,
            num_pages=1 + -(-70 // page_size) + data.draw(st.sampled_from([0, 0, 6, 500])),
            max_model_len=70,
            max_num_seqs=data.draw(st.sampled_from([2, 6])),
        )
        requests, aborted = [], set()
        for i in range(data.draw(st.integers(2, 6))):
            prompt = data.draw(st.sampled_from([*PROMPTS, REPEATING, PROMPTS[3][:12]]))
            params = params_of(data.draw(st.integers(0, 7)), decoder=rng.choice(ALL))
            learn(prompt, params)
            (request,) = engine.add(prompt, params, request_id=str(i))
            requests.append(request)
            events[request.decoder] += 1
            for _ in range(data.draw(st.sampled_from([0, 0, 1, 4]))):
                engine.step()
            if data.draw(st.integers(0, 7)) == 0:
                aborted.add(i)
                engine.abort(str(i))
        for _ in range(10_000):
            if not engine.has_work:
                break
            before = {r.request_id: (r.n_tok, r.drafted) for r in requests if r.index >= 0}
            engine.step()
            events["mixed steps"] += len({r.decoder for r in requests if r.index >= 0}) > 1
            for r in requests:
                known, drafted = before.get(r.request_id, (r.n_tok, 0))
                if drafted and r.n_tok > known:
                    events["accepted"] += r.n_tok - known - 1
                    events["rejected"] += r.n_tok - known - 1 < drafted
        engine.check_idle()
        for i, request in enumerate(requests):
            if i in aborted:
                events["abort"] += 1
                assert tuple(request.output_ids) == alone_of(request)[0][: len(request.output_ids)]
            else:
                expect_plain([request])
        events["famine"] += engine.stats.preemptions
        events["chunk"] += engine.stats.chunks
        events["hit"] += engine.cache.hit_tokens > 0

    run()


def test_bad_choices_are_refused(drafter: str) -> None:
    with pytest.raises(ConfigError, match="needs draft_model"):
        make_engine(decoder="draft_model")
    with pytest.raises(ConfigError, match="draft_tokens is 0; it must be at least 1"):
        make_engine(decoder="ngram", draft_tokens=0)
    with pytest.raises(ConfigError, match="'nope' is not a known decoder"):
        make_engine(decoder="ngram,nope")
    engine = make_engine(decoder="ngram")
    with pytest.raises(
        RequestError, match="decoder='draft_model' is not loaded; this engine has ngram, autoregressive"
    ):
        engine.add(PROMPTS[0], SamplingParams(decoder="draft_model"), request_id="r")
