"""Requests that come and go while others run: an engine in a thread of its own, read with `async for`.

from headrace import AsyncLLM, SamplingParams
async with AsyncLLM() as llm:
    async for output in llm.generate("def fib(n):", SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)

`AsyncLLM` lives on the event loop. `_Worker` owns front and engine in its thread, and nobody else touches them while
it runs, but for what is safe in any thread: `encode`, and `Engine.prepare`, which compiles grammars. A `_Stream`
hands the outputs of one request from the thread to its reader, and `_Room` bounds how many requests are unfinished.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from headrace.checks import show
from headrace.engine.adapters import LoadedAdapter
from headrace.engine.intake import check_request_id, check_urgency
from headrace.errors import ConfigError, EngineDeadError, HeadraceError, QueueFullError
from headrace.front import Encoded, Prompt, TextFront
from headrace.llm import LLM
from headrace.models.adapters import read_adapter
from headrace.outputs import RequestOutput
from headrace.params import SamplingParams
from headrace.request import Request
from headrace.text.tokenizer import Tokenizer

log = logging.getLogger("headrace")


class AsyncLLM:
    """Generates text with one model, for many callers at a time. Use it from one event loop.

    Parameters
    ----------
    model, options: as for `LLM`.
    max_queue: most unfinished requests (prompts, whatever their `n`), waiting and running.
    front: drive this front, e.g. `LLM(...).front`, instead of loading a model. It must be idle, and nobody else may
        use it or its engine until `shutdown`.

    Raises ConfigError for options that cannot work, CheckpointError for broken files.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_queue: int = 4096,
        front: TextFront | None = None,
        **options: Any,
    ) -> None:
        if isinstance(max_queue, bool) or not isinstance(max_queue, int) or max_queue < 1:
            raise ConfigError(f"max_queue is {show(max_queue)}; it must be a whole number of at least 1")
        if front is not None and (model is not None or options):
            given = ", ".join([*(["model"] if model is not None else []), *options])
            raise ConfigError(f"a front is given, and so is {given}: its model is loaded already; give one of them")
        self._own: LLM | None = None
        """Ends with this object."""
        if front is None:
            self._own = LLM(model, **options)
            front = self._own.front
        if front.live or front.engine.has_work:
            raise ConfigError("the front is in use: let its requests end, or shut down the AsyncLLM that drives it")
        front.live = True
        self._front = front
        self._room = _Room(max_queue)
        self._worker = _Worker(front, self._room)
        self._ids = itertools.count()
        self._coming: set[_Stream] = set()  # not yet in the hands of the engine's thread
        # Also at the end of the interpreter, where a thread inside the engine would meet modules taken apart.
        self._finalizer = weakref.finalize(self, self._worker.stop_and_join)
        self._worker.thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None with skip_tokenizer_init."""
        return self._front.tokenizer

    @property
    def n_unfinished(self) -> int:
        """Requests that count against `max_queue`."""
        return self._room.taken

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        wait: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt; yields what there is of all samples each time there is more.

        Each output is cumulative and holds the newest state: a reader that is slower than the engine skips some. The
        last one has `finished=True`. Requests are served in the order of (priority, arrival), the lower number first.
        What is not finished `deadline_s` seconds after the call ends with the tokens it has and the reason `timeout`.

        Leaving the loop early ends the request within a step, as does cancelling the task. (Who keeps the generator
        in a variable has to call its `aclose`, or use `contextlib.aclosing`: Python tells it nothing about a break.)

        Tokens are those of `LLM.generate` with the same seed. A request without a seed is keyed by the engine's seed
        and the number of requests that arrived before it; the seed used is in the outputs.

        Raises, at the first iteration, RequestError for what can never be served, and QueueFullError if `max_queue`
        requests are unfinished; with `wait=True` it waits for room instead, first come, first served. Raises
        EngineDeadError once the engine has failed or was shut down.
        """
        self._worker.check()
        check_urgency(priority, deadline_s)
        if request_id is not None:
            check_request_id(request_id)
        stream = _Stream(
            request_id=f"async-{next(self._ids)}" if request_id is None else request_id,
            encoded=self._encode(prompt),
            params=SamplingParams() if sampling_params is None else sampling_params,
            priority=priority,
            deadline_s=deadline_s,
            arrival_s=self._front.engine.clock(),
        )
        self._coming.add(stream)
        try:
            if isinstance(stream.params, SamplingParams) and stream.params.constraint is not None:
                # A grammar may take long to compile: others go on meanwhile.
                await asyncio.to_thread(self._front.engine.prepare, stream.params)
            await self._find_seat(stream, wait)
            self._worker.post(stream)
        finally:
            self._coming.discard(stream)
        ended = False
        try:
            while not ended:
                output = await stream.next()
                ended = output.finished
                yield output
        finally:
            if not ended:
                self._worker.drop(stream)

    async def abort(self, request_id: str) -> None:
        """End a request now; its reader gets a last output with the reason `abort`. Unknown or finished ids are no
        error. Returns when its pages are back. Raises EngineDeadError, and RequestError for an id that is no
        text."""
        self._worker.check()
        check_request_id(request_id)
        for stream in self._coming:
            stream.aborted |= stream.request_id == request_id
        self._room.dismiss(request_id)
        done = _News()
        self._worker.post(_Abort(request_id, news=done))
        await done.wait()

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name: what `SamplingParams(adapter=...)` may ask for."""
        return self._front.engine.adapters.loaded

    async def load_adapter(self, name: str, path_or_id: str | os.PathLike[str]) -> None:
        """Load an adapter beside running requests: see `LLM.load_adapter`. Its files are read in a thread of their own.

        Raises EngineDeadError besides.
        """
        self._worker.check()
        adapter = await asyncio.to_thread(read_adapter, path_or_id)
        await self._ask(lambda: self._front.engine.load_adapter(name, adapter))

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter: see `LLM.unload_adapter`. Raises EngineDeadError besides."""
        self._worker.check()
        await self._ask(lambda: self._front.engine.unload_adapter(name))

    async def _ask(self, act: Callable[[], object]) -> None:
        """Have the engine's thread do something between two steps. Raises what that raises."""
        errand = _Errand(act)
        self._worker.post(errand)
        await errand.news.wait()
        if errand.error is not None:
            raise errand.error

    async def shutdown(self) -> None:
        """Stop after the step that runs. Requests in flight end with the reason `abort` and the tokens they have;
        those that wait for room, and later calls, get EngineDeadError. A second call does nothing."""
        self._worker.stop()
        await asyncio.to_thread(self._worker.thread.join)
        if self._own:
            await asyncio.to_thread(self._own.shutdown)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    def _encode(self, prompt: Prompt) -> Encoded:
        """A copy: the caller may change its list before the engine's thread reads it."""
        tokens, text = self._front.encode(prompt)
        return list(tokens), text

    async def _find_seat(self, stream: _Stream, wait: bool) -> None:
        """Take a seat for the request. One that was aborted or is late by now has none and needs none: the engine
        ends it before it runs."""
        stream.seated = self._room.take()
        if stream.seated:
            return
        if not wait:
            raise QueueFullError(
                f"{self._room.taken} requests are unfinished and max_queue is {self._room.limit}: come again later, "
                "pass wait=True, or raise max_queue"
            )
        clock = self._front.engine.clock
        waiter = self._room.line_up(stream.request_id)
        try:
            while waiter.fate is _Fate.WAITS:
                left_s = None if stream.deadline_s is None else stream.arrival_s + stream.deadline_s - clock()
                if left_s is not None and left_s <= 0.0:
                    break
                await waiter.news.wait(left_s)
        except BaseException:
            if self._room.leave_line(waiter) is _Fate.SEATED:
                self._room.leave()  # the seat came with the cancellation: on to the next
            raise
        fate = self._room.leave_line(waiter)
        if fate is _Fate.CLOSED:
            raise self._worker.death()
        stream.seated = fate is _Fate.SEATED


class _News:
    """Wakes a task of one event loop from any thread."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.event = asyncio.Event()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Until somebody rings, or time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.event.wait()
        except TimeoutError:
            return


def _ring(news: Iterable[_News]) -> list[_News]:
    """Wake the readers, one call a loop. Returns the news whose loop is closed, so that nobody will ever read."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_News]] = {}
    for one in news:
        by_loop.setdefault(one.loop, []).append(one)
    unread: list[_News] = []
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, [one.event for one in group])
        except RuntimeError:
            unread += group
    return unread


def _set_all(events: Sequence[asyncio.Event]) -> None:
    for event in events:
        event.set()


@dataclass(eq=False)
class _Stream:
    """One request on its way between reader and engine. Holds the newest output only, so a slow reader costs no
    memory and holds up nobody."""

    request_id: str
    encoded: Encoded
    params: SamplingParams
    priority: int
    deadline_s: float | None
    arrival_s: float
    seated: bool = False
    """Whether it counts against the room. Without a seat it ends before it runs."""
    aborted: bool = False
    """Whether it was aborted before the engine knew it."""
    samples: list[Request] = field(default_factory=list)
    news: _News = field(default_factory=_News)
    _output: RequestOutput | None = None
    _error: BaseException | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, output: RequestOutput) -> None:
        """The newest output; one that was not read yet is forgotten. The caller rings."""
        with self._lock:
            self._output = output

    def fail(self, error: BaseException) -> None:
        """The end, after what was put. The caller rings."""
        with self._lock:
            self._error = error

    async def next(self) -> RequestOutput:
        """The newest output that was not read, as soon as there is one. Raises what the request failed with."""
        while True:
            self.news.event.clear()
            with self._lock:
                output, self._output = self._output, None
                error = self._error
            if output is not None:
                return output
            if error is not None:
                raise error
            await self.news.wait()


@dataclass(eq=False)
class _Abort:
    """Ask the engine's thread to end a request, by name or by its stream: the name may be in use again."""

    request_id: str
    stream: _Stream | None = None
    news: _News | None = None
    """Rung when it is done."""


@dataclass(eq=False)
class _Errand:
    """Something that the engine's thread does between two steps."""

    act: Callable[[], object]
    error: BaseException | None = None
    news: _News = field(default_factory=_News)
    """Rung when it is done, or when it never will be."""


class _Fate(enum.Enum):
    """What has become of one that waits for a seat."""

    WAITS = enum.auto()
    SEATED = enum.auto()
    DISMISSED = enum.auto()
    CLOSED = enum.auto()


@dataclass(eq=False)
class _Waiter:
    request_id: str
    fate: _Fate = _Fate.WAITS
    news: _News = field(default_factory=_News)


class _Room:
    """Seats for unfinished requests, and the line of those that wait for one. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._line: deque[_Waiter] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def take(self) -> bool:
        """Take a seat if one is free and nobody waits for it."""
        with self._lock:
            if self._line or self.taken >= self.limit:
                return False
            self.taken += 1
            return True

    def leave(self) -> None:
        """Give a seat back; it goes to the first in line."""
        with self._lock:
            while self._line:
                waiter = self._line.popleft()
                waiter.fate = _Fate.SEATED
                if not _ring([waiter.news]):
                    return
            self.taken -= 1

    def line_up(self, request_id: str) -> _Waiter:
        """Join the line; the fate changes when there is news."""
        waiter = _Waiter(request_id)
        with self._lock:
            if self._closed:
                waiter.fate = _Fate.CLOSED
            elif not self._line and self.taken < self.limit:  # a seat came free since `take`
                self.taken += 1
                waiter.fate = _Fate.SEATED
            else:
                self._line.append(waiter)
        return waiter

    def leave_line(self, waiter: _Waiter) -> _Fate:
        """Stop waiting; returns what has become of it. Whoever was seated has the seat."""
        with self._lock:
            if waiter.fate is _Fate.WAITS:
                self._line.remove(waiter)
            return waiter.fate

    def dismiss(self, request_id: str) -> None:
        """End the wait of a request."""
        with self._lock:
            called = [waiter for waiter in self._line if waiter.request_id == request_id]
            self._send_away(called, _Fate.DISMISSED)

    def close(self) -> None:
        """End the wait of all, for good."""
        with self._lock:
            self._closed = True
            self._send_away(list(self._line), _Fate.CLOSED)

    def _send_away(self, waiters: Sequence[_Waiter], fate: _Fate) -> None:
        for waiter in waiters:
            self._line.remove(waiter)
            waiter.fate = fate
        _ring(waiter.news for waiter in waiters)


class _Worker:
    """Runs the engine in a thread and owns it there."""

    def __init__(self, front: TextFront, room: _Room) -> None:
        self._front = front
        self._engine = front.engine
        self._room = room
        self._inbox: deque[_Stream | _Abort | _Errand] = deque()
        self._changed = threading.Condition()
        """Guards inbox, stopping and closed."""
        self._stopping = False
        self._closed = False
        self._cause: BaseException | None = None
        self._work: deque[_Stream | _Abort | _Errand] = deque()
        self._streams: dict[str, _Stream] = {}
        self._rung: dict[_News, _Stream | None] = {}
        self._arrived = 0
        self.thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)

    # From any thread

    def post(self, item: _Stream | _Abort | _Errand) -> None:
        """Hand something to the engine's thread. Raises EngineDeadError."""
        with self._changed:
            if not self._stopping and not self._closed:
                self._inbox.append(item)
                self._changed.notify()
                return
        if isinstance(item, _Stream):
            self._free_seat(item)
        raise self.death()

    def drop(self, stream: _Stream) -> None:
        """Nobody reads this request any more: end it, if the engine still lives."""
        with self._changed:
            if not self._closed:
                self._inbox.append(_Abort(stream.request_id, stream))
                self._changed.notify()

    def check(self) -> None:
        """Raise EngineDeadError if requests can no longer be served."""
        with self._changed:
            if not self._stopping and not self._closed:
                return
        raise self.death()

    def death(self) -> EngineDeadError:
        """Why requests can no longer be served: a new error for each that is told."""
        if self._cause is None:
            return EngineDeadError("the engine was shut down: make a new AsyncLLM")
        error = EngineDeadError(
            f"the engine failed ({type(self._cause).__name__}: {self._cause}), and every unfinished request with it: "
            "make a new AsyncLLM"
        )
        error.__cause__ = self._cause
        return error

    def stop(self) -> None:
        """Ask the thread to end after the step that runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop_and_join(self) -> None:
        """The same, and wait for it."""
        self.stop()
        if self.thread.is_alive() and threading.current_thread() is not self.thread:
            self.thread.join()

    # In the engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                while self._work:
                    self._do(self._work[0])
                    self._work.popleft()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._wake()
            for request_id in list(self._streams):
                self._deliver(self._engine.abort(request_id))
        except BaseException as error:
            log.exception("the engine failed")
            self._cause = error
        finally:
            self._close()

    def _wait_for_work(self) -> bool:
        """Until there is something to do; False if the thread has to end."""
        with self._changed:
            while not (self._inbox or self._stopping or self._engine.has_work):
                self._changed.wait()
            self._work.extend(self._inbox)
            self._inbox.clear()
            return not self._stopping

    def _do(self, item: _Stream | _Abort | _Errand) -> None:
        if isinstance(item, _Stream):
            self._add(item)
            return
        if isinstance(item, _Errand):
            try:
                item.act()
            except HeadraceError as error:  # refused; the engine is unharmed
                item.error = error
            self._rung[item.news] = None
            return
        if item.stream is None or self._streams.get(item.request_id) is item.stream:
            self._deliver(self._engine.abort(item.request_id))
        if item.news is not None:
            self._rung[item.news] = None

    def _add(self, stream: _Stream) -> None:
        try:
            stream.samples = self._front.add(
                stream.encoded,
                stream.params,
                request_id=stream.request_id,
                number=self._arrived,
                priority=stream.priority,
                deadline_s=stream.deadline_s,
                arrival_s=stream.arrival_s,
            )
        except EngineDeadError:
            raise
        except Exception as error:  # refused; the engine is unharmed
            stream.fail(error)
            self._rung[stream.news] = stream
            self._free_seat(stream)
            return
        self._arrived += 1
        self._streams[stream.request_id] = stream
        if stream.aborted:
            self._deliver(self._engine.abort(stream.request_id))

    def _deliver(self, changed: Sequence[Request]) -> None:
        """Give readers the state of their requests."""
        for request in changed:
            if request.finish:
                self._front.close(request)
        for request_id in dict.fromkeys(request.request_id for request in changed):
            stream = self._streams[request_id]
            output = self._front.output(stream.samples)
            stream.put(output)
            self._rung[stream.news] = stream
            if output.finished:
                self._end(stream)

    def _end(self, stream: _Stream) -> None:
        """The engine is done with a request."""
        self._streams.pop(stream.request_id, None)
        self._front.forget(stream.samples)
        self._free_seat(stream)

    def _free_seat(self, stream: _Stream) -> None:
        if stream.seated:
            stream.seated = False
            self._room.leave()

    def _wake(self) -> None:
        """Tell readers that there is news. Requests whose reader's event loop is closed are ended."""
        rung, self._rung = self._rung, {}
        for news in _ring(rung):
            stream = rung[news]
            if stream is not None and self._streams.get(stream.request_id) is stream:
                self._engine.abort(stream.request_id)
                self._end(stream)

    def _close(self) -> None:
        """No more requests: fail those that are left."""
        with self._changed:
            self._closed = True
            self._work.extend(self._inbox)
            self._inbox.clear()
        self._front.live = False
        self._room.close()
        for item in [*self._streams.values(), *self._work]:
            if isinstance(item, _Stream):
                item.fail(self.death())
                self._free_seat(item)
            if isinstance(item, _Errand):
                item.error = self.death()
            if item.news is not None:
                self._rung[item.news] = None
        self._streams.clear()
        _ring(self._rung)
