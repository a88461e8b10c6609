"""The engine as the HTTP process sees it: a child process that is started, asked, watched and replaced.

Requests have numbers of their own in the order in which they come, so that one without a seed is keyed as offline. A
child that dies is followed by another: requests of which nothing was handed out are sent again, with the same numbers
and so the same tokens; the others fail with what was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.checks import show, unknown, whole_number
from headrace.config import EngineConfig
from headrace.errors import ConfigError, EngineDeadError, HeadraceError, QueueFullError, RequestError
from headrace.outputs import ScoreOutput
from headrace.params import SamplingParams
from headrace.serve.generation import Generation
from headrace.serve.messages import (
    COUNTERS,
    HEAD_BYTES,
    Abort,
    Add,
    Answer,
    EngineInfo,
    EngineStats,
    Errand,
    Failed,
    FromEngine,
    Loading,
    Outputs,
    frame,
    length,
)
from headrace.text.tokenizer import Tokenizer

log = logging.getLogger("headrace.serve")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
FAILED_STARTS = 5
"""Starts in a row that may fail before nobody tries again."""
LONG_TEXT = 16384
"""Characters from which on a text is tokenized in a thread."""
PATIENCE_S = 10.0
"""For a child that was told to end."""


class EngineState(enum.Enum):
    """What the engine is doing."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(eq=False)
class _Pending:
    generation: Generation
    add: Add
    attempts: int = 0


class EngineClient:
    """Starts an engine in a process of its own and serves many callers on one event loop.

    Parameters
    ----------
    config: options of the engine.
    max_queue: most unfinished prompts, waiting and running.
    step_timeout_s: seconds without a word from an engine that has work, after which it is replaced.
    max_attempts: engines that may die with a request in flight before it is given up.
    """

    def __init__(
        self, config: EngineConfig, *, max_queue: int = 1024, step_timeout_s: float = 300.0, max_attempts: int = 3
    ) -> None:
        if max_queue < 1:
            raise ConfigError(f"max_queue is {max_queue}; it must be at least 1")
        self._config, self._max_queue = config, max_queue
        self._step_timeout_s, self._max_attempts = step_timeout_s, max_attempts
        self.state = EngineState.STARTING
        self.state_reason = "starting"
        self.stage = "process"
        self.restarts = 0
        self.info: EngineInfo
        self.stats = EngineStats()
        self.tokenizer: Tokenizer | None = None
        self.adapters: Mapping[str, str] = {}
        self._before = EngineStats()
        """Counters of engines that are gone."""
        self._numbers = itertools.count()
        self._keys = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._errands: dict[int, asyncio.Future[Any]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._heard_s = time.monotonic()
        self._supervisor: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._failure: HeadraceError | None = None
        self._was_ready = False
        """Whether the child that lives now serves."""
        self._kept_adapters: dict[str, str] = {}

    @property
    def pid(self) -> int | None:
        """Of the engine's process."""
        return None if self._child is None else self._child.pid

    # Start and end

    async def start(self) -> None:
        """Start the process; returns when requests are served. Raises what kept the engine from starting."""
        self._supervisor = asyncio.create_task(self._supervise())
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait((self._supervisor, ready), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._failure is not None and self.state is EngineState.DEAD:
            raise self._failure

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Take no more requests; those in flight have `drain_s` seconds to end, then they are aborted."""
        if self.state is not EngineState.DEAD:
            self.state, self.state_reason = EngineState.DRAINING, "shutting down"
        ends_s = time.monotonic() + drain_s
        while self._pending and time.monotonic() < ends_s:
            await asyncio.sleep(0.02)
        for key in list(self._pending):
            self._post(Abort(key))
        ends_s = time.monotonic() + 1.0
        while self._pending and self._writer is not None and time.monotonic() < ends_s:
            await asyncio.sleep(0.01)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_all(EngineDeadError("the engine was shut down"))
        await self._end_child()
        self.state = EngineState.DEAD

    async def _supervise(self) -> None:
        """Start an engine, listen to it until it dies, start the next."""
        pause_s, failed = FIRST_PAUSE_S, 0
        while True:
            began_ready = False
            try:
                began_ready = await self._live()
            except asyncio.CancelledError:
                raise
            except HeadraceError as error:
                self._failure = error
            except Exception as error:
                log.exception("what the engine said could not be read")
                self._failure = EngineDeadError(f"{type(error).__name__}: {error}")
            began_ready = began_ready or self._was_ready
            await self._end_child()
            if self.state is EngineState.DRAINING:
                return
            reason = self._death()
            self._lose(reason)
            if self.restarts == 0 and not self._ready.is_set() and self._failure is not None:
                self._give_up(self._failure)
                return
            failed = 0 if began_ready else failed + 1
            if failed >= FAILED_STARTS:
                self._give_up(EngineDeadError(f"{failed} starts in a row have failed, the last one so: {reason}"))
                return
            pause_s = FIRST_PAUSE_S if began_ready else min(2 * pause_s, LONGEST_PAUSE_S)
            log.error("the engine died (%s); another one starts in %.1f s", reason, pause_s)
            self.restarts += 1
            self.state, self.state_reason = EngineState.RESTARTING, f"the engine died: {reason}"
            self._failure = None
            await asyncio.sleep(pause_s)

    async def _live(self) -> bool:
        """One engine from its start to its end."""
        self._was_ready = False
        mine, its = socket.socketpair()
        with its:
            command = [sys.executable, "-m", "headrace.serve.engine_process", str(its.fileno())]
            # In a session of its own: Ctrl-C on the terminal is for this process, which drains.
            self._child = subprocess.Popen(
                command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        mine.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=mine, limit=2**22)
        self._writer.write(frame(self._encoder, dataclasses.asdict(self._config)))
        decoder = msgspec.msgpack.Decoder(FromEngine)
        self._heard_s = time.monotonic()
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                try:
                    body = await reader.readexactly(length(await reader.readexactly(HEAD_BYTES)))
                except (asyncio.IncompleteReadError, ConnectionError):
                    return self._was_ready
                self._heard_s = time.monotonic()
                self._hear(decoder.decode(body))
        finally:
            watch.cancel()

    def _hear(self, message: Any) -> None:
        if isinstance(message, Outputs):
            self._take(message)
        elif isinstance(message, Loading):
            self.stage = message.stage
        elif isinstance(message, EngineInfo):
            self._begin(message)
        elif isinstance(message, Answer):
            waiting = self._errands.pop(message.key, None)
            if waiting is not None and not waiting.done():
                if message.failure is not None:
                    waiting.set_exception(message.failure.error())
                else:
                    waiting.set_result(message.value)
        elif isinstance(message, Failed):
            raise message.failure.error()

    def _begin(self, info: EngineInfo) -> None:
        """The engine serves from now on."""
        self.info = info
        if self.tokenizer is None and info.tokenizer_path is not None:
            self.tokenizer = Tokenizer.from_dir(info.tokenizer_path)
        self._was_ready = True
        self.stage = ""
        if self.state is not EngineState.DRAINING:
            self.state, self.state_reason = EngineState.READY, ""
        for name, source in self._kept_adapters.items():
            self._post(Errand(next(self._keys), "load_adapter", [name, source]))
        self.adapters = {name: name for name in [*info.adapters, *self._kept_adapters]}
        for pending in self._pending.values():
            self._post(pending.add)
        self._ready.set()

    def _take(self, message: Outputs) -> None:
        pending = self._pending
        for accepted in message.accepted:
            if (found := pending.get(accepted.key)) is not None:
                found.generation.accept(accepted)
        for refused in message.refused:
            if (gone := pending.pop(refused.key, None)) is not None:
                gone.generation.fail(refused.failure.error())
        for delta in message.deltas:
            if (found := pending.get(delta.key)) is not None:
                found.generation.push(delta)
        for end in message.ends:
            if (gone := pending.pop(end.key, None)) is not None:
                gone.generation.end(end)
        if message.stats is not None:
            stats = message.stats
            for name in COUNTERS:
                setattr(stats, name, getattr(stats, name) + getattr(self._before, name))
            self.stats = stats

    async def _watch(self) -> None:
        """Replace a child that is there and says nothing although it has work."""
        while True:
            await asyncio.sleep(min(1.0, self._step_timeout_s / 4))
            if not self._was_ready or not (self._pending or self._errands):
                self._heard_s = time.monotonic()
            elif time.monotonic() - self._heard_s > self._step_timeout_s:
                log.error("the engine has said nothing for %g s", self._step_timeout_s)
                self._failure = EngineDeadError(f"it did not step for {self._step_timeout_s:g} s")
                self._kill()

    def _death(self) -> str:
        if self._failure is not None:
            return str(self._failure)
        code = None if self._child is None else self._child.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return f"its process ended with status {code}"

    def _lose(self, reason: str) -> None:
        """The engine is gone: what can be done again waits for the next, the rest fails."""
        for name in COUNTERS:
            setattr(self._before, name, getattr(self.stats, name))
        for future in self._errands.values():
            if not future.done():
                future.set_exception(EngineDeadError(f"the engine died ({reason}): ask again"))
        self._errands.clear()
        for key, pending in list(self._pending.items()):
            pending.attempts += 1
            generation = pending.generation
            if generation.handed_out:
                error = f"the engine failed ({reason}) after {generation.handed_out} tokens were sent: send it again"
            elif pending.attempts >= self._max_attempts:
                error = f"{pending.attempts} engines died with this request in flight, the last one so: {reason}"
            else:
                generation.forget()
                continue
            del self._pending[key]
            generation.fail(EngineDeadError(error))

    def _give_up(self, error: HeadraceError) -> None:
        self.state, self.state_reason = EngineState.DEAD, str(error)
        self._failure = error
        self._fail_all(EngineDeadError(f"the engine is gone: {error}"))

    def _fail_all(self, error: EngineDeadError) -> None:
        for pending in self._pending.values():
            pending.generation.fail(error)
        self._pending.clear()
        for future in self._errands.values():
            if not future.done():
                future.set_exception(error)
        self._errands.clear()

    def _kill(self) -> None:
        if self._child is not None and self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)  # the processes of other ranks too

    async def _end_child(self) -> None:
        """Close the connection, at which the child ends, and see to it that it does."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        child = self._child
        if child is None:
            return
        ends_s = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < ends_s:
            await asyncio.sleep(0.01)
        self._kill()
        await asyncio.to_thread(child.wait)

    def _post(self, message: Any) -> None:
        if self._writer is not None and self._was_ready:
            self._writer.write(frame(self._encoder, message))

    # Requests

    async def generate(
        self,
        prompt: Any,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
    ) -> Generation:
        """Queue a prompt: text, token ids, or a dict with `prompt` or `prompt_token_ids`.

        Raises RequestError for what is no prompt, QueueFullError, EngineDeadError. What only the engine can refuse is
        raised by `Generation.accepted`.
        """
        self._check_open()
        text, ids = _parts(prompt)
        if ids is None:
            ids = await self._encode(text or "", special=True)
            self._check_open()
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need the tokenizer: leave out skip_tokenizer_init")
        if len(self._pending) >= self._max_queue:
            raise QueueFullError(
                f"{len(self._pending)} requests are unfinished and max_queue is {self._max_queue}: come again "
                "later, or raise max_queue"
            )
        key, number = next(self._keys), next(self._numbers)
        name = f"request-{key}" if request_id is None else request_id
        generation = Generation(name, number, ids, text, params, self.tokenizer, lambda one: self._drop(key))
        add = Add(key, number, ids, text, _given(params), priority, deadline_s)
        data = self._framed(add)
        self._pending[key] = _Pending(generation, add)
        if self._writer is not None and self._was_ready:
            self._writer.write(data)
        return generation

    def _framed(self, add: Add) -> bytes:
        try:
            return frame(self._encoder, add)
        except (OverflowError, TypeError, ValueError) as error:
            raise RequestError(f"a value of the request cannot be sent to the engine ({error}): lower it") from error

    async def score(self, prompt: Any, continuation: Any = None, adapter: str | None = None) -> ScoreOutput:
        """Log-probs of given tokens: see `LLM.score`."""
        head = await self._ids(prompt, special=True)
        tail = [] if continuation is None else await self._ids(continuation, special=False)
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, detokenize=False, adapter=adapter)
        generation = await self.generate({"prompt_token_ids": head + tail}, params)
        try:
            output = await generation.result()
        finally:
            await generation.aclose()
        tokens = output.prompt_token_ids
        positions = output.prompt_logprobs or [None]
        logprobs = [p[token].logprob if p else None for token, p in zip(tokens, positions, strict=True)]
        scored_from = 1 if continuation is None else len(head)
        total = sum(value for value in logprobs[scored_from:] if value is not None)
        return ScoreOutput(token_ids=tokens, logprobs=logprobs, scored_from=scored_from, total=total)

    async def abort(self, request_id: str) -> None:
        """End a request now; its reader gets a last update with the reason `abort`. Unknown ids are no error."""
        for key, pending in list(self._pending.items()):
            if pending.generation.request_id == request_id:
                self._post(Abort(key))

    async def check(self, timeout_s: float) -> float:
        """Seconds until the engine's loop answered, between two steps. Raises EngineDeadError."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ask("check")
        except TimeoutError as error:
            raise EngineDeadError(f"the engine did not answer within {timeout_s:g} s") from error
        return time.monotonic() - began_s

    async def load_adapter(self, name: str, source: str) -> None:
        """Load an adapter beside running requests: see `LLM.load_adapter`."""
        names = await self._ask("load_adapter", name, str(source))
        self._kept_adapters[name] = str(source)
        self.adapters = {one: one for one in names}

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter: see `LLM.unload_adapter`."""
        names = await self._ask("unload_adapter", name)
        self._kept_adapters.pop(name, None)
        self.adapters = {one: one for one in names}

    async def forget_prefixes(self) -> None:
        """Forget all cached prefixes that no request holds."""
        await self._ask("forget_prefixes")

    async def _ask(self, what: str, *arguments: Any) -> Any:
        if self.state is not EngineState.READY and self.state is not EngineState.DRAINING:
            raise EngineDeadError(f"the engine is {self.state.value}: {self.state_reason or self.stage}")
        key = next(self._keys)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._errands[key] = future
        self._post(Errand(key, what, list(arguments)))
        try:
            return await future
        finally:
            self._errands.pop(key, None)

    def _drop(self, key: int) -> None:
        if self._pending.pop(key, None) is not None:
            self._post(Abort(key))

    def _check_open(self) -> None:
        if self.state is EngineState.DRAINING:
            raise EngineDeadError("the engine is shutting down: send the request to another")
        if self.state is EngineState.DEAD:
            raise EngineDeadError(f"the engine is gone: {self.state_reason}")
        if not self._ready.is_set():
            raise EngineDeadError(f"the engine is starting ({self.stage}): come again in some seconds")

    async def _ids(self, prompt: Any, *, special: bool) -> list[int]:
        text, ids = _parts(prompt)
        return await self._encode(text or "", special=special) if ids is None else ids

    async def _encode(self, text: str, *, special: bool) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("a text needs the tokenizer: pass prompt_token_ids, or leave out skip_tokenizer_init")
        if len(text) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, special)
        return self.tokenizer.encode(text, special)


PROMPT_KEYS = ("prompt", "prompt_token_ids")


def _parts(prompt: Any) -> tuple[str | None, list[int] | None]:
    """Text and token ids of a prompt; one of them may be missing. Raises RequestError."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, dict):
        for name in prompt:
            if name not in PROMPT_KEYS:
                raise RequestError(unknown("entry of a prompt", name, PROMPT_KEYS))
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise RequestError(f"a prompt has the text {show(text)}; it must be a text or None")
        if ids is not None:
            return text, _plain_ids(ids)
        if text is not None:
            return text, None
    elif isinstance(prompt, Sequence):
        return None, _plain_ids(prompt)
    raise RequestError(f"a prompt is {show(prompt)}; give text, token ids, or a dict with prompt or prompt_token_ids")


def _plain_ids(ids: Any) -> list[int]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise RequestError(f"prompt_token_ids is {show(ids)}; it must be a list of token ids")
    made = []
    for place, value in enumerate(ids):
        token = whole_number(value)
        if token is None or not 0 <= token < 2**31:
            raise RequestError(f"the prompt has {show(value)} at place {place}; token ids are whole numbers from 0")
        made.append(token)
    return made


def _given(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not as by default: most are."""
    return {
        spec.name: value
        for spec in dataclasses.fields(SamplingParams)
        if (value := getattr(params, spec.name)) != spec.default
    }
