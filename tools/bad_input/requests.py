"""What a request can have wrong, by its prompt, its parameters, its chat, its record, or the moment it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

from headrace import AsyncLLM, SamplingParams
from headrace.errors import (
    ConfigError,
    EngineDeadError,
    HeadraceError,
    NumericalError,
    QueueFullError,
    RequestError,
)
from headrace.request import Request
from tools.bad_input.bench import INF, NAN, NAN_TOKEN, VOCAB, Bench
from tools.bad_input.cases import Case


def _params(name: str, error: type[HeadraceError] = RequestError, **given: Any) -> Case:
    return Case(name, error, lambda b: b.generate(**given))


def _prompt(name: str, prompt: Any) -> Case:
    return Case(name, RequestError, lambda b: b.generate(prompt))


def _record(name: str, **changes: Any) -> Case:
    return Case(name, RequestError, lambda b: b.llm.engine.resume(b.record(**changes)))


def _chat(name: str, messages: Any) -> Case:
    return Case(name, RequestError, lambda b: b.llm.chat(messages, SamplingParams(max_tokens=2)))


def _async(name: str, error: type[HeadraceError], use: Callable[[AsyncLLM], Any]) -> Case:
    """Inside an AsyncLLM over the shared engine."""

    async def run(bench: Bench) -> None:
        async with AsyncLLM(front=bench.llm.front, max_queue=2) as llm:
            await use(llm)

    return Case(name, error, lambda b: asyncio.run(run(b)))


async def _read(llm: AsyncLLM, *args: Any, **kwargs: Any) -> None:
    async for _ in llm.generate(*args, **kwargs):
        pass


async def _twice(llm: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=None, ignore_eos=True)
    async with contextlib.aclosing(llm.generate("ab", long, "same")) as first:
        await anext(first)
        await _read(llm, "cd", request_id="same")


async def _three(llm: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=None, ignore_eos=True)
    async with (
        contextlib.aclosing(llm.generate("ab", long)) as one,
        contextlib.aclosing(llm.generate("c", long)) as two,
    ):
        await anext(one)
        await anext(two)
        await _read(llm, "ef")


async def _after_shutdown(llm: AsyncLLM) -> None:
    await llm.shutdown()
    await _read(llm, "ab")


async def _sync_beside(llm: AsyncLLM, bench: Bench) -> None:
    await asyncio.to_thread(bench.llm.generate, "ab")


def _inside(bench: Bench) -> None:
    def listen(request: Request, text: str) -> None:
        bench.llm.generate("cd")

    bench.llm.generate("ab", SamplingParams(max_tokens=2), on_text=listen)


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


PROMPTS = [
    _prompt("an empty text", ""),
    _prompt("no token ids", {"prompt_token_ids": []}),
    _prompt("a prompt longer than the model", [5] * 100),
    Case("the second of two prompts is bad", RequestError, lambda b: b.generate(["ab", [5] * 100])),
    _prompt("a prompt that is no prompt", 5),
    _prompt("no prompt", None),
    _prompt("bytes", b"ab"),
    _prompt("a prompt of None", [None]),
    _prompt("half of a surrogate pair", "a\ud800"),
    _prompt("an unknown entry of a prompt", {"prompt": "a", "promt_token_ids": [5]}),
    _prompt("token ids as a text", {"prompt_token_ids": "5, 6"}),
    _prompt("token ids as a number", {"prompt_token_ids": 5}),
    _prompt("a negative token id", [5, -1]),
    _prompt("a token id beyond the vocabulary", [5, VOCAB]),
    _prompt("a huge token id", [5, 2**70]),
    _prompt("a token id that is a float", {"prompt_token_ids": [5, 6.5]}),
    _prompt("a token id that is a bool", {"prompt_token_ids": [5, True]}),
    _prompt("a token id that is a text", {"prompt_token_ids": [5, "6"]}),
    _prompt("a prompt whose logits are NaN", [5, NAN_TOKEN])._replace(error=NumericalError),
    Case("parameters that are a dict", RequestError, lambda b: b.llm.generate("a", cast("Any", {"temperature": 0}))),
    Case(
        "parameters for another number of prompts",
        RequestError,
        lambda b: b.llm.generate(["a", "b"], [SamplingParams()] * 3),
    ),
    Case("parameters with None among them", RequestError, lambda b: b.llm.generate("a", cast("Any", [None]))),
    Case("a priority that is a text", RequestError, lambda b: b.generate(options={"priority": "high"})),
    Case("a deadline in the past", RequestError, lambda b: b.generate(options={"deadline_s": -1})),
    Case("a deadline that is a text", RequestError, lambda b: b.generate(options={"deadline_s": "1"})),
    Case("a deadline beyond all numbers", RequestError, lambda b: b.generate(options={"deadline_s": 10**400})),
    Case("an id that is no text", RequestError, lambda b: b.llm.engine.abort(cast("Any", []))),
    Case("a call from inside a call", RequestError, _inside),
]
PARAMETERS = [
    _params("an unknown name", temprature=1.0),
    _params("temperature below 0", temperature=-0.5),
    _params("temperature NaN", temperature=NAN),
    _params("temperature infinite", temperature=INF),
    _params("temperature as a text", temperature="0.5"),
    _params("temperature None", temperature=None),
    _params("top_p 0", top_p=0.0),
    _params("top_p above 1", top_p=1.5),
    _params("top_p NaN", top_p=NAN),
    _params("top_k below -1", top_k=-2),
    _params("top_k a fraction", top_k=1.5),
    _params("top_k too large", top_k=2**31),
    _params("min_p above 1", min_p=2),
    _params("min_p NaN", min_p=NAN),
    _params("repetition_penalty 0", repetition_penalty=0.0),
    _params("repetition_penalty infinite", repetition_penalty=INF),
    _params("presence_penalty NaN", presence_penalty=NAN),
    _params("frequency_penalty too large", frequency_penalty=1e9),
    _params("seed below 0", seed=-1),
    _params("seed of more than 64 bits", seed=2**64),
    _params("seed a bool", seed=True),
    _params("max_tokens below 0", max_tokens=-1),
    _params("min_tokens above max_tokens", min_tokens=5, max_tokens=3),
    _params("n 0", n=0),
    _params("n too large", n=10**9),
    _params("an empty stop string", stop=["a", ""]),
    _params("stop a number", stop=5),
    _params("a number among the stop strings", stop=["a", 5]),
    _params("stop strings without text", stop="x", detokenize=False),
    _params("stop_token_ids a number", stop_token_ids=5),
    _params("stop_token_ids below 0", stop_token_ids=[-1]),
    _params("stop_token_ids beyond the vocabulary", stop_token_ids=[VOCAB]),
    _params("too many stop_token_ids", stop_token_ids=range(40)),
    _params("logit_bias a list", logit_bias=[1, 2]),
    _params("logit_bias NaN", logit_bias={5: NAN}),
    _params("logit_bias too large", logit_bias={5: 1e300}),
    _params("logit_bias None", logit_bias={5: None}),
    _params("logit_bias beyond the vocabulary", logit_bias={VOCAB: 1.0}),
    _params("allowed_token_ids empty", allowed_token_ids=[]),
    _params("allowed_token_ids beyond the vocabulary", allowed_token_ids=[VOCAB]),
    _params("allowed_token_ids that leave nothing", NumericalError, allowed_token_ids=[9], logit_bias={9: -INF}),
    _params("logprobs below 0", logprobs=-1),
    _params("logprobs beyond the vocabulary", logprobs=VOCAB + 1),
    _params("prompt_logprobs a bool", prompt_logprobs=True),
    _params("prompt_logprobs beyond the vocabulary", prompt_logprobs=10**6),
    _params("truncate_prompt_tokens 0", truncate_prompt_tokens=0),
    _params("ignore_eos a number", ignore_eos=1),
    _params("a decoder that is not loaded", decoder="ngram"),
    _params("an evictor that is not loaded", evictor="key_norm"),
    _params("a budget without an evictor", cache_budget=16),
]
CHAT = [
    _chat("no messages", []),
    _chat("messages that are a text", "hello"),
    _chat("messages that are one message", {"role": "user", "content": "hello"}),
    _chat("a message that is a text", ["hello"]),
    _chat("a message without a role", [{"content": "hello"}]),
    _chat("a role that the template does not know", [{"role": "wizard", "content": "hello"}]),
    _chat("a message without content", [{"role": "user"}]),
    _chat("content None", [{"role": "user", "content": None}]),
    _chat("content of parts", [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
    _chat("a message that holds itself", [{"role": "user", "content": "a", "extra": _loop()}]),
    _chat("a message that holds an object", [{"role": "user", "content": "a", "extra": object}]),
]
RECORDS = [
    Case("a record that is no object", RequestError, lambda b: b.llm.engine.resume(cast("Any", "half-way"))),
    _record("a record of another version", version=1),
    _record("a record of another model", model_law="qwen3 with 28 layers"),
    _record("a record of another cache", cache_law="codec='fp8', selector='all'"),
    _record("a record without tokens", tokens=...),
    _record("tokens that are no token ids", tokens=[5, 6, "7"]),
    _record("tokens beyond the vocabulary", tokens=[5, 6, 7, VOCAB, VOCAB, VOCAB]),
    _record("a prompt longer than the tokens", prompt_len=100),
    _record("log-probs of another number", token_logprobs=[]),
    _record("log-probs of the wrong form", top_logprobs=[[1], [2], [3]]),
    _record("parameters of the wrong form", params=[1]),
    _record("bad parameters", params={"temperature": -1}),
    _record("a seed of more than 64 bits", seed=2**64),
    _record("a sample that is not asked for", sample=3),
    _record("eviction of the wrong form", eviction=["full"]),
    _record("an evictor that is not loaded", eviction=["key_norm", 16, 100]),
    _record("another interval of evictions", eviction=["full", 0, 100]),
    _record("a deadline that is a text", deadline_left_s="soon"),
    _record("an output that has ended", params={"max_tokens": 2, "ignore_eos": True, "logprobs": 1}),
]
ASYNC = [
    _async("a bad prompt", RequestError, lambda llm: _read(llm, [5, -1])),
    _async("parameters that are a dict", RequestError, lambda llm: _read(llm, "ab", {"temperature": 0})),
    _async("an id that is no text", RequestError, lambda llm: _read(llm, "ab", None, 5)),
    _async("an id that is in use", RequestError, _twice),
    _async("the abort of an id that is no text", RequestError, lambda llm: llm.abort(cast("Any", []))),
    _async("more requests than max_queue", QueueFullError, _three),
    _async("a request after shutdown", EngineDeadError, _after_shutdown),
    Case(
        "generate of the LLM that an AsyncLLM drives",
        RequestError,
        lambda b: asyncio.run(_drive(b)),
    ),
    Case("a front that is in use", ConfigError, lambda b: asyncio.run(_drive_twice(b))),
]


async def _drive(bench: Bench) -> None:
    async with AsyncLLM(front=bench.llm.front) as llm:
        await _sync_beside(llm, bench)


async def _drive_twice(bench: Bench) -> None:
    async with AsyncLLM(front=bench.llm.front):
        AsyncLLM(front=bench.llm.front)
