"""/v1/completions, /v1/chat/completions, /v1/models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.errors import HeadraceError, UnknownModelError
from headrace.openai_api import Chunks, Work, answer, parse, read_json
from headrace.openai_api.answers import prompt_text
from headrace.openai_api.bodies import schema_of
from headrace.openai_api.chunks import DONE
from headrace.openai_api.work import Kind
from headrace.serve.routes.common import StreamAnswer, in_thread_if, pieces, unless_gone
from headrace.serve.service import Flight, Service, check_id, new_id

if TYPE_CHECKING:
    from headrace.serve.generation import Generation


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/completions", openapi_extra=_body("completions"), summary="Complete prompts")
    async def completions(request: Request) -> Response:
        return await serve(service, request, "completions")

    @routes.post("/v1/chat/completions", openapi_extra=_body("chat"), summary="Answer a conversation")
    async def chat_completions(request: Request) -> Response:
        return await serve(service, request, "chat")

    @routes.get("/v1/models", summary="The model and its adapters")
    async def models() -> Response:
        service.check_open()
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in _names(service)]})

    @routes.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> Response:
        service.check_open()
        if name not in _names(service):
            raise UnknownModelError(f"model is {name!r:.60}, which is not served here; see /v1/models")
        return JSONResponse(_model(service, name))

    return routes


def _body(kind: Kind) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(kind)}}}}


def _names(service: Service) -> list[str]:
    return [*service.names, *service.adapters]


def _model(service: Service, name: str) -> dict[str, Any]:
    adapter = {"parent": service.names[0]} if name in service.adapters else {}
    return {
        "id": name,
        "object": "model",
        "created": int(time.time() - (time.monotonic() - service.metrics.began_s)),
        "owned_by": "headrace",
        "max_model_len": service.engine.info.max_model_len,
        **adapter,
    }


async def serve(service: Service, request: Request, kind: Kind) -> Response:
    """One request, from body to answer."""
    service.check_open()
    span = service.tracer.begin("text_completion" if kind == "completions" else "chat", request.headers)
    told: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion" if kind == "completions" else "chat",
        "gen_ai.provider.name": "headrace",
    }
    try:
        tokenizer = service.tokenizer
        work = await in_thread_if(
            request,
            service,
            lambda data: parse(kind, read_json(data), tokenizer, tool_format=service.settings.tool_format),
        )
        model = service.names[0] if work.model is None else work.model
        work = work.for_model(service.names, service.adapters)
        told |= _asked(work, model)
        given = request.headers.get("x-request-id")
        name = new_id("cmpl" if kind == "completions" else "chatcmpl") if given is None else check_id(given)
        told["gen_ai.response.id"] = name
        # Lives as long as the answer, which for a stream is longer than this call.
        context = service.flight(name)
        flight = context.__enter__()
    except BaseException as error:
        span.end(told, error)
        raise
    who: dict[str, Any] = {"request_id": name, "created": int(time.time()), "model": model}

    def end(error: BaseException | None = None) -> None:
        context.__exit__(None, None, None)
        span.end(told, error)

    try:
        starting = service.start(flight, work.prompts, work.params, priority=work.priority, deadline_s=work.deadline_s)
        if work.stream:
            generations = await unless_gone(request, starting)
            pump = _stream(service, flight, work, generations, Chunks(work, **who), told)
            return StreamAnswer(service, flight, pump, end, "text/event-stream", {"x-request-id": name} | NO_CACHE)
        body = await unless_gone(request, _whole(service, flight, work, starting, who, told))
    except BaseException as error:
        await service.end(flight)
        end(error)
        raise
    end()
    return JSONResponse(body, headers={"x-request-id": name})


NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies must not keep a stream until it is whole."""


async def _whole(
    service: Service, flight: Flight, work: Work, starting: Any, who: dict[str, Any], told: dict[str, Any]
) -> dict[str, Any]:
    generations = await starting
    outputs = [await generation.result() for generation in generations]
    for output in outputs:
        service.saw_output(output, flight.began_s, streamed=False)
    body = answer(work, outputs, **who)
    told |= _used(body["usage"], [choice["finish_reason"] for choice in body["choices"]])
    return body


async def _stream(
    service: Service,
    flight: Flight,
    work: Work,
    generations: list[Generation],
    chunks: Chunks,
    told: dict[str, Any],
) -> AsyncGenerator[bytes, None]:
    """The events of a stream."""
    try:
        if len(generations) == 1:
            async for data in _events(service, flight, work, 0, generations[0], chunks):
                yield data
        else:
            parts = [_events(service, flight, work, i, one, chunks) for i, one in enumerate(generations)]
            async for data in _merged(parts):
                yield data
        outputs = [await generation.result() for generation in generations]
        n_prompt = sum(len(output.prompt_token_ids) for output in outputs)
        n_output = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        cached = sum(output.metrics.cached_tokens for output in outputs if output.metrics)
        reasons = [sample.finish_reason for output in outputs for sample in output.outputs]
        told |= _used({"prompt_tokens": n_prompt, "completion_tokens": n_output}, reasons)
        for output in outputs:
            service.saw_output(output, flight.began_s, streamed=True)
        yield (chunks.usage(n_prompt, n_output, cached) if work.include_usage else b"") + DONE
    except HeadraceError as error:
        yield chunks.error(error) + DONE


async def _events(
    service: Service, flight: Flight, work: Work, place: int, generation: Generation, chunks: Chunks
) -> AsyncGenerator[bytes, None]:
    ids = generation.prompt_token_ids
    shown = prompt_text(work, work.prompts[place].get("prompt"), ids) if work.echo else None
    head = chunks.opening(place, shown, ids)
    async for update in pieces(service, generation):
        data = head + b"".join(chunks.piece(place, sample, generation.seed) for sample in update.samples)
        head = b""
        if data:
            yield data


async def _merged(parts: list[AsyncGenerator[bytes, None]]) -> AsyncGenerator[bytes, None]:
    """Events of several prompts, as they come."""
    queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue(len(parts))

    async def pump(part: AsyncGenerator[bytes, None]) -> None:
        try:
            async for data in part:
                await queue.put(data)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(part)) for part in parts]
    try:
        left = len(tasks)
        while left:
            data = await queue.get()
            if isinstance(data, BaseException):
                raise data
            if data is None:
                left -= 1
            else:
                yield data
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _asked(work: Work, model: str) -> dict[str, Any]:
    params = work.params
    return {
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.seed": params.seed if params.seed is None or params.seed < 2**63 else None,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.stop_sequences": list(params.stop_strings) or None,
        "gen_ai.response.model": model,
    }


def _used(usage: dict[str, Any], reasons: list[str | None]) -> dict[str, Any]:
    return {
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.response.finish_reasons": [reason or "" for reason in reasons],
    }
