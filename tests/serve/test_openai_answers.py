"""Outputs to answers and chunks: shapes of OpenAI's API, tool calls divided from text, and streams that add up."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import (
    EngineDeadError,
    HeadraceError,
    NumericalError,
    QueueFullError,
    RequestError,
    ToolCallError,
    UnknownModelError,
)
from headrace.llm import BUNDLED_MODEL
from headrace.openai_api import Chunks, Work, answer, error_body, parse, status_of
from headrace.openai_api.calls import CallFilter
from headrace.openai_api.chunks import DONE
from headrace.outputs import CompletionOutput, RequestMetrics, RequestOutput
from headrace.params import SamplingParams
from headrace.request import Logprob, PositionLogprobs
from headrace.text.tokenizer import Tokenizer
from headrace.text.tools import TOOL_FORMATS, ToolCall

WHO: dict[str, Any] = {"request_id": "cmpl-1", "created": 5, "model": "m"}
CALL = '{"name": "add", "arguments": {"a": 1, "s": "x</tool_call>y"}}'


@dataclass
class Piece:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: HeadraceError | None = None


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(BUNDLED_MODEL)


def output(
    tokenizer: Tokenizer, texts: list[str], prompt: str = "def", reason: str = "stop", logprobs: bool = False
) -> RequestOutput:
    samples = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        named = [named_position(tokenizer, token) for token in ids] if logprobs else None
        samples.append(CompletionOutput(index, text, ids, None, named, reason))
    ids = tokenizer.encode(prompt)
    first: list[PositionLogprobs | None] = [None, *(named_position(tokenizer, token) for token in ids[1:])]
    metrics = RequestMetrics(0.0, 0.1, 0.2, cached_tokens=1)
    return RequestOutput("r", prompt, ids, first if logprobs else None, samples, True, 7, metrics)


def named_position(tokenizer: Tokenizer, token: int) -> PositionLogprobs:
    return {
        token: Logprob(-0.5, 1, tokenizer.decode([token], skip_special_tokens=False)),
        3: Logprob(float("-inf"), 2, tokenizer.decode([3], skip_special_tokens=False)),
    }


def test_completions_of_several_prompts_and_samples(tokenizer: Tokenizer) -> None:
    work = parse("completions", {"prompt": ["def", "def"], "n": 2, "echo": True, "return_token_ids": True}, tokenizer)
    outputs = [output(tokenizer, [" a", " b"]), output(tokenizer, [" c", " d"], reason="length")]
    body = answer(work, outputs, **WHO)
    assert [choice["text"] for choice in body["choices"]] == ["def a", "def b", "def c", "def d"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "stop", "length", "length"]
    assert body["choices"][0]["seed"] == 7
    assert body["choices"][0]["token_ids"] == outputs[0].outputs[0].token_ids
    n_prompt = sum(len(one.prompt_token_ids) for one in outputs)
    assert body["usage"]["prompt_tokens"] == n_prompt
    assert body["usage"]["total_tokens"] == n_prompt + sum(len(s.token_ids) for o in outputs for s in o.outputs)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    json.dumps(body, allow_nan=False)


def test_log_probs_of_completions_and_their_prompt(tokenizer: Tokenizer) -> None:
    work = parse("completions", {"prompt": "def", "echo": True, "logprobs": 1}, tokenizer)
    made = answer(work, [output(tokenizer, [" a b"], logprobs=True)], **WHO)["choices"][0]
    found = made["logprobs"]
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][-1] == -0.5
    assert -9999.0 in found["top_logprobs"][-1].values()
    lengths = {len(values) for values in found.values()}
    assert len(lengths) == 1
    assert found["text_offset"][0] == 0
    assert found["text_offset"] == sorted(found["text_offset"])


def test_log_probs_of_chats_have_bytes(tokenizer: Tokenizer) -> None:
    work = Work("chat", None, [{}], SamplingParams(logprobs=2), tokenizer=tokenizer, top_logprobs=1)
    made = answer(work, [output(tokenizer, ["é = 1"], logprobs=True)], **WHO)["choices"][0]
    entries = made["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "é = 1"
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)


def test_a_failed_sample_raises_its_error(tokenizer: Tokenizer) -> None:
    one = output(tokenizer, ["a"], reason="error")
    one.outputs[0].error = NumericalError("nothing finite")
    with pytest.raises(NumericalError):
        answer(parse("completions", {"prompt": "a"}, tokenizer), [one], **WHO)


def test_calls_become_tool_calls(tokenizer: Tokenizer) -> None:
    work = Work("chat", None, [{}], SamplingParams(), tokenizer=tokenizer, tools=TOOL_FORMATS["hermes"].make())
    text = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>"
    choice = answer(work, [output(tokenizer, [text])], **WHO)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    calls = choice["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"])["s"] for call in calls] == ["x</tool_call>y"] * 2
    assert len({call["id"] for call in calls}) == 2
    cut = answer(work, [output(tokenizer, [text[:60]], reason="length")], **WHO)["choices"][0]
    assert cut["finish_reason"] == "length"
    assert "max_tokens" in cut["tool_call_error"]
    assert cut["message"]["content"] == "Let me see."


TEXTS = {
    "hermes": f"Hello <b\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call> bye ",
    "llama3_json": 'Hello {"nam \n{"name": "add", "parameters": {"a": 1}}',
    "mistral": 'Hi [TOOL \n[TOOL_CALLS] [{"name": "add", "arguments": {}}, {"name": "add", "arguments": {"b": "["}}]',
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, 200), max_size=30))
@pytest.mark.parametrize("name", sorted(TEXTS))
def test_how_the_text_is_cut_never_matters(name: str, cuts: list[int]) -> None:
    text = TEXTS[name]
    whole = CallFilter(TOOL_FORMATS[name].make(), None)
    expected = join(whole.push(text) + whole.finish())
    assert whole.n_calls == {"hermes": 2, "llama3_json": 1, "mistral": 2}[name]
    cut = CallFilter(TOOL_FORMATS[name].make(), None)
    found: list[str | ToolCall] = []
    places = sorted({0, len(text), *(place % len(text) for place in cuts)})
    for start, end in itertools.pairwise(places):
        found += cut.push(text[start:end])
    assert join(found + cut.finish()) == expected
    shown = "".join(part for part in expected if isinstance(part, str))
    assert "tool_call" not in shown
    assert "TOOL_CALLS" not in shown
    assert whole.error is cut.error is None


def join(parts: list[str | ToolCall]) -> list[str | ToolCall]:
    """Neighbouring texts as one."""
    made: list[str | ToolCall] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        else:
            made.append(part)
    return made


def events(data: bytes) -> list[dict[str, Any]]:
    lines = data.decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_chunks_add_up_to_the_answer(tokenizer: Tokenizer) -> None:
    work = parse("completions", {"prompt": ["a", "b"], "n": 2, "stream": True, "logprobs": 1}, tokenizer)
    work.include_usage = True
    chunks = Chunks(work, **WHO)
    ids = tokenizer.encode("x = 1", add_special_tokens=False)
    data = b"".join(
        chunks.piece(1, Piece(1, tokenizer.decode([token]), [token], [named_position(tokenizer, token)]))
        for token in ids
    )
    data += chunks.piece(1, Piece(1, "", [], None, "length"), seed=4)
    made = events(data)
    assert {event["choices"][0]["index"] for event in made} == {3}
    assert "".join(event["choices"][0]["text"] for event in made) == "x = 1"
    offsets = [event["choices"][0]["logprobs"]["text_offset"][0] for event in made[:-1]]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert made[-1]["choices"][0]["finish_reason"] == "length"
    assert made[-1]["choices"][0]["seed"] == 4
    assert all(event["usage"] is None for event in made)
    assert events(chunks.usage(3, 4, 1))[0]["usage"]["total_tokens"] == 7
    assert DONE.endswith(b"\n\n")


def test_chunks_of_calls(tokenizer: Tokenizer) -> None:
    work = Work("chat", None, [{}], SamplingParams(), tokenizer=tokenizer, tools=TOOL_FORMATS["hermes"].make())
    chunks = Chunks(work, **WHO)
    text = TEXTS["hermes"]
    data = chunks.opening(0) + b"".join(chunks.piece(0, Piece(0, letter, [1])) for letter in text)
    made = events(data + chunks.piece(0, Piece(0, "", [2], None, "stop")))
    assert made[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in made]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert [call["index"] for call in calls] == [0, 1]
    whole = answer(work, [output(tokenizer, [text])], **WHO)["choices"][0]["message"]
    assert [{k: v for k, v in call.items() if k != "index"} for call in calls] == whole["tool_calls"]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"]
    assert made[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (RequestError("max_tokens is -1; it must be at least 0"), 400, "max_tokens"),
        (RequestError("messages[0].content is 3"), 400, "messages"),
        (RequestError("the body is empty"), 400, None),
        (UnknownModelError("model is 'x'"), 404, "model"),
        (QueueFullError("full"), 429, None),
        (EngineDeadError("dead"), 503, None),
        (ToolCallError("odd"), 500, None),
        (KeyError("secret"), 500, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_as_openai_writes_them(error: Exception, status: int, param: str | None) -> None:
    assert status_of(error) == status
    body = error_body(error)["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["param"] == param
    assert "secret" not in body["message"]
