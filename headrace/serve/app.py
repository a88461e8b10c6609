"""The HTTP application: routes, keys, CORS, and errors in OpenAI's form. Pure ASGI around FastAPI's routing."""

from __future__ import annotations

import hmac
import importlib.resources
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.openai_api import error_body
from headrace.serve.routes import health, native, openai
from headrace.serve.routes.common import GoneError, HttpError, failure, refusal
from headrace.serve.service import Service

log = logging.getLogger("headrace.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready", "/metrics")
"""Asked without a key: by orchestrators, Prometheus, and whoever loads the page, which then sends the key."""
PAGE = "/page/"


def make_app(service: Service) -> App:
    """The application of one served model. Raises ConfigError for keys that cannot be read."""
    app = FastAPI(
        title="Headrace",
        version=__version__,
        description="OpenAI's API, and token ids in and out. Errors have OpenAI's form.",
        # The usual pages of FastAPI load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    for group in (openai, native, health):
        app.include_router(group.router(service))
    for extra in _optional_routes():
        app.include_router(extra.router(service))

    @app.exception_handler(HeadraceError)
    @app.exception_handler(HttpError)
    async def refused(request: Request, error: Exception) -> Response:
        return refusal(error, service)

    @app.exception_handler(GoneError)
    async def gone(request: Request, error: Exception) -> Response:
        service.metrics.disconnects += 1
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        words = {
            404: f"there is no {request.url.path!r:.80}; see /openapi.json",
            405: f"{request.method} cannot be used here",
        }
        message = words.get(error.status_code, str(error.detail))
        service.metrics.refused[str(error.status_code)] += 1
        answer = failure(error.status_code, error_body(message, error.status_code))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refusal(HttpError(400, f"the request is not as /openapi.json says: {error.errors()!r:.200}"), service)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        service.metrics.refused["500"] += 1
        return failure(500, error_body(error, 500))

    guarded: App = Guard(app, service.settings.keys())
    origins = service.settings.cors_origins
    if origins:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return guarded


def _optional_routes() -> Sequence[Any]:
    """Groups of routes that may be absent: batches and the page."""
    found = []
    for name in ("batches", "page"):
        path = Path(str(importlib.resources.files("headrace.serve.routes"))) / f"{name}.py"
        if path.exists():
            found.append(importlib.import_module(f"headrace.serve.routes.{name}"))
    return found


class Guard:
    """Lets through who has a key. Every key is compared, each in constant time."""

    def __init__(self, app: App, keys: Sequence[bytes]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not self._keys or path in OPEN_PATHS or path.startswith(PAGE):
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = sent.partition(b" ")
        fits = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        if scheme.lower() == b"bearer" and any(fits):
            await self._app(scope, receive, send)
            return
        message = "the API key is wrong" if sent else "an API key is needed: send it as bearer token"
        body = json.dumps(error_body(message, 401, "invalid_api_key")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})
