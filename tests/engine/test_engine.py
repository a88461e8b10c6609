"""What one request can ask of the engine, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import EOS, VOCAB, make_engine, run_all, tiny_model

from headrace.engine.engine import Engine
from headrace.engine.sizing import measure_knee, widest_budget
from headrace.errors import CapacityError, ConfigError, InvariantError, NumericalError, RequestError
from headrace.params import SamplingParams
from headrace.request import Finish, Request, State
from headrace.step import StepContext

PROMPT = [5, 9, 2, 44, 17, 8, 30, 21, 13]


def generate(prompt: list[int] = PROMPT, engine: Engine | None = None, **params: Any) -> Request:
    engine = engine or make_engine()
    (request,) = engine.add(prompt, SamplingParams(**{"ignore_eos": True, **params}), request_id=str(id(params)))
    run_all(engine)
    engine.check_idle()
    return request


def logprobs_after(tokens: list[int]) -> torch.Tensor:
    """Log-probs of the next token, float64, from a separate dense evaluation."""
    engine = make_engine()
    engine.add(tokens, SamplingParams(temperature=0.0, max_tokens=1, logprobs=VOCAB), request_id="x")
    request = engine._waiting[0]
    run_all(engine)
    top = request.top_logprobs[0]
    return torch.tensor([top[v].logprob for v in range(VOCAB)], dtype=torch.float64)


def test_greedy_takes_the_most_probable_token_each_time() -> None:
    request = generate(temperature=0.0, max_tokens=6)
    for i in range(6):
        assert request.output_ids[i] == int(logprobs_after(request.tokens[: len(PROMPT) + i]).argmax())


def test_a_stop_token_is_kept_and_named() -> None:
    free = generate(temperature=0.0, max_tokens=8)
    stop = free.output_ids[3]
    request = generate(temperature=0.0, max_tokens=8, stop_token_ids=[stop])
    end = free.output_ids.index(stop) + 1
    assert request.output_ids == free.output_ids[:end]
    assert (request.finish, request.stop_reason) == (Finish.STOP, stop)


def test_the_models_own_end_token_ends_without_a_stop_reason() -> None:
    free = generate(temperature=0.0, max_tokens=8)
    engine = make_engine(eos_ids=[free.output_ids[2]])
    (request,) = engine.add(PROMPT, SamplingParams(temperature=0.0, max_tokens=8), request_id="r")
    run_all(engine)
    assert request.finish is Finish.STOP
    assert request.stop_reason is None


def test_min_tokens_holds_stop_tokens_off() -> None:
    free = generate(temperature=0.0, max_tokens=8)
    request = generate(temperature=0.0, max_tokens=8, stop_token_ids=[free.output_ids[0]], min_tokens=5)
    assert free.output_ids[0] not in request.output_ids[:5]
    assert len(request.output_ids) >= 5


def test_bias_and_allowed_tokens() -> None:
    assert set(generate(temperature=1.0, max_tokens=6, logit_bias={7: 1000.0}, seed=0).output_ids) == {7}
    assert set(generate(temperature=1.0, max_tokens=20, allowed_token_ids=[4, 6], seed=0).output_ids) == {4, 6}
    assert 7 not in generate(temperature=5.0, max_tokens=60, logit_bias={7: -math.inf}, seed=0).output_ids


def test_penalties_follow_their_formulas() -> None:
    """The greedy token under penalties is the argmax of logits penalised by hand."""
    params = {"repetition_penalty": 1.7, "presence_penalty": 0.9, "frequency_penalty": 0.4}
    request = generate(temperature=0.0, max_tokens=8, **params)
    plain = generate(temperature=0.0, max_tokens=8)
    assert request.output_ids != plain.output_ids
    for i in range(8):
        known = request.tokens[: len(PROMPT) + i]
        logits = raw_logits(known)
        for token in set(known):
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        output = known[len(PROMPT) :]
        for token in set(output):
            logits[token] -= 0.9 + 0.4 * output.count(token)
        assert request.output_ids[i] == int(logits.argmax())


def raw_logits(tokens: list[int]) -> torch.Tensor:
    captured: list[torch.Tensor] = []
    model = tiny_model()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, tok: torch.Tensor, ctx: StepContext, wanted: torch.Tensor | None = None) -> torch.Tensor:
            return model(tok, ctx, wanted)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            captured.append(model.logits(hidden))
            return captured[-1]

    engine = make_engine(model=Spy())
    engine.add(tokens, SamplingParams(temperature=0.0, max_tokens=1), request_id="x")
    run_all(engine)
    return captured[-1][0].clone()


@pytest.mark.parametrize("budget", [1, 3, 4096])
def test_prompt_logprobs_are_teacher_forced_and_independent_of_chunks(budget: int) -> None:
    engine = make_engine(max_num_batched_tokens=budget)
    generate(temperature=0.0, max_tokens=2, engine=engine)  # leaves a prefix in the cache, which must not be used
    request = generate(temperature=0.0, max_tokens=0, prompt_logprobs=2, engine=engine)
    assert request.output_ids == []
    assert request.finish is Finish.LENGTH
    assert request.prompt_logprobs[0] is None
    assert len(request.prompt_logprobs) == len(PROMPT)
    for i in range(1, len(PROMPT)):
        expected = logprobs_after(PROMPT[:i])
        position = request.prompt_logprobs[i]
        assert position is not None
        for token, entry in position.items():
            assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-5)
            assert entry.rank == 1 + int((expected > expected[token]).sum())
        assert PROMPT[i] in position
        assert len(position) in (2, 3)


def test_output_logprobs_hold_the_drawn_token_and_the_top_ones() -> None:
    request = generate(temperature=1.0, max_tokens=5, logprobs=3, seed=3)
    assert len(request.top_logprobs) == len(request.token_logprobs) == 5
    for i, position in enumerate(request.top_logprobs):
        token = request.output_ids[i]
        assert position[token].logprob == pytest.approx(request.token_logprobs[i], abs=1e-5)
        assert {entry.rank for entry in position.values()} >= {1, 2, 3}


def test_keyed_sampling_follows_the_models_distribution() -> None:
    """Chi-square over many seeds, end to end, with and without filters."""
    base = logprobs_after(PROMPT)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({}, torch.softmax(base, 0)),
        ({"top_k": 4}, torch.softmax(base.masked_fill(base < base.topk(4).values[-1], -torch.inf), 0)),
        ({"min_p": 0.1}, torch.softmax(base.masked_fill(base < base.max() + math.log(0.1), -torch.inf), 0)),
    ]
    ranked, order = torch.softmax(base, 0).sort(descending=True)
    kept = order[: int((ranked.cumsum(0) - ranked < 0.8).sum())]
    mask = torch.full_like(base, -torch.inf).index_fill(0, kept, 0.0)
    cases.append(({"top_p": 0.8}, torch.softmax(base + mask, 0)))
    for params, expected in cases:
        draws = 3000
        engine = make_engine(max_num_seqs=64, check_invariants=False)
        samples = engine.add(
            PROMPT, SamplingParams(n=draws, temperature=1.0, max_tokens=1, seed=11, **params), request_id="s"
        )
        run_all(engine)
        counts = torch.bincount(torch.tensor([s.output_ids[0] for s in samples]), minlength=VOCAB).double()
        assert counts[expected == 0].sum() == 0
        pooled = expected * draws >= 5
        observed = torch.cat([counts[pooled], counts[~pooled].sum()[None]])
        wanted = torch.cat([expected[pooled], expected[~pooled].sum()[None]]) * draws
        observed, wanted = observed[wanted > 0], wanted[wanted > 0]
        chi = ((observed - wanted) ** 2 / wanted).sum()
        p_value = 1 - torch.special.gammainc(torch.tensor((len(wanted) - 1) / 2.0).double(), chi / 2)
        assert p_value > 1e-4, params


def test_nan_logits_end_their_request_with_a_typed_error_and_no_other() -> None:
    model = tiny_model()

    class Poisoned:
        """Rows that evaluate token 60 get NaN logits."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, tok: torch.Tensor, ctx: StepContext, wanted: torch.Tensor | None = None) -> torch.Tensor:
            hidden = torch.where((tok == 60)[:, None], torch.nan, model(tok, ctx))
            return hidden if wanted is None else hidden[wanted]

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return model.logits(hidden)

    engine = make_engine(model=Poisoned())
    params = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={60: -math.inf}, ignore_eos=True)
    (good,) = engine.add(PROMPT, params, request_id="good")
    (bad,) = engine.add([*PROMPT, 60], params, request_id="bad")
    run_all(engine)
    engine.check_idle()
    assert bad.finish is Finish.ERROR
    assert isinstance(bad.error, NumericalError)
    assert "NaN" in str(bad.error)
    assert good.output_ids == generate(temperature=0.0, max_tokens=6, logit_bias={60: -math.inf}).output_ids


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([VOCAB], {}, f"token id {VOCAB}; the model's vocabulary has {VOCAB} tokens"),
        ([-1], {}, "token id -1"),
        ([1] * 96, {}, "the prompt has 96 tokens; at most 95 leave room"),
        ([1], {"stop_token_ids": [VOCAB]}, f"stop_token_ids has token id {VOCAB}"),
        ([1], {"logit_bias": {99: 1.0}}, "logit_bias has token id 99"),
        ([1], {"stop_token_ids": list(range(40))}, "at most 32"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(prompt: list[int], params: Any, message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, SamplingParams(**params), request_id="r")
    engine.check_idle()
    assert not engine.has_work


def test_truncation_keeps_the_end() -> None:
    request = generate([1] * 200 + PROMPT, temperature=0.0, max_tokens=4, truncate_prompt_tokens=len(PROMPT))
    assert request.tokens[: request.prompt_len] == PROMPT
    assert request.output_ids == generate(temperature=0.0, max_tokens=4).output_ids


def test_a_request_id_cannot_be_used_twice_at_once() -> None:
    engine = make_engine()
    engine.add(PROMPT, SamplingParams(), request_id="r")
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add(PROMPT, SamplingParams(), request_id="r")
    engine.abort("r")
    engine.abort("never heard of")
    engine.check_idle()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 97}, ConfigError, "max_model_len is 97; the model holds 96"),
        ({"max_model_len": 90, "num_pages": 8}, ConfigError, "the cache of 8 pages holds 28 tokens"),
        ({"num_pages": None, "kv_cache_gib": 1e6}, CapacityError, "lower it"),
        ({"num_pages": None, "kv_cache_gib": 1e-9}, CapacityError, "hold no page"),
        ({"scheduler": "fastest"}, ConfigError, "scheduler='fastest' is not a known scheduler; known: splitfuse"),
        ({"decoder": "psychic"}, ConfigError, "decoder='psychic' is not a known decoder; known: autoregressive"),
        ({"page_size": 0}, ConfigError, "page_size is 0; it must be at least 1"),
        ({"gpu_memory_utilization": 1.5}, ConfigError, "gpu_memory_utilization is 1.5"),
        ({"kv_cache_gib": 1.0}, ConfigError, "give one of them"),
        ({"dtype": "int3"}, ConfigError, "dtype is 'int3'; choose from"),
    ],
)
def test_options_that_cannot_work_are_refused_at_start(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_engine(**options)


def test_the_budget_is_chosen_from_measured_step_times() -> None:
    engine = make_engine(max_num_batched_tokens=None)
    assert engine.budget in engine.step_times_s
    best = max(rows / seconds for rows, seconds in engine.step_times_s.items())
    assert engine.budget / engine.step_times_s[engine.budget] >= 0.9 * best


def test_steps_are_timed_until_one_is_slow_and_the_fewest_rows_of_about_the_best_rate_are_taken() -> None:
    def seconds(rows: int) -> float:
        return 0.01 + rows / 20_000

    knee, measured = measure_knee(seconds, 10_000, first=256)
    assert list(measured) == [256, 512, 1024, 2048, 4096]  # twice as many would take more than a quarter of a second
    assert knee == 2048  # 96 % of the best rate
    assert measure_knee(lambda rows: 0.01, 100, first=256) == (100, {100: 0.01})
    assert measure_knee(lambda rows: rows / 1000, 5000)[0] == 16


def test_the_widest_budget_is_that_of_a_quarter_of_a_second() -> None:
    timed: list[int] = []

    def seconds(rows: int) -> float:
        timed.append(rows)
        return rows / 40_000

    assert widest_budget(seconds, 8192) == (8192, {1024: 1024 / 40_000})
    assert widest_budget(lambda rows: rows / 20_000, 8192)[0] == 4096
    assert widest_budget(lambda rows: rows / 1000, 8192)[0] == 1024
    assert widest_budget(seconds, 300)[0] == 300
    assert widest_budget(seconds, 3000)[0] == 3000
    assert timed == [1024, 300, 1024]


def test_audits_notice_what_is_out_of_balance() -> None:
    engine = make_engine(check_invariants=False)
    (request,) = engine.add(PROMPT, SamplingParams(max_tokens=5), request_id="r")
    engine.step()
    engine.audit()
    leaked = engine.cache.pools[0].take()
    with pytest.raises(InvariantError, match=f"page {leaked} "):
        engine.audit()
    engine.cache.pools[0].drop(leaked, keep=False)
    request.n_done += 1
    with pytest.raises(InvariantError, match="clocks"):
        engine.audit()
    request.n_done -= 1
    with pytest.raises(InvariantError, match="no move from running to waiting"):
        request.move(State.WAITING)


def test_a_prefix_hit_skips_work_and_changes_nothing() -> None:
    engine = make_engine()
    first = generate(temperature=0.0, max_tokens=6, engine=engine)
    rows = engine.runner.times.rows
    second = generate(temperature=0.0, max_tokens=6, engine=engine)
    assert second.hit_tokens == 8
    assert engine.runner.times.rows - rows == rows - 8
    assert second.output_ids == first.output_ids
    engine.cache.drop_idle()
    assert generate(temperature=0.0, max_tokens=6, engine=engine).hit_tokens == 0


def test_eos_is_a_token_like_any_other_when_ignored() -> None:
    request = generate(temperature=0.0, max_tokens=4, logit_bias={EOS: 1000.0})
    assert request.output_ids == [EOS] * 4


def test_warming_up_leaves_no_trace() -> None:
    engine = make_engine()
    for name in ("n_tok", "n_done", "finish"):
        assert not getattr(engine.table, name).any()
    assert engine.runner.times.steps == 0
    engine.check_idle()
