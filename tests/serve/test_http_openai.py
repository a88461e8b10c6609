"""The openai client against a live server: what it gets is what the model gives offline."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import jsonschema
import openai
import pytest
from live import TEMPLATE, Live

from headrace import LLM, SamplingParams
from headrace.text.chat import ChatTemplates

PROMPTS = ["def fibonacci(n):\n", "import os\n\n\ndef walk(path):\n    ", "class Stack:\n    def __init__(self):\n"]
MODEL = "headrace-py-16m"
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "boolean"}, "unit": {"enum": ["C", "F"]}},
                "required": ["a", "unit"],
                "additionalProperties": False,
            },
        },
    }
]
HELLO: list[Any] = [{"role": "user", "content": "write a sort"}]


@pytest.fixture(scope="module")
def client(server: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


def chat_offline(llm: LLM, messages: list[Any], params: SamplingParams) -> Any:
    assert llm.tokenizer is not None
    llm.tokenizer.chat_templates = ChatTemplates({"default": TEMPLATE}, llm.tokenizer.special_tokens, "the test")
    return llm.chat(messages, params)[0]


def test_completions_equal_offline(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(n=2, temperature=0.8, top_p=0.9, max_tokens=24, seed=5, logprobs=2, stop=["return"])
    expected = offline.generate(PROMPTS, params)
    made = client.completions.create(
        model=MODEL, prompt=PROMPTS, n=2, temperature=0.8, top_p=0.9, max_tokens=24, seed=5, logprobs=2, stop=["return"]
    )
    samples = [sample for output in expected for sample in output.outputs]
    assert [choice.text for choice in made.choices] == [sample.text for sample in samples]
    assert [choice.finish_reason for choice in made.choices] == [sample.finish_reason for sample in samples]
    for choice, sample in zip(made.choices, samples, strict=True):
        drawn = [p[token].logprob for token, p in zip(sample.token_ids, sample.logprobs or [], strict=True)]
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(drawn, abs=1e-4)
    assert made.usage is not None
    assert made.usage.completion_tokens == sum(len(sample.token_ids) for sample in samples)
    assert made.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)


def test_streams_equal_offline(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, max_tokens=30, seed=9)
    expected = [sample for output in offline.generate(PROMPTS, params) for sample in output.outputs]
    texts: Counter[int] = Counter()
    found: dict[int, str] = {}
    usage = None
    for chunk in client.completions.create(
        model=MODEL,
        prompt=PROMPTS,
        n=2,
        max_tokens=30,
        seed=9,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + choice.text
            texts[choice.index] += 1
    assert [found[index] for index in range(6)] == [sample.text for sample in expected]
    assert usage is not None
    assert usage.completion_tokens == sum(len(sample.token_ids) for sample in expected)
    assert max(texts.values()) > 2, "nothing was streamed"


def test_token_ids_and_echo(client: openai.OpenAI, offline: LLM) -> None:
    ids = offline.front.encode(PROMPTS[0])[0]
    expected = offline.generate([ids], SamplingParams(temperature=0.0, max_tokens=5))[0].outputs[0].text
    made = client.completions.create(model=MODEL, prompt=ids, temperature=0, max_tokens=5, echo=True, logprobs=0)
    assert made.choices[0].text == PROMPTS[0] + expected
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.token_logprobs is not None
    assert len(made.choices[0].logprobs.token_logprobs) == len(ids) + 5
    pure = client.completions.create(model=MODEL, prompt=[ids, ids], temperature=0, max_tokens=5)
    assert [choice.text for choice in pure.choices] == [expected, expected]


def test_chats_equal_offline(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(temperature=0.7, max_tokens=20, seed=2, logprobs=3)
    expected = chat_offline(offline, HELLO, params).outputs[0]
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0.7, "seed": 2, "max_tokens": 20}
    made = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0]
    assert made.message.content == expected.text
    assert made.logprobs is not None
    assert made.logprobs.content is not None
    assert [entry.logprob for entry in made.logprobs.content] == pytest.approx(
        [p[token].logprob for token, p in zip(expected.token_ids, expected.logprobs, strict=True)], abs=1e-4
    )
    assert all(len(entry.top_logprobs) == 3 for entry in made.logprobs.content)
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected.text


def test_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    made = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=60,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    jsonschema.validate(json.loads(made.choices[0].message.content or ""), schema)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=["any", "named"]
)
def test_tool_calls(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 80,
        "seed": 4,
    }
    made = client.chat.completions.create(**asked).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.tool_calls is not None
    call = made.message.tool_calls[0]
    arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
    jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])
    assert made.message.content is None
    streamed = list(client.chat.completions.create(**asked, stream=True))
    calls = [call for chunk in streamed for call in chunk.choices[0].delta.tool_calls or []]
    assert [json.loads(call.function.arguments or "") for call in calls if call.function] == [arguments]
    assert not any("tool_call" in (chunk.choices[0].delta.content or "") for chunk in streamed)
    assert streamed[-1].choices[0].finish_reason == "tool_calls"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="did you mean 'max_tokens'"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"max_tokns": 3})
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=MODEL, prompt=[5] * 4000)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=MODEL, prompt=[10**7])
    with pytest.raises(openai.BadRequestError, match="regex"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"regex": "("})
    with pytest.raises(openai.BadRequestError, match="vocabulary"):  # also for a stream: before its first byte
        client.completions.create(model=MODEL, prompt=[10**7], stream=True)


def test_a_deadline_ends_a_request(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt="a", max_tokens=2000, extra_body={"deadline_s": 0.2, "ignore_eos": True}
    )
    assert str(made.choices[0].finish_reason) == "timeout"
    assert made.usage is not None
    assert 0 < made.usage.completion_tokens < 2000


def test_many_at_a_time(server: Live, offline: LLM) -> None:
    """64 clients at once, streams and whole answers: all as offline."""
    seeds = list(range(64))
    expected = [
        output.outputs[0].text
        for output in offline.generate(
            [PROMPTS[seed % 3] for seed in seeds], [SamplingParams(max_tokens=12, seed=seed) for seed in seeds]
        )
    ]

    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPTS[seed % 3], "max_tokens": 12, "seed": seed}
        if seed % 2:
            return (await client.completions.create(**asked)).choices[0].text
        return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**asked, stream=True)])

    async def play() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in seeds))

    assert asyncio.run(asyncio.wait_for(play(), 60)) == expected
