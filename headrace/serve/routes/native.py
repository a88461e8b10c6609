"""/generate, /score, /tokenize, /detokenize, /abort: what OpenAI's API has no words for. Token ids in and out."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.checks import show, unknown, whole_number
from headrace.errors import HeadraceError, RequestError, UnknownModelError
from headrace.openai_api import error_body
from headrace.openai_api.bodies import json_type
from headrace.outputs import RequestOutput
from headrace.params import SamplingParams
from headrace.request import PositionLogprobs
from headrace.serve.routes.common import StreamAnswer, pieces, read_fields, sse, unless_gone
from headrace.serve.service import Flight, Service, check_id, new_id

if TYPE_CHECKING:
    from headrace.serve.generation import Generation

TEXT: dict[str, Any] = {"type": "string"}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
LINES = "application/x-ndjson"
LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def _sampling() -> dict[str, Any]:
    hints = typing.get_type_hints(SamplingParams)
    return {
        spec.name: json_type(hints[spec.name]) | {"description": spec.metadata["help"]}
        for spec in dataclasses.fields(SamplingParams)
    }


GENERATE: dict[str, Any] = {
    "prompt": TEXT,
    "prompt_token_ids": IDS,
    "stream": {"type": "boolean"},
    "request_id": TEXT,
    "priority": {"type": "integer"},
    "deadline_s": {"type": "number"},
    **_sampling(),
}
SCORE: dict[str, Any] = {
    "prompt": TEXT,
    "prompt_token_ids": IDS,
    "continuation": TEXT,
    "continuation_token_ids": IDS,
    "adapter": TEXT,
}
TOKENIZE: dict[str, Any] = {
    "prompt": TEXT,
    "messages": {"type": "array", "items": {"type": "object"}},
    "add_special_tokens": {"type": "boolean"},
    "add_generation_prompt": {"type": "boolean"},
    "model": TEXT,
}
DETOKENIZE: dict[str, Any] = {"tokens": IDS, "skip_special_tokens": {"type": "boolean"}, "model": TEXT}
ABORT: dict[str, Any] = {"request_id": TEXT}


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/generate", openapi_extra=_body(GENERATE), summary="Complete a prompt, token ids in and out")
    async def generate(request: Request) -> Response:
        return await _generate(service, request)

    @routes.post("/score", openapi_extra=_body(SCORE), summary="Log-probabilities of given tokens")
    async def score(request: Request) -> Response:
        service.check_open()
        fields = _known(await read_fields(request, service), SCORE)
        prompt = _prompt(fields, "prompt")
        tail = _prompt(fields, "continuation") if {"continuation", "continuation_token_ids"} & set(fields) else None
        found = await unless_gone(request, service.engine.score(prompt, tail, adapter=_text(fields, "adapter")))
        return JSONResponse(
            {
                "token_ids": found.token_ids,
                "logprobs": [None if value is None else max(value, LEAST) for value in found.logprobs],
                "scored_from": found.scored_from,
                "total": max(found.total, LEAST * max(1, len(found.token_ids))),
            }
        )

    @routes.post("/tokenize", openapi_extra=_body(TOKENIZE), summary="Token ids of a text or a conversation")
    async def tokenize(request: Request) -> Response:
        service.check_open()
        fields = _known(await read_fields(request, service), TOKENIZE)
        _check_model(service, fields)
        ids = _tokenize(service, fields)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.engine.info.max_model_len})

    @routes.post("/detokenize", openapi_extra=_body(DETOKENIZE, ["tokens"]), summary="The text of token ids")
    async def detokenize(request: Request) -> Response:
        service.check_open()
        fields = _known(await read_fields(request, service), DETOKENIZE)
        _check_model(service, fields)
        ids = _ids(fields, "tokens")
        tokenizer = _tokenizer(service)
        if any(not 0 <= token < 2**31 for token in ids):
            raise RequestError("tokens has a number that is no token id: ids are whole numbers from 0")
        return JSONResponse({"prompt": tokenizer.decode(ids, _flag(fields, "skip_special_tokens", default=False))})

    @routes.post("/abort", openapi_extra=_body(ABORT, ["request_id"]), summary="End a request")
    async def abort(request: Request) -> Response:
        service.check_open()
        fields = _known(await read_fields(request, service), ABORT)
        name = _text(fields, "request_id")
        if name is None:
            raise RequestError("request_id is missing: give that of the request to end")
        return JSONResponse({"request_id": name, "aborted": await service.abort(name)})

    return routes


def _body(properties: dict[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False, "required": list(needed)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _generate(service: Service, request: Request) -> Response:
    service.check_open()
    fields = _known(await read_fields(request, service), GENERATE)
    prompt = _prompt(fields, "prompt")
    stream = _flag(fields, "stream", default=False)
    priority, deadline_s = _number(fields, "priority") or 0, _seconds(fields, "deadline_s")
    given = _text(fields, "request_id")
    name = new_id("gen") if given is None else check_id(given)
    names = {spec.name for spec in dataclasses.fields(SamplingParams)}
    params = SamplingParams.from_dict({key: value for key, value in fields.items() if key in names})
    if stream and params.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs come with whole answers: set stream to false, or leave them out")
    context = service.flight(name)
    flight = context.__enter__()
    span = service.tracer.begin("generate", request.headers)
    told = {"gen_ai.operation.name": "generate", "gen_ai.request.model": service.names[0]}

    def end(error: BaseException | None = None) -> None:
        context.__exit__(None, None, None)
        span.end(told, error)

    try:
        starting = service.start(flight, [prompt], params, priority=priority, deadline_s=deadline_s)
        generation = (await unless_gone(request, starting))[0]
        if stream:
            lines = LINES in request.headers.get("accept", "")
            pump = _stream(service, flight, generation, lines=lines)
            kind = LINES if lines else "text/event-stream"
            return StreamAnswer(service, flight, pump, end, kind, {"x-request-id": name, "cache-control": "no-cache"})
        output = await unless_gone(request, generation.result())
        service.saw_output(output, flight.began_s, streamed=False)
        failed = next((sample.error for sample in output.outputs if sample.finish_reason == "error"), None)
        if failed is not None:
            raise failed
    except BaseException as error:
        await service.end(flight)
        end(error)
        raise
    end()
    return JSONResponse(_output(output) | {"request_id": name}, headers={"x-request-id": name})


def _output(output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _positions(output.prompt_logprobs),
        "seed": output.seed,
        "outputs": [
            {
                "index": sample.index,
                "text": sample.text,
                "token_ids": sample.token_ids,
                **_logprobs(sample.token_ids, sample.logprobs),
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop_reason,
            }
            for sample in output.outputs
        ],
        "cached_tokens": metrics.cached_tokens if metrics else 0,
        "preemptions": metrics.preemptions if metrics else 0,
    }


def _logprobs(ids: Sequence[int], positions: Sequence[PositionLogprobs] | None) -> dict[str, Any]:
    """Those of the drawn tokens, and at each position those that were asked for, by token id."""
    drawn = None if positions is None else [max(p[token].logprob, LEAST) for token, p in zip(ids, positions)]
    return {"token_logprobs": drawn, "logprobs": _positions(positions)}


def _positions(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, float] | None] | None:
    if positions is None:
        return None
    return [p and {str(token): max(one.logprob, LEAST) for token, one in p.items()} for p in positions]  # type: ignore[misc]


async def _stream(
    service: Service, flight: Flight, generation: Generation, *, lines: bool
) -> AsyncGenerator[bytes, None]:
    def event(value: dict[str, Any]) -> bytes:
        return json.dumps(value, separators=(",", ":")).encode() + b"\n" if lines else sse(value)

    try:
        first: dict[str, Any] | None = {
            "request_id": flight.request_id,
            "prompt_token_ids": generation.prompt_token_ids,
            "seed": generation.seed,
        }
        async for update in pieces(service, generation):
            data = b"" if first is None else event(first)
            first = None
            for sample in update.samples:
                if sample.finish_reason == "error" and sample.error is not None:
                    raise sample.error
                data += event(
                    {
                        "index": sample.index,
                        "text": sample.text,
                        "token_ids": sample.token_ids,
                        **_logprobs(sample.token_ids, sample.logprobs),
                        "finish_reason": sample.finish_reason,
                        "stop_reason": sample.stop_reason,
                    }
                )
            yield data
        service.saw_output(await generation.result(), flight.began_s, streamed=True)
    except HeadraceError as error:
        yield event(error_body(error))
    if not lines:
        yield b"data: [DONE]\n\n"


def _check_model(service: Service, fields: Mapping[str, Any]) -> None:
    """All that is served has one tokenizer; another model's cannot be had. Raises UnknownModelError."""
    name = _text(fields, "model")
    if name is not None and name not in service.names and name not in service.adapters:
        raise UnknownModelError(f"model is {show(name)}, which is not served here; see /v1/models")


def _tokenizer(service: Service) -> Any:
    found = service.tokenizer
    if found is None:
        raise RequestError("there is no tokenizer here: the server was started with skip_tokenizer_init")
    return found


def _tokenize(service: Service, fields: Mapping[str, Any]) -> list[int]:
    tokenizer = _tokenizer(service)
    if ("prompt" in fields) == ("messages" in fields):
        raise RequestError("prompt and messages: give one of them")
    if "messages" in fields:
        wanted = _flag(fields, "add_generation_prompt", default=True)
        return list(tokenizer.encode_chat(fields["messages"], wanted))
    text = _text(fields, "prompt")
    return list(tokenizer.encode(text, add_special_tokens=_flag(fields, "add_special_tokens", default=True)))


def _known(fields: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null. Raises RequestError for one that has no meaning."""
    for name in fields:
        if name not in known:
            raise RequestError(unknown("field", name, known))
    return {name: value for name, value in fields.items() if value is not None}


def _prompt(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Text or token ids under the name, as the engine takes them."""
    ids_name = f"{name}_token_ids"
    if (name in fields) == (ids_name in fields):
        raise RequestError(f"{name} and {ids_name}: give one of them")
    if name in fields:
        return {"prompt": _text(fields, name)}
    return {"prompt_token_ids": _ids(fields, ids_name)}


def _ids(fields: Mapping[str, Any], name: str) -> list[int]:
    value = fields.get(name)
    if not isinstance(value, list) or any(whole_number(token) is None for token in value):
        raise RequestError(f"{name} is {show(value)}; it must be a list of token ids, whole numbers")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} is {show(value)}; it must be a text")
    return value


def _flag(fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {show(value)}; it must be true or false")
    return value


def _number(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise RequestError(f"{name} is {show(value)}; it must be a whole number")
    return value


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise RequestError(f"{name} is {show(value)}; it must be a number of seconds")
    return float(value)
