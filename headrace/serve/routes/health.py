"""/health, /ready, /stats, /metrics: how it goes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from headrace.errors import HeadraceError
from headrace.serve.service import Service, plain


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.get("/health", summary="200 if the engine steps")
    async def health() -> Response:
        """Asks through the engine's own loop, between two steps: a process that is there and hangs is not healthy."""
        engine = service.engine
        try:
            seconds = await engine.check(service.settings.health_timeout_s)
        except HeadraceError as error:
            told = {"status": engine.state.name.lower(), "reason": str(error)}
            return JSONResponse(told, 503, {"retry-after": "1"})
        return JSONResponse({"status": "ok", "engine_s": round(seconds, 6)})

    @routes.get("/ready", summary="200 if requests are taken")
    async def ready() -> Response:
        reason = service.why_not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"retry-after": "1"})

    @routes.get("/stats", summary="Numbers for people")
    async def stats() -> Response:
        return JSONResponse(statistics(service))

    @routes.get("/metrics", summary="Numbers for Prometheus")
    async def metrics() -> Response:
        return Response(service.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def statistics(service: Service) -> dict[str, Any]:
    """What the page shows."""
    engine = service.engine
    numbers = service.numbers()
    lookups = numbers.get("prefix_queries", 0)
    info: dict[str, Any] = {}
    if engine.state.name != "STARTING":
        told = engine.info
        names = getattr(told, "__struct_fields__", None) or [spec.name for spec in dataclasses.fields(told)]
        info = {name: plain(getattr(told, name)) for name in names}
    return {
        "state": "draining" if service.draining else engine.state.name.lower(),
        "reason": service.why_not_ready(),
        "stage": engine.stage,
        "uptime_s": round(time.monotonic() - service.metrics.began_s, 3),
        "in_flight": service.n_in_flight,
        "streams": service.pace.n_streams,
        "max_queue": service.settings.max_queue,
        "prefix_hit_rate": numbers.get("prefix_hits", 0) / lookups if lookups else 0.0,
        "disconnects": service.metrics.disconnects,
        "engine": plain(numbers),
        "info": info,
    }
