"""What all routes share: the engine, who may ask, what is in flight, and what is counted."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from headrace.errors import ConfigError, EngineDeadError, RequestError
from headrace.outputs import RequestOutput
from headrace.params import SamplingParams
from headrace.serve.metrics import Collector, Metrics
from headrace.serve.pace import Pace
from headrace.serve.settings import ServeConfig
from headrace.serve.tracing import Tracer
from headrace.text.chat import ChatTemplates
from headrace.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headrace.serve.client import EngineClient
    from headrace.serve.generation import Generation

log = logging.getLogger("headrace.serve")

RATE_WINDOW = 64
"""Ends of requests from which the time until there is room is foreseen."""
MOST_RETRY_S = 60


@dataclass(eq=False)
class Flight:
    """One HTTP request with its generations."""

    request_id: str
    generations: list[Generation] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    sending_since_s: float | None = None
    """When a stream began to wait for its reader."""
    cut: Callable[[], None] | None = None
    """Ends the connection at once."""


class Service:
    """One served model."""

    def __init__(self, engine: EngineClient, settings: ServeConfig, *, tracer: Tracer | None = None) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        self.tracer = Tracer(settings.otel_endpoint) if tracer is None else tracer
        self.draining = False
        self.flights: dict[str, list[Flight]] = {}
        self.pace = Pace(settings.stream_chunks_per_s)
        self._collector = Collector(self.metrics, self.numbers)
        self._ends_s: deque[float] = deque(maxlen=RATE_WINDOW)
        self._template = _read_template(settings.chat_template)
        self._has_template = False

    # What is served

    @property
    def names(self) -> list[str]:
        """Names of the model, the first for answers."""
        if self.settings.served_names:
            return self.settings.served_names
        return [self.engine.info.model]

    @property
    def adapters(self) -> Mapping[str, Any]:
        """The loaded adapters."""
        return self.engine.adapters

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, with the chat template of the settings."""
        found = self.engine.tokenizer
        if found is not None and self._template is not None and not self._has_template:
            origin = str(self.settings.chat_template)
            found.chat_templates = ChatTemplates({"default": self._template}, found.special_tokens, origin)
            self._has_template = True
        return found

    def check_open(self) -> None:
        """Raise EngineDeadError if no new request is taken."""
        if self.draining:
            raise EngineDeadError("the server is shutting down: send the request to another, or again later")
        state = self.engine.state.name
        if state == "STARTING":
            raise EngineDeadError(f"the server is starting ({self.engine.stage}): come again in some seconds")
        if state in ("DEAD", "DRAINING"):
            raise EngineDeadError(f"the engine is gone: {self.engine.state_reason}")

    def why_not_ready(self) -> str | None:
        """Why requests would not be served now; None: they would."""
        if self.draining:
            return "draining"
        state = self.engine.state.name
        if state == "READY":
            return None
        reason = self.engine.stage if state == "STARTING" else self.engine.state_reason
        return f"{state.lower()}: {reason}"

    def retry_after_s(self) -> int:
        """Whole seconds until there is room in the queue, as far as the last requests tell."""
        if len(self._ends_s) < 2:
            return 1
        span_s = max(self._ends_s[-1] - self._ends_s[0], 1e-3)
        each_s = span_s / (len(self._ends_s) - 1)
        return min(max(1, math.ceil(each_s * self.settings.max_queue / 10)), MOST_RETRY_S)

    # Requests

    async def start(
        self,
        flight: Flight,
        prompts: Sequence[Any],
        params: SamplingParams,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> list[Generation]:
        """Hand all prompts to the engine and wait until it has taken them: all, or none. Raises what it refuses."""
        self.check_open()
        try:
            for place, prompt in enumerate(prompts):
                name = flight.request_id if len(prompts) == 1 else f"{flight.request_id}-{place}"
                made: Any = self.engine.generate(
                    prompt, params, request_id=name, priority=priority, deadline_s=deadline_s
                )
                flight.generations.append(await made if inspect.isawaitable(made) else made)
            for generation in flight.generations:
                await generation.accepted()
        except BaseException:
            await self.end(flight)
            raise
        return flight.generations

    @contextmanager
    def flight(self, request_id: str) -> Iterator[Flight]:
        """A request in flight, which `abort` finds by its id."""
        flight = Flight(request_id)
        self.flights.setdefault(request_id, []).append(flight)
        try:
            yield flight
        finally:
            self._ends_s.append(time.monotonic())
            left = self.flights[request_id]
            left.remove(flight)
            if not left:
                del self.flights[request_id]

    async def end(self, flight: Flight) -> None:
        """Nobody waits for these any more."""
        for generation in flight.generations:
            await generation.aclose()

    async def abort(self, request_id: str) -> int:
        """End the requests with this id; how many there were."""
        found = [one for flight in self.flights.get(request_id, []) for one in flight.generations]
        for generation in found:
            await self.engine.abort(generation.request_id)
        return len(found)

    @property
    def n_in_flight(self) -> int:
        """HTTP requests that wait for the engine or send its tokens."""
        return sum(map(len, self.flights.values()))

    def saw_output(self, output: RequestOutput, began_s: float, *, streamed: bool) -> None:
        """Count a finished request."""
        metrics = output.metrics
        n_output = sum(len(sample.token_ids) for sample in output.outputs)
        self.metrics.saw_end(
            (sample.finish_reason for sample in output.outputs),
            len(output.prompt_token_ids),
            n_output,
            time.monotonic() - began_s,
        )
        if metrics is None or metrics.ttft_s is None or metrics.first_token_s is None:
            return
        if not streamed:
            self.metrics.saw_first(metrics.ttft_s)
        longest = max(len(sample.token_ids) for sample in output.outputs)
        if metrics.finish_s is not None and longest > 1:
            self.metrics.token_s.observe((metrics.finish_s - metrics.first_token_s) / (longest - 1))

    async def watch(self) -> None:
        """Cut streams that nobody reads. Runs until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.stall_timeout_s / 4))
            limit_s = time.monotonic() - self.settings.stall_timeout_s
            for flight in [one for flights in self.flights.values() for one in flights]:
                since_s = flight.sending_since_s
                if since_s is not None and since_s < limit_s and flight.cut is not None:
                    log.warning("%s: cut, because its reader took nothing", flight.request_id)
                    self.metrics.stalls += 1
                    flight.cut()

    # Numbers

    def numbers(self) -> dict[str, Any]:
        """What the engine counts and where it stands, by name."""
        engine = self.engine
        known = engine.state.name != "STARTING"
        found: dict[str, Any] = {
            "model": self.names[0] if known else "",
            "running": 0,
            "waiting": 0,
            "pages_in_use": 0,
            "pages_total": 0,
            "leaked": 0,
        }
        if known:
            found |= dict(_fields(engine.stats))
        found |= {"restarts": engine.restarts, "ready": self.why_not_ready() is None}
        return found

    def scrape(self) -> bytes:
        """The page for Prometheus."""
        return self._collector.text()


def _fields(stats: Any) -> Iterator[tuple[str, Any]]:
    for name in getattr(stats, "__struct_fields__", None) or getattr(stats, "__dataclass_fields__", {}):
        yield name, getattr(stats, name)


def new_id(prefix: str) -> str:
    """An id that nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def check_id(value: str) -> str:
    """A request id from outside. Raises RequestError."""
    if not 0 < len(value) <= 128 or not value.isascii() or not value.isprintable():
        raise RequestError("request_id must be a text of 1 to 128 printable ASCII characters")
    return value


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template {path} cannot be read ({error}): name a text file with a template") from error


def plain(value: Any) -> Any:
    """A value of the engine as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else cast("Any", str(value))
