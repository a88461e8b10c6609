"""Bodies in, answers out, and ends: what every route does alike."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from headrace.errors import RequestError
from headrace.openai_api import error_body, read_json, status_of
from headrace.serve.service import Flight, Service

if TYPE_CHECKING:
    from headrace.serve.generation import Generation

T = TypeVar("T")
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LARGE_BODY = 65536
"""Bytes from which on a body is read in a thread: others go on meanwhile."""


class HttpError(Exception):
    """An answer with an error that has no class of its own in headrace.errors."""

    def __init__(self, status: int, message: str, *, code: str | None = None, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.code, self.close = status, code, close


class GoneError(Exception):
    """The client has left: nobody reads an answer."""


def failure(status: int, body: dict[str, Any], **headers: str) -> Response:
    """An error as an answer."""
    return JSONResponse(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


async def read_body(request: Request, service: Service) -> bytes:
    """The whole body. Raises HttpError for one that is too large, too slow, or no JSON by its header."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HttpError(415, f"content-type is {kind!r:.60}; send application/json")
    most = int(service.settings.max_body_mib * 2**20)
    too_large = HttpError(
        413, f"the body has more than {service.settings.max_body_mib:g} MiB: send less at once", close=True
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.settings.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        limit = f"{service.settings.body_timeout_s:g} s"
        raise HttpError(408, f"the body did not arrive within {limit}: send it faster", close=True) from error
    except ClientDisconnect as error:
        raise GoneError from error
    return b"".join(parts)


async def read_fields(request: Request, service: Service) -> dict[str, Any]:
    """The body as an object. Raises RequestError, HttpError."""
    body = await in_thread_if(request, service, lambda data: read_json(data))
    if not isinstance(body, dict):
        raise RequestError("the body must be an object")
    return body


async def in_thread_if(request: Request, service: Service, read: Callable[[bytes], T]) -> T:
    """Read the body; a large one beside the event loop."""
    data = await read_body(request, service)
    if not data:
        raise RequestError("the body is empty: send a JSON object")
    return await asyncio.to_thread(read, data) if len(data) > LARGE_BODY else read(data)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result, as long as the client waits for it. Raises GoneError once it has left; the work is cancelled."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_leaving(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for one in (task, leaving):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _wait_for_leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class StreamAnswer(Response):
    """An answer that is sent piece by piece, as long as there is somebody who reads it.

    `pump` yields the bytes and `end` is called once, with what ended it early; `kind`: the media type. A slow reader
    waits in `send` and holds nobody else; what comes meanwhile is merged by the generation.
    """

    def __init__(
        self,
        service: Service,
        flight: Flight,
        pump: AsyncGenerator[bytes, None],
        end: Callable[[BaseException | None], None],
        kind: str,
        headers: dict[str, str],
    ) -> None:
        super().__init__(None, 200, headers, kind)
        # A stream has no length; uvicorn sends it in chunks.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._service, self._flight, self._pump, self._end = service, flight, pump, end

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Send it."""
        me = asyncio.current_task()
        transport = scope.get("headrace.transport")
        flight = self._flight
        gone = False

        def leave() -> None:
            nonlocal gone
            gone = True
            if me is not None:
                me.cancel()

        def cut() -> None:
            if transport is not None:
                transport.abort()
            leave()

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            leave()

        flight.cut = cut
        listener = asyncio.ensure_future(listen())
        self._service.pace.n_streams += 1
        error: BaseException | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for data in self._pump:
                flight.sending_since_s = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                flight.sending_since_s = None
            listener.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError as left:
            error = left
            if not gone:
                raise
            if me is not None:
                me.uncancel()
            self._service.metrics.disconnects += 1
        except BaseException as failed:
            error = failed
            raise
        finally:
            self._service.pace.n_streams -= 1
            flight.sending_since_s = flight.cut = None
            listener.cancel()
            try:
                await self._service.end(flight)
                await self._pump.aclose()
            finally:
                self._end(error)


async def pieces(service: Service, generation: Generation) -> AsyncGenerator[Any, None]:
    """What is new of a generation, at the pace of the server. Counts times."""
    began_s = time.monotonic()
    last_s: float | None = None
    async for update in generation:
        now_s = time.monotonic()
        if last_s is None:
            service.metrics.saw_first(now_s - began_s)
        else:
            for sample in update.samples:
                count = len(sample.token_ids)
                if count:
                    service.metrics.itl_s.observe((now_s - last_s) / count, count)
        last_s = now_s
        yield update
        if update.finished:
            return
        if not generation.finished:  # its end waits for nobody
            await service.pace.pause()


def sse(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def refusal(error: BaseException, service: Service) -> Response:
    """The answer for an error."""
    if isinstance(error, HttpError):
        body = error_body(str(error), error.status, error.code)
        extra = {"connection": "close"} if error.close else {}
        if error.status == 401:
            extra["www_authenticate"] = "Bearer"
        service.metrics.refused[str(error.status)] += 1
        return failure(error.status, body, **extra)
    body = error_body(error)
    status = status_of(error)
    service.metrics.refused[str(status)] += 1
    extra = {"retry_after": str(service.retry_after_s())} if status in (429, 503) else {}
    return failure(status, body, **extra)
