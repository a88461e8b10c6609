"""Constraints through the engine: what they let through, what is refused, and what becomes of the matchers."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import pytest
import torch
from tiny import EOS, SPELLINGS, VOCAB, make_engine, run_all, tiny_model
from walker import constraints

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import NumericalError, RequestError
from headrace.params import CONSTRAINTS
from headrace.sampling.constraints import Constraints

PROMPT = "def area(width, height):\n"
REGEXES = [
    r"[a-z]{3}-\d{2,4}",
    r"(yes|no)( sir)?",
    r"\([0-9]{3}\) [0-9]{3}-[0-9]{4}",
    r"é+\.(py|txt)",
    r"[^a-z]{4}",
    r"^ab?c$",
]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}


def part_of(engine: Engine) -> Constraints:
    return next(p for p in engine.processors if isinstance(p, Constraints))


def test_regex_choice_and_grammar(llm: LLM) -> None:
    params = [
        SamplingParams(regex=regex, temperature=t, seed=seed, max_tokens=64)
        for regex in REGEXES
        for t in (0.0, 1.0)
        for seed in range(3)
    ]
    for one, output in zip(params, llm.generate([PROMPT] * len(params), params), strict=True):
        (sample,) = output.outputs
        if sample.finish_reason == "length":
            assert "+" in str(one.regex)
            continue
        assert sample.finish_reason == "stop"
        assert re.fullmatch(str(one.regex), sample.text), (one.regex, sample.text)
    choice = ["red", "green", "dark green", 'a "quoted" one', "ü\n"]
    params = [SamplingParams(choice=choice, temperature=2.0, seed=seed, max_tokens=32) for seed in range(24)]
    texts = [o.outputs[0].text for o in llm.generate([PROMPT] * len(params), params)]
    assert set(texts) <= set(choice)
    assert len(set(texts)) > 1
    grammar = 'root ::= "f(" list ")"\nlist ::= item | item ", " list\nitem ::= [0-9] | "[" list "]"'
    params = [SamplingParams(grammar=grammar, temperature=1.0, seed=seed, max_tokens=120) for seed in range(8)]
    ended = [o.outputs[0].text for o in llm.generate([PROMPT] * 8, params) if o.outputs[0].finish_reason == "stop"]
    assert ended
    for text in ended:
        assert text.startswith("f(")
        json.loads(f"[{text[2:-1]}]")
    llm.engine.check_idle()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_at_most_one_at_a_time(name: str) -> None:
    values: dict[str, Any] = {
        "json_schema": True, "regex": "a", "grammar": 'root ::= "a"', "choice": ["a"], "structural_tag": {"type": "x"}
    }  # fmt: skip
    for other in CONSTRAINTS:
        if other != name:
            with pytest.raises(RequestError, match=f"{name}|{other}"):
                SamplingParams(**{name: values[name], other: values[other]})
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(**{name: values[name]}, min_tokens=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"regex": "("}, "regex is not understood"),
        ({"regex": "a$b"}, "'\\$' in the middle"),
        ({"regex": r"\bword"}, "word boundary"),
        ({"regex": "a(?!b)"}, "look-ahead"),
        ({"regex": r"\Aab"}, r"'\\A'"),
        ({"grammar": "root ::= nothing"}, 'Rule "nothing" is not defined'),
        ({"json_schema": "{"}, "no JSON"),
        ({"structural_tag": "{}"}, "structural_tag is not understood"),
        ({"choice": ["a"], "ignore_eos": True}, "stop_token_ids"),
    ],
)
def test_refusals_name_the_reason(llm: LLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(PROMPT, SamplingParams(**given))
    llm.engine.check_idle()


@pytest.mark.parametrize("given", [{"choice": []}, {"choice": [""]}, {"choice": "a"}, {"regex": ""}, {"grammar": 3}])
def test_values_of_the_wrong_kind(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(given))):
        SamplingParams(**given)


def test_without_tokenizer_or_library(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(num_pages=64, max_num_batched_tokens=64, max_num_seqs=2, page_size=4, device="cpu")
    bare = Engine(config, tiny_model(), eos_ids=[EOS])
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        bare.add([5], SamplingParams(regex="a"), request_id="0")
    engine = make_engine()
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with pytest.raises(RequestError, match=r"headrace\[constraints\]"):
        engine.add([5], SamplingParams(regex="a"), request_id="0")
    engine.check_idle()


def test_a_wider_vocabulary_of_the_model_is_masked() -> None:
    """Ids behind the tokenizer's last are never drawn, though nothing else forbids them."""
    part = constraints(SPELLINGS[:50], vocab_size=VOCAB + 70)
    params = SamplingParams(regex="[a-z]{20}")
    part.prepare(params, [EOS])
    mask = torch.zeros(1, -(-(VOCAB + 70) // 32), dtype=torch.int32)
    part._matcher(params, [EOS]).fill_next_token_bitmask(mask)
    allowed = {32 * i + j for i, word in enumerate(mask[0].tolist()) for j in range(32) if word >> j & 1}
    assert {i for i in allowed if i < VOCAB + 70} == {i for i, text in enumerate(SPELLINGS[:50]) if text.isalpha()}


@pytest.mark.parametrize("params", [SamplingParams(regex="[^0]{9}"), SamplingParams(json_schema={"type": "string"})])
def test_special_tokens_are_no_text(params: SamplingParams) -> None:
    part = constraints(SPELLINGS)
    matcher = part._matcher(params, [EOS])
    mask = torch.zeros(1, -(-VOCAB // 32), dtype=torch.int32)
    assert matcher.accept_token(SPELLINGS.index(b'"'))
    matcher.fill_next_token_bitmask(mask)
    word = int(mask[0, 0])
    assert not word & 0b1111
    assert word >> SPELLINGS.index(b"a") & 1


def test_parameters_that_leave_nothing_end_the_request_alone() -> None:
    engine = make_engine()
    letter = SPELLINGS.index(b"a")
    (broken,) = engine.add([5, 6], SamplingParams(regex="b{9}", allowed_token_ids=[letter]), request_id="broken")
    (other,) = engine.add([5, 6], SamplingParams(regex="a{9}", allowed_token_ids=[letter, EOS]), request_id="other")
    run_all(engine)
    assert isinstance(broken.error, NumericalError)
    assert other.output_ids == [letter] * 9 + [EOS]
    engine.check_idle()


def test_stop_tokens_and_stop_strings(llm: LLM) -> None:
    """A stop token of the caller's is drawn where the grammar may end; a stop string cuts where it appears."""
    assert llm.tokenizer is not None
    stop = llm.tokenizer.encode("#", add_special_tokens=False)[0]
    params = SamplingParams(regex="[0-9]{3}", ignore_eos=True, stop_token_ids=[stop], max_tokens=9, seed=1)
    (sample,) = llm.generate(PROMPT, params)[0].outputs
    assert (sample.stop_reason, sample.token_ids[-1]) == (stop, stop)
    (sample,) = llm.generate(PROMPT, SamplingParams(regex="[0-9]{3}abc", stop="ab", max_tokens=9, seed=1))[0].outputs
    assert (sample.stop_reason, len(sample.text)) == ("ab", 3)


def test_matchers_go_with_their_requests() -> None:
    engine = make_engine(num_pages=24, max_num_seqs=3)
    params = SamplingParams(regex="[a-f]{40}", max_tokens=60, n=2, seed=4, temperature=1.0)
    for i in range(4):
        engine.add([5 + i] * 9, params, request_id=str(i))
    most = 0
    for _ in range(12):
        engine.step()
        most = max(most, len(part_of(engine)._trials))
        assert set(part_of(engine)._trials) == {r.index for r in engine.running}
    engine.abort("1")
    run_all(engine)
    assert most == 3
    assert engine.stats.preemptions
    assert not part_of(engine)._trials
    engine.check_idle()


def test_records_carry_the_constraint() -> None:
    params = SamplingParams(json_schema=SCHEMA, max_tokens=60, seed=4, temperature=1.0)
    engine, other = make_engine(), make_engine()
    (whole,) = engine.add([9, 8, 7], params, request_id="whole")
    run_all(engine)
    (request,) = engine.add([9, 8, 7], params, request_id="0")
    for _ in range(4):
        engine.step()
    record = json.loads(json.dumps(engine.export(request)))
    resumed = other.resume(record)
    run_all(other)
    assert resumed.output_ids == whole.output_ids
    assert json.loads(b"".join(SPELLINGS[t] for t in resumed.output_ids)) in ({"a": 1}, {"a": 22})
    record["tokens"][-1] = SPELLINGS.index(b"z")
    with pytest.raises(RequestError, match="does not keep to its json_schema"):
        other.resume(record)
    other.check_idle()


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    params = SamplingParams(json_schema=SCHEMA, max_tokens=30, n=3)
    engine.prepare(params)
    calls: list[str] = []
    import headrace.sampling.constraints as module

    made = module._COMPILE["json_schema"]
    monkeypatch.setitem(module._COMPILE, "json_schema", lambda c, v: (calls.append("x"), made(c, v))[1])
    for i in range(3):
        engine.add([5], params, request_id=str(i))
    run_all(engine)
    assert not calls
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    for regex in ("a", "b"):
        engine.prepare(SamplingParams(regex=regex))
    engine.prepare(params)
    assert calls, "grammars beyond the limit are forgotten, and compiled again"


def test_async_outputs_are_those_of_the_batch() -> None:
    llm = LLM(device="cpu", kv_cache_gib=0.1, max_num_batched_tokens=64, max_num_seqs=8)
    params = [SamplingParams(regex=r"[a-z]{4}=\d{3}", seed=i, max_tokens=40) for i in range(4)]
    expected = [o.outputs[0].token_ids for o in llm.generate([PROMPT] * 4, params)]

    async def one(engine: AsyncLLM, given: SamplingParams) -> list[int]:
        tokens: list[int] = []
        async for output in engine.generate(PROMPT, given):
            tokens = output.outputs[0].token_ids
        return tokens

    async def run() -> list[list[int]]:
        async with AsyncLLM(front=llm.front) as engine:
            with pytest.raises(RequestError, match="regex is not understood"):
                await one(engine, SamplingParams(regex="("))
            return list(await asyncio.gather(*(one(engine, p) for p in params)))

    assert asyncio.run(run()) == expected
