"""From options to a server that listens: sockets, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop

from headrace.config import EngineConfig
from headrace.errors import ConfigError
from headrace.serve.app import make_app
from headrace.serve.client import EngineClient
from headrace.serve.protocol import limited
from headrace.serve.service import Service
from headrace.serve.settings import ServeConfig

log = logging.getLogger("headrace.serve")

BACKLOG = 2048
MOST_FILES = 65536
LAST_WORDS_S = 2.0
"""Time for answers that are made but not yet sent, once the engine has ended its requests."""


class _Server(uvicorn.Server):
    """Leaves signals to `run`: a drain begins before the sockets close."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: ServeConfig, config: EngineConfig, *, say: Callable[[str], None]) -> int:
    """Serve until a signal comes. Returns the exit status: 0 after a drain, 1 if a second signal cut it short.

    `say` is given the line with the address as soon as requests are served. Raises ConfigError for an address that
    cannot be had, and whatever keeps the engine from starting.
    """
    _allow_connections()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, config, say))


async def _run(settings: ServeConfig, config: EngineConfig, say: Callable[[str], None]) -> int:
    engine = EngineClient(config, max_queue=settings.max_queue)
    service = Service(engine, settings)
    app = make_app(service)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    if not settings.is_local and not settings.keys():
        log.warning("%s can be reached by other machines, and no API key is set: everybody may ask", host)
    server = _Server(
        uvicorn.Config(
            app,
            http=limited(settings.max_header_kib * 1024, settings.body_timeout_s),
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=settings.access_log,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
    )
    if settings.access_log:
        _log_requests()
    signals = _Signals()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    watching = asyncio.create_task(service.watch())
    starting = asyncio.create_task(engine.start())
    telling = asyncio.create_task(_tell_stages(engine))
    stopping = asyncio.create_task(signals.first.wait())
    try:
        await asyncio.wait((starting, stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        telling.cancel()
        if starting.done():
            starting.result()  # raises what kept it from starting
            say(f"headrace: serving {service.names[0]} on http://{_address(host, port)}")
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        service.draining = True
        return 0 if await _drain(service, settings, signals) else 1
    finally:
        service.draining = True
        for task in (starting, telling, stopping, watching):
            task.cancel()
        await asyncio.gather(starting, telling, stopping, watching, return_exceptions=True)
        await engine.shutdown(0.0)
        ended_s = time.monotonic()
        while service.n_in_flight and time.monotonic() < ended_s + LAST_WORDS_S and not signals.second.is_set():
            await asyncio.sleep(0.02)
        server.should_exit = True
        await serving
        await asyncio.to_thread(service.tracer.shutdown)


async def _drain(service: Service, settings: ServeConfig, signals: _Signals) -> bool:
    """Wait for what is in flight. False if a second signal came."""
    if service.n_in_flight:
        log.info("%d requests have %g s to end", service.n_in_flight, settings.drain_s)
    ends_s = time.monotonic() + settings.drain_s
    while service.n_in_flight and time.monotonic() < ends_s:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(signals.second.wait(), 0.05)
        if signals.second.is_set():
            return False
    return True


class _Signals:
    """SIGTERM and Ctrl-C: the first begins the drain, the second ends it."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._came)

    def _came(self) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()


def _allow_connections() -> None:
    """Each connection is an open file, and many systems allow 1,024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(settings: ServeConfig) -> socket.socket:
    """A socket that listens. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"{settings.host} port {settings.port} cannot be listened on ({error.strerror or error}): choose another "
            "host or port; port 0 finds a free one"
        ) from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _tell_stages(engine: EngineClient) -> None:
    """Say what takes its time at the start."""
    told = ""
    while True:
        if engine.stage and engine.stage != told:
            told = engine.stage
            print(f"headrace: loading: {told}", file=sys.stderr, flush=True)  # noqa: T201
        await asyncio.sleep(0.25)


def _log_requests() -> None:
    """A line a request, on stderr."""
    handler: Any = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
