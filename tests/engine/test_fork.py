"""Samples of one prompt share its cache: the prompt is evaluated once, and no sample ever writes what another reads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, alone, examples, make_engine, run_all

from headrace.params import SamplingParams
from headrace.request import Request

PROMPT = tuple((11 * i + 4) % VOCAB for i in range(22))


def expect_alone(samples: list[Request]) -> None:
    """Sample i of n is what sample i is when every sample evaluates the prompt for itself."""
    params = replace(samples[0].params, decoder=None)
    for request in samples:
        engine = make_engine(enable_prefix_caching=False, max_num_seqs=1)
        own = engine.add(request.tokens[: request.prompt_len], params, request_id="own")
        for other in own:
            other.parent = None
        run_all(engine)
        assert request.output_ids == own[request.sample].output_ids


@pytest.mark.parametrize("caching", [True, False])
def test_the_prompt_is_evaluated_once(caching: bool) -> None:
    params = SamplingParams(n=5, temperature=0.9, max_tokens=6, seed=1, ignore_eos=True)
    engine = make_engine(enable_prefix_caching=caching)
    rows = engine.runner.times.rows
    samples = engine.add(PROMPT, params, request_id="r")
    run_all(engine)
    assert engine.stats.forks == 4
    # The prompt once, its last token again for four samples, and five rows for the tokens after the first.
    assert engine.runner.times.rows - rows == len(PROMPT) + 4 + 5 * 5
    expect_alone(samples)
    assert len({tuple(s.output_ids) for s in samples}) == 5
    engine.check_idle()


def test_pages_are_shared_while_the_samples_run() -> None:
    params = SamplingParams(n=4, temperature=0.9, max_tokens=4, seed=1, ignore_eos=True)
    engine = make_engine(page_size=4)
    samples = engine.add(PROMPT, params, request_id="r")
    engine.step()
    engine.step()
    whole = (len(PROMPT) - 1) // 4
    shared = samples[0].pages[0][:whole]
    assert all(sample.pages[0][:whole] == shared for sample in samples)
    rest = [tuple(sample.pages[0][whole:]) for sample in samples]
    assert len(set(rest)) == 4
    assert [engine.cache.pools[0].references()[page] for page in shared] == [4] * whole
    run_all(engine)
    engine.check_idle()


def test_prompt_log_probs_are_made_by_every_sample() -> None:
    params = SamplingParams(n=2, temperature=0.9, max_tokens=3, seed=1, prompt_logprobs=0)
    engine = make_engine()
    samples = engine.add(PROMPT, params, request_id="r")
    run_all(engine)
    assert engine.stats.forks == 0
    assert [len(s.prompt_logprobs) for s in samples] == [len(PROMPT)] * 2


def test_forks_change_no_token(events: Counter[str]) -> None:
    """Random prompts, budgets, page sizes and famine, with aborts of whole groups, plain and speculating."""
    events.update(dict.fromkeys(["fork", "famine", "abort", "short prompt", "ngram"], 0))

    @settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        page_size = data.draw(st.sampled_from([1, 2, 4, 16]))
        engine = make_engine(
            decoder="autoregressive,ngram",
            max_num_batched_tokens=data.draw(st.sampled_from([1, 5, 4096])),
            page_size=page_size,
            num_pages=1 + -(-48 // page_size) + data.draw(st.sampled_from([0, 0, 1, 500])),
            max_model_len=48,
            max_num_seqs=data.draw(st.sampled_from([2, 7])),
            enable_prefix_caching=data.draw(st.booleans()),
        )
        groups, aborted = [], set()
        for i in range(data.draw(st.integers(1, 3))):
            prompt = PROMPT[: data.draw(st.integers(1, len(PROMPT)))]
            decoder = data.draw(st.sampled_from([None, "ngram"]))
            params = SamplingParams(
                n=data.draw(st.integers(1, 4)),
                temperature=0.8,
                max_tokens=data.draw(st.integers(1, 26)),
                seed=i,
                decoder=decoder,
            )
            groups.append(engine.add(prompt, params, request_id=str(i)))
            events["short prompt"] += len(prompt) < 3
            events["ngram"] += decoder == "ngram"
            for _ in range(data.draw(st.sampled_from([0, 1, 5]))):
                engine.step()
            if data.draw(st.integers(0, 5)) == 0:
                engine.abort(str(i))
                aborted.add(i)
        run_all(engine)
        engine.check_idle()
        events["fork"] += engine.stats.forks
        events["famine"] += engine.stats.preemptions
        events["abort"] += len(aborted)
        for i, group in enumerate(groups):
            for request in group:
                one = {**request.params.to_dict(), "n": 1, "decoder": None}
                if i not in aborted and request.sample == 0:
                    tokens = alone(tuple(request.tokens[: request.prompt_len]), json.dumps(one))[0]
                    assert tuple(request.output_ids) == tokens
            if i not in aborted:
                expect_alone(group)

    run()
