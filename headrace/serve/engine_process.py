"""The engine in a process of its own: python -m headrace.serve.engine_process FD, over a socket that it inherits.

One thread reads, one writes, and the main one steps: nothing about a token takes a lock, and a parent that does not
read delays no step. The process ends when its parent does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from headrace.config import EngineConfig
from headrace.errors import EngineDeadError, HeadraceError
from headrace.llm import LLM
from headrace.models.checkpoint import resolve_model
from headrace.params import SamplingParams
from headrace.progress import Stages
from headrace.request import Request
from headrace.serve.messages import (
    HEAD_BYTES,
    Abort,
    Accepted,
    Add,
    Answer,
    Delta,
    End,
    EngineInfo,
    EngineStats,
    Errand,
    Failed,
    Failure,
    Loading,
    Outputs,
    Refused,
    ToEngine,
    frame,
    length,
    packed,
)

log = logging.getLogger("headrace.engine_process")

STATS_S = 0.25


class _Wire:
    """The socket, with a thread a direction."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._encoder = msgspec.msgpack.Encoder()
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.inbox: deque[Any] = deque()
        self.changed = threading.Condition()
        self._writer = threading.Thread(target=self._write, name="headrace-send", daemon=True)
        self._writer.start()

    def send(self, message: Any) -> None:
        """Hand a message to the writer."""
        self._out.put(frame(self._encoder, message))

    def first(self) -> Any:
        """The first frame, which is the configuration."""
        return msgspec.msgpack.decode(self._read(length(self._read(HEAD_BYTES))))

    def listen(self) -> None:
        """From now on messages go to the inbox."""
        threading.Thread(target=self._listen, name="headrace-receive", daemon=True).start()

    def close(self) -> None:
        """Send what is left."""
        self._out.put(None)
        self._writer.join(5.0)

    def put(self, item: Any) -> None:
        """Something for the main thread."""
        with self.changed:
            self.inbox.append(item)
            self.changed.notify()

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while True:
            self.put(decoder.decode(self._read(length(self._read(HEAD_BYTES)))))

    def _read(self, count: int) -> bytes:
        parts = []
        while count:
            try:
                part = self._socket.recv(min(count, 1 << 20))
            except OSError:
                part = b""
            if not part:
                os._exit(0)  # the parent is gone: nobody wants anything any more, in whatever step this is
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _write(self) -> None:
        while (data := self._out.get()) is not None:
            try:
                self._socket.sendall(data)
            except OSError:
                os._exit(0)


class _ToldStages(Stages):
    """Tells the parent which stage begins."""

    def __init__(self, wire: _Wire) -> None:
        super().__init__(False)
        self._wire = wire

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Any]:
        self._wire.send(Loading(name))
        with super().stage(name, total) as done:
            yield done


@dataclasses.dataclass(eq=False)
class _Live:
    """A prompt that is being served."""

    key: int
    samples: list[Request]
    sent_tokens: list[int]
    sent_text: list[int]
    ended: set[int]


class _Loop:
    """Drain the inbox, step, send."""

    def __init__(self, llm: LLM, wire: _Wire) -> None:
        self._llm, self._wire = llm, wire
        self._front, self._engine = llm.front, llm.engine
        self._live: dict[str, _Live] = {}
        self._compilers = ThreadPoolExecutor(2, "headrace-prepare")
        self._aborted: set[int] = set()
        """Requests that were aborted while their grammar was compiled."""
        self._preparing: set[int] = set()
        self._steps = 0
        self._told_s = 0.0
        self._told_idle = False
        self._told_tokens = 0
        self._rate = 0.0
        self._out = Outputs([], [], [], [], None)

    def run(self) -> None:
        """Until the process ends."""
        inbox, changed = self._wire.inbox, self._wire.changed
        while True:
            if not self._engine.has_work:
                self._tell(force=not self._told_idle)
                with changed:
                    while not inbox:
                        changed.wait()
            while inbox:
                self._do(inbox.popleft())
            if self._engine.has_work:
                self._told_idle = False
                changed_requests = self._engine.step()
                self._steps += 1
                self._collect(changed_requests)
            self._tell()

    def _tell(self, *, force: bool = False) -> None:
        out = self._out
        now_s = time.monotonic()
        if force or now_s - self._told_s >= STATS_S:
            out.stats = self._stats(now_s)
            self._told_idle = not self._engine.has_work
        if out.accepted or out.refused or out.deltas or out.ends or out.stats is not None:
            self._wire.send(out)
            self._out = Outputs([], [], [], [], None)

    def _stats(self, now_s: float) -> EngineStats:
        engine, stats = self._engine, self._engine.stats
        span_s = now_s - self._told_s
        if span_s > 0:
            self._rate = (stats.output_tokens - self._told_tokens) / span_s
        self._told_s, self._told_tokens = now_s, stats.output_tokens
        held = sum(pool.held for pool in engine.cache.pools)
        idle = not engine.has_work
        return EngineStats(
            requests=stats.requests,
            finished=stats.finished,
            prompt_tokens=stats.prompt_tokens,
            output_tokens=stats.output_tokens,
            preemptions=stats.preemptions,
            aborts=stats.aborts,
            timeouts=stats.timeouts,
            swaps=stats.swaps,
            steps=self._steps,
            prefix_queries=engine.cache.queried_tokens,
            prefix_hits=engine.cache.hit_tokens,
            running=engine.n_running,
            waiting=engine.n_waiting,
            pages_in_use=held,
            pages_total=pages_of(self._llm),
            leaked=held if idle else 0,
            output_tok_s=0.0 if idle else self._rate,
        )

    # What the parent asks for

    def _do(self, item: Any) -> None:
        if isinstance(item, Add):
            self._add(item)
        elif isinstance(item, _Prepared):
            self._preparing.discard(item.add.key)
            if item.failure is not None:
                self._out.refused.append(Refused(item.add.key, item.failure))
            else:
                self._queue(item.add, item.params)
        elif isinstance(item, Abort):
            live = self._live.get(str(item.key))
            if live is not None:
                self._collect(self._engine.abort(str(item.key)))
            elif item.key in self._preparing:
                self._aborted.add(item.key)
        else:
            self._run_errand(item)

    def _add(self, item: Add) -> None:
        try:
            params = SamplingParams(**item.params)
        except HeadraceError as error:
            self._out.refused.append(Refused(item.key, Failure.of(error)))
            return
        if params.constraint is None:
            self._queue(item, params)
            return
        # A grammar may take long to compile: others go on meanwhile.
        self._preparing.add(item.key)
        self._compilers.submit(self._prepare, item, params)

    def _prepare(self, item: Add, params: SamplingParams) -> None:
        failure = None
        try:
            self._engine.prepare(params)
        except Exception as error:
            failure = Failure.of(error)
        self._wire.put(_Prepared(item, params, failure))

    def _queue(self, item: Add, params: SamplingParams) -> None:
        name = str(item.key)
        try:
            samples = self._front.add(
                (item.ids, item.text),
                params,
                request_id=name,
                number=item.number,
                priority=item.priority,
                deadline_s=item.deadline_s,
            )
        except EngineDeadError:
            raise
        except Exception as error:  # refused; the engine is unharmed
            self._out.refused.append(Refused(item.key, Failure.of(error)))
            return
        first = samples[0]
        kept = None if first.prompt_len == len(item.ids) else first.tokens[: first.prompt_len]
        self._out.accepted.append(Accepted(item.key, first.seed, kept))
        self._live[name] = _Live(item.key, samples, [0] * len(samples), [0] * len(samples), set())
        if item.key in self._aborted:
            self._aborted.discard(item.key)
            self._collect(self._engine.abort(name))

    def _run_errand(self, item: Errand) -> None:
        value: Any = None
        failure = None
        try:
            if item.what == "load_adapter":
                self._engine.load_adapter(*item.arguments)
                value = list(self._engine.adapters.loaded)
            elif item.what == "unload_adapter":
                self._engine.unload_adapter(*item.arguments)
                value = list(self._engine.adapters.loaded)
            elif item.what == "forget_prefixes":
                self._engine.forget_prefixes()
            elif item.what == "check":
                value = self._steps
                if not self._engine.has_work:
                    self._engine.check_idle()
        except HeadraceError as error:
            failure = Failure.of(error)
        self._wire.send(Answer(item.key, value, failure))

    # What the engine made

    def _collect(self, requests: Sequence[Request]) -> None:
        for request in requests:
            live = self._live.get(request.request_id)
            if live is None:
                continue
            if request.finish:
                self._front.close(request)
            self._out.deltas.append(self._delta(live, request))
            if request.finish:
                live.ended.add(request.sample)
                if len(live.ended) == len(live.samples):
                    self._end(live)

    def _delta(self, live: _Live, request: Request) -> Delta:
        place = request.sample
        begin = request.prompt_len + live.sent_tokens[place]
        tokens = request.tokens[begin:]
        positions = None
        if request.params.logprobs is not None:
            new = request.top_logprobs[live.sent_tokens[place] : live.sent_tokens[place] + len(tokens)]
            positions = [packed(position) for position in new]
        live.sent_tokens[place] += len(tokens)
        text = None
        if request.params.stop_strings:
            whole = self._front.text_of(request)
            text = whole[live.sent_text[place] :]
            live.sent_text[place] = len(whole)
        return Delta(
            live.key,
            place,
            tokens,
            text,
            positions,
            request.finish.reason if request.finish else None,
            request.stop_reason,
            None if request.error is None else Failure.of(request.error),
        )

    def _end(self, live: _Live) -> None:
        first, samples = live.samples[0], live.samples
        wants = first.params.prompt_logprobs is not None
        known = first.prompt_logprobs or [None]
        self._out.ends.append(
            End(
                live.key,
                [None if one is None else packed(one) for one in known] if wants else None,
                first.arrival_s,
                min((s.first_token_s for s in samples if s.first_token_s is not None), default=None),
                max((s.finish_s for s in samples if s.finish_s is not None), default=None),
                first.hit_tokens,
                sum(s.preemptions for s in samples),
                max(s.peak_cache_slots for s in samples),
                max(s.peak_cache_bytes for s in samples),
            )
        )
        self._front.forget(samples)
        del self._live[str(live.key)]


@dataclasses.dataclass
class _Prepared:
    """A request whose grammar is compiled, or cannot be."""

    add: Add
    params: SamplingParams
    failure: Failure | None


def pages_of(llm: LLM) -> int:
    """Pages of all pools that requests can have; the first of each belongs to nobody."""
    return sum(pool.n_pages - 1 for pool in llm.engine.cache.pools)


def info_of(llm: LLM) -> EngineInfo:
    """What was started."""
    config, engine = llm.config, llm.engine
    path = llm.path
    tokenizer = resolve_model(config.tokenizer, weights=False) if config.tokenizer else path
    return EngineInfo(
        model=path.name if config.model is None or Path(config.model).is_dir() else config.model,
        path=str(path),
        tokenizer_path=None if llm.tokenizer is None else str(tokenizer),
        max_model_len=engine.max_model_len,
        vocab_size=engine.vocab_size,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
        scheduler=config.scheduler,
        decoder=config.decoder,
        evictor=config.evictor,
        codec=config.codec,
        selector=config.selector,
        page_size=config.page_size,
        pages=pages_of(llm),
        cache_bytes=engine.allocated_bytes,
        max_num_seqs=config.max_num_seqs,
        row_budget=engine.budget,
        tensor_parallel_size=config.tensor_parallel_size,
        adapters=list(engine.adapters.loaded),
    )


def main(descriptor: int) -> int:
    """The whole process."""
    # A signal to the whole group is the parent's business: it drains, and this process ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="engine: %(name)s: %(message)s")
    wire = _Wire(socket.socket(fileno=descriptor))
    options = wire.first()
    wire.listen()
    try:
        config = EngineConfig(**options)
        llm = LLM(**dataclasses.asdict(config), stages=_ToldStages(wire))
        info = info_of(llm)
        wire.send(info)
        _Loop(llm, wire).run()
    except Exception as error:
        if not isinstance(error, HeadraceError):
            log.exception("the engine failed")
        wire.send(Failed(Failure.of(error)))
        wire.close()
    return 1


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(int(sys.argv[1])))
