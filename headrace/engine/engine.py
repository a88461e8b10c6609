"""The engine: admit requests, plan a step, run it, collect what came of it.

One request's way: `add` puts it into the waiting line; `step` takes a snapshot, lets the scheduler compose
grants, takes pages and a request index for newcomers, runs the rows, and appends what was committed; when
it ends, pages, index and data go back, so that an idle engine holds nothing. The engine knows scheduler,
decoder, processors and layer kinds only through their contracts.
"""

from __future__ import annotations

import bisect
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from headrace.cache.manager import CacheManager
from headrace.cache.states import StateStore, state_bytes
from headrace.cache.swap import SwapSpace
from headrace.checks import show
from headrace.config import EngineConfig
from headrace.decoding.base import Clocks, Demand
from headrace.engine.adapters import Adapters, LoadedAdapter
from headrace.engine.assembly import assemble
from headrace.engine.graphs import Pool, StepGraphs
from headrace.engine.intake import Intake, check_request_id, check_urgency
from headrace.engine.pieces import StepPieces
from headrace.engine.preempt import Preemption, SwapStats, swap_space_bytes
from headrace.engine.runner import Granted, Runner, StepReport
from headrace.engine.sizing import (
    MAX_ROWS,
    check_tables,
    choose_pages,
    fit_length,
    measure_knee,
    pieces_bytes,
    widest_budget,
)
from headrace.engine.steady import SteadyBatch
from headrace.engine.upkeep import Upkeep
from headrace.errors import InvariantError, NumericalError, RequestError
from headrace.kernels.draw import stream_key
from headrace.models.adapters import Adapter
from headrace.models.base import CausalLM
from headrace.params import MAX_SEED, SamplingParams
from headrace.parts import PROCESSORS, SCHEDULERS
from headrace.progress import Stages
from headrace.ranks import ONE, Ranks, command
from headrace.request import Finish, Logprob, PositionLogprobs, Request, State
from headrace.sampling.logprobs import TopLogprobs
from headrace.sampling.processors import LogitProcessor
from headrace.sampling.processors import Setup as ProcessorSetup
from headrace.scheduling.base import RequestView, Schedule, Snapshot, compose
from headrace.tables import RequestTable

log = logging.getLogger("headrace")

DIGESTED_TOKENS = 8
"""Newest tokens of each request that ranks compare behind a step."""

TokenHook = Callable[[Request, list[int]], str | None]
"""Called with a request and its new tokens; a string ends the request (a stop string was completed)."""


@dataclass
class EngineStats(SwapStats):
    """Counters since the start."""

    requests: int = 0
    finished: int = 0
    preemptions: int = 0
    aborts: int = 0
    timeouts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    forks: int = 0
    """Samples that began with the cache of their prompt's first sample."""
    chunks: int = 0
    """Grants that cut a prompt."""
    ahead: int = 0
    """Steps that were started before the one before had ended."""
    steady: int = 0
    """Steps that needed not be composed, because nothing had changed."""
    trigger_cuts: int = 0
    """Those of them that end where the cache is compacted."""


class _Flight(NamedTuple):
    """A step that was started."""

    granted: Sequence[Granted]
    report: Callable[[], StepReport]
    clocks: dict[int, Clocks] | SteadyBatch | None
    """Clocks behind it by arrival, if they can be foreseen."""
    began_s: float


class _Standing(NamedTuple):
    """What the scheduler has to know of a request beside its wishes; slots and pages by pool."""

    clocks: Clocks
    trigger: int
    kv_len: tuple[int, ...]
    pages: tuple[int, ...]
    idle: tuple[int, ...] = ()
    """Pages of a hit that nobody holds now."""


class Engine:
    """Generates tokens for requests, all of them a step at a time. Not thread-safe: one owner calls it."""

    def __init__(
        self,
        config: EngineConfig,
        model: CausalLM,
        *,
        eos_ids: Sequence[int] = (),
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks = ONE,
        spellings: Callable[[], Sequence[bytes]] | None = None,
        stages: Stages | None = None,
    ) -> None:
        """Size cache and step, and build the tables. `clock` gives seconds for deadlines and metrics. `ranks` are those
        among which the model's layers are divided. `spellings` gives the bytes of each token, for what has to know
        them. `stages` is told how long what takes. Raises ConfigError or CapacityError."""
        stages = stages or Stages()
        self.start_times_s = stages.seconds
        """Seconds of each stage of the start, those before the engine included."""
        self.config = config
        self.ranks = ranks
        self.clock = clock
        self.model = model
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = model.config.vocab_size
        self.adapters = Adapters(config, model.adapters)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        wished_len = min(config.max_model_len or model.max_model_len, model.max_model_len)
        check_tables(config, wished_len, self.device)
        with stages.stage("parts"):
            parts = assemble(config, model, wished_len, ranks)
        self.decoders, self.evictors = parts.decoders, parts.evictors
        self.codec, self.selector = parts.codec, parts.selector
        groups, state_groups = parts.groups, parts.state_groups
        fixed_bytes = state_bytes(state_groups, config.max_num_seqs, self.dtype)
        most_rows = config.max_num_batched_tokens or MAX_ROWS[self.device.type]
        most_rows = min(most_rows, config.max_num_seqs * wished_len)
        records = config.cuda_graphs and self.device.type == "cuda"
        arena_bytes, kept_bytes = 0, 0
        if records and not state_groups:
            with stages.stage("recorded memory"):
                arena_bytes, kept_bytes = pieces_bytes(model, most_rows, parts.target.form.turns)
        n_pages = choose_pages(config, groups, self.device, wished_len, fixed_bytes, ranks, kept_bytes)
        self.max_model_len = fit_length(config, model.max_model_len, n_pages)
        self.scheduler = SCHEDULERS[config.scheduler].make()
        self.processors: list[LogitProcessor] = [
            part.make(ProcessorSetup(self.vocab_size, self.device, spellings)) for part in PROCESSORS
        ]
        self.intake = Intake(config, model, parts, self.processors, self.adapters, self.eos_ids, self.max_model_len)
        self.table = RequestTable(
            config.max_num_seqs, self.max_model_len, [len(found) for found in parts.streams.values()], self.device
        )
        with stages.stage("cache"):
            self.cache = CacheManager(
                groups,
                n_pages=n_pages,
                page_size=config.page_size,
                max_reqs=config.max_num_seqs,
                max_len=self.max_model_len,
                device=self.device,
                # A hit would need the states at its end, and none are kept.
                prefix_caching=config.enable_prefix_caching and not state_groups,
                namespace=f"{[stream.model.config for stream in parts.streams]!r} {self.dtype} page {config.page_size} "
                f"codec {config.codec}{' parity' * config.parity}",
                ranks=ranks,
            )
        if config.enable_prefix_caching and state_groups:
            log.info("the model has layers with fixed states: no prompt is found in the prefix cache")
        self.states = StateStore(state_groups, max_reqs=config.max_num_seqs, dtype=self.dtype, device=self.device)
        most_rows = min(most_rows, config.max_num_seqs * self.max_model_len)
        pool = Pool(self.device, arena_bytes) if records else None
        graphs = StepGraphs(self.device, most_rows, pool) if records else None
        self.runner = Runner(list(parts.streams), self.cache, self.table, self.decoders, most_rows, self.states, graphs)
        if records:
            n_groups = len(self.runner.target.groups)
            self.runner.pieces = StepPieces(self.device, most_rows, n_groups, pool)
        self.runner.witness = ranks.witness if config.check_invariants and graphs is None else None
        asked = config.async_scheduling
        self.plans_ahead = self.device.type == "cuda" if asked is None else asked
        self._flight: _Flight | None = None
        self._steady: SteadyBatch | None = None
        self._version = 0
        """Grows when a request comes or goes: a steady batch of an older version is over."""
        self._landed_s = 0.0
        self.upkeep = Upkeep(
            self.cache, self.table, self.evictors, self.codec, self.selector, self.runner.target.groups
        )
        with stages.stage("warm-up"):
            self.runner.warm_up()
        self.step_times_s: dict[int, float] = {}
        self.budget = most_rows
        if config.max_num_batched_tokens is None:
            with stages.stage("row budget"):
                choose = widest_budget if self.device.type == "cuda" else measure_knee
                self.budget, self.step_times_s = choose(
                    lambda rows: ranks.agree(self.runner.time_step(rows)), most_rows
                )
        self.stats = EngineStats()
        limit_bytes = swap_space_bytes(config, self.device.type) // ranks.size
        self.swap = SwapSpace(self.cache, self.table, self.states, limit_bytes=limit_bytes)
        timed = min(self.budget, max(self.step_times_s, default=0))
        row_s = self.step_times_s[timed] / timed if timed else None
        with stages.stage("trial copy"):
            self.preemption = Preemption(config, self.swap, self.upkeep, row_s, self.stats, ranks)
        self.on_token: TokenHook | None = None
        self._free_indices = list(range(config.max_num_seqs - 1, -1, -1))
        self._running: dict[int, Request] = {}
        self._processors: dict[int, list[LogitProcessor]] = {}
        self._waiting: list[Request] = []
        self._by_id: dict[str, list[Request]] = {}
        self._arrivals = 0
        self._next_deadline_s = math.inf  # no deadline of an unfinished request is earlier
        self._said_equal = False

    # Requests come and go

    @command
    def add(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        prompt: str | None = None,
        number: int | None = None,
        priority: int = 0,
        deadline_s: float | None = None,
        arrival_s: float | None = None,
    ) -> list[Request]:
        """Queue the `n` samples of a prompt. Raises RequestError for what can never be served.

        `number` keys the noise when the parameters bring no seed: the request's index in its batch. Requests are
        served in the order of (priority, arrival), the lower number first. One that is not finished `deadline_s`
        seconds after its arrival ends at the next step with the tokens it has and the reason `timeout`. `arrival_s`:
        when it came, on the engine's clock, if that was before now.
        """
        check_urgency(priority, deadline_s)
        check_request_id(request_id)
        tokens = self.intake.check(prompt_ids, params)
        arrival_s = self.ranks.agree(self.clock()) if arrival_s is None else arrival_s
        if request_id in self._by_id:
            raise RequestError(f"request_id {show(request_id)} is in use: choose another one")
        seed = params.seed
        if seed is None:
            high, low = stream_key(self.config.seed % MAX_SEED, number if number is not None else self._arrivals, (0,))
            seed = ((high % 2**32) << 32) | (low % 2**32)
        samples = [
            self.intake.request(
                tokens,
                params,
                seed,
                sample,
                request_id=request_id,
                prompt=prompt,
                priority=priority,
                deadline_at_s=None if deadline_s is None else arrival_s + deadline_s,
                arrival_s=arrival_s,
            )
            for sample in range(params.n)
        ]
        if params.n > 1 and params.greedy and not self._said_equal:
            self._said_equal = True
            log.warning(
                "n is %d and temperature is 0: greedy samples are all equal; give a temperature, or leave out n",
                params.n,
            )
        for request in samples:
            # A fork would need the states at the end of the prompt, and they have gone on.
            request.parent = samples[0] if request.sample and not self.states.groups else None
            self._enqueue(request)
        return samples

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The tokens of a prompt that could be served with these parameters: see `Intake.check`."""
        return self.intake.check(prompt_ids, params)

    def prepare(self, params: SamplingParams) -> None:
        """Make what a request with these parameters needs and what takes long: see `Intake.prepare`."""
        self.intake.prepare(params)

    @command
    def resume(self, record: dict[str, Any]) -> Request:
        """Queue a request from its portable record; it continues with the tokens it would have had.

        Raises RequestError for a record that is damaged, of another release, model or cache, or finished.
        """
        params = self.intake.check_record(record)
        if any(r.sample == record["sample"] for r in self._by_id.get(record["request_id"], ())):
            raise RequestError(
                f"request_id {show(record['request_id'])} is in use by sample {record['sample']}: abort that one first"
            )
        request = self.intake.resumed(record, params)
        request.arrival_s = self.ranks.agree(self.clock())
        left_s = record["deadline_left_s"]
        request.deadline_at_s = None if left_s is None else request.arrival_s + left_s
        self._enqueue(request)
        return request

    def load_adapter(self, name: str, adapter: str | os.PathLike[str] | Adapter) -> LoadedAdapter:
        """Load an adapter beside running requests: a directory, a hub id, or what `read_adapter` gave.

        Raises AdapterError, CheckpointError or UnsupportedModelError, with nothing changed.
        """
        loaded = self.adapters.load(name, adapter)
        self._version += 1
        return loaded

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises AdapterError if it is not loaded, or unfinished requests use it."""
        self.adapters.unload(name, (request for samples in self._by_id.values() for request in samples))
        self._version += 1

    def export(self, request: Request) -> dict[str, Any]:
        """The portable record of a request as it stands now; the request itself goes on."""
        return request.to_record(self.clock())

    @command
    def abort(self, request_id: str) -> list[Request]:
        """End all samples of a request now. Unknown or finished ids are no error. Returns those that ended."""
        check_request_id(request_id)
        ended = list(self._by_id.get(request_id, ()))
        for request in ended:
            self.stats.aborts += 1
            self._finish(request, Finish.ABORT)
        if not self._running:
            self._land()
        return ended

    @command
    def forget_prefixes(self) -> None:
        """Forget all cached prefixes that no request holds (new weights, benchmarks)."""
        self.cache.drop_idle()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, or a step is running."""
        return bool(self._running or self._waiting or self._flight)

    @property
    def running(self) -> list[Request]:
        """The requests that hold a request index, in the order of their admission."""
        return list(self._running.values())

    @property
    def n_running(self) -> int:
        """Requests that hold a request index."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests in the waiting line, preempted ones included."""
        return len(self._waiting)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the cache: all pages and all fixed states."""
        return self.cache.allocated_bytes + self.states.allocated_bytes

    # One step

    @command
    def step(self) -> list[Request]:
        """Run one step. Returns the requests whose new tokens or ends are known since the last call.

        Planning ahead, it starts a step before it waits for the one before, if that step's outcome can be foreseen so
        far that no result depends on it; otherwise it waits first.
        """
        changed = self._end_late()
        granted = self._steady_step()
        if granted is None:
            schedule = self._schedule_ahead() if self._flight else None
            if schedule is None:
                changed += self._land()
                schedule = self._schedule()
            granted = self._admit(schedule)
            clocks: dict[int, Clocks] | SteadyBatch | None = self._foreseen(granted)
            self._steady = self._find_steady(schedule, granted, clocks)
        else:
            clocks = self._steady
            self.stats.steady += 1
        if granted:
            self.table.flush()
            self.cache.flush()
            before, began_s = self._flight, time.perf_counter()
            report = self.runner.launch(granted, self._processor_rows(granted))
            self._flight = _Flight(granted, report, clocks, began_s)
            if before:
                self.stats.ahead += 1
                changed += self._collect(before)
        if not (granted and self.plans_ahead):
            changed += self._land()
        if self.config.check_invariants and not self._flight:
            self.audit()
        return changed

    def _steady_step(self) -> Sequence[Granted] | None:
        """Grants that need not be composed: those of the step before, one token further on."""
        steady, self._steady = self._steady, None
        if steady is None or steady.version != self._version:
            return None
        granted = steady.next_step(1 if self._flight else 0)
        if granted is not None:
            self._steady = steady
        return granted

    def _find_steady(
        self, schedule: Schedule, granted: Sequence[Granted], clocks: dict[int, Clocks] | SteadyBatch | None
    ) -> SteadyBatch | None:
        """What follows a step, if the same follows until something changes."""
        if not granted or len(granted) < len(self._running) or schedule.admitted or not self.scheduler.steady:
            return None
        if self.plans_ahead and clocks is None:
            return None
        if any(g.rows > 1 or g.pending > 1 or not self.decoders[g.request.decoder].steady for g in granted):
            return None
        if self._waiting:
            # Nobody can start while all seats are taken by requests of no lower priority.
            lowest = max(request.priority for request in self._running.values())
            if len(self._running) < self.config.max_num_seqs or self._waiting[0].priority < lowest:
                return None
        return SteadyBatch(granted, self.cache, self._version)

    def _foreseen(self, granted: Sequence[Granted]) -> dict[int, Clocks] | None:
        """Clocks behind a step, by arrival; None if those of one request cannot be foreseen."""
        if not self.plans_ahead:
            return None
        foreseen: dict[int, Clocks] = {}
        for request, rows, ahead, pending in granted:
            n_done = request.n_done + ahead
            before = Clocks(n_done + pending, n_done, request.drafted, request.limit)
            clocks = self.decoders[request.decoder].foresee(before, rows)
            if clocks is None or self._processors[request.index] or request.scores_prompt:
                return None
            if clocks.n_done >= request.trigger:
                return None  # its cache is compacted first
            foreseen[request.arrival] = clocks
        return foreseen

    def _schedule_ahead(self) -> Schedule | None:
        """Grants beside the running step; None if they have to wait for its end."""
        assert self._flight is not None
        if self._flight.clocks is None:
            return None
        self.upkeep.retry()
        schedule = compose(self.scheduler, self.snapshot(), patient=True)
        return schedule if schedule.grants else None

    def _land(self) -> list[Request]:
        """Wait for the running step, if there is one, and collect it."""
        flight, self._flight = self._flight, None
        return self._collect(flight) if flight else []

    def _clocks(self, request: Request) -> Clocks:
        """Clocks of a running request behind all that was started."""
        ahead = self._flight and self._flight.clocks and self._flight.clocks.get(request.arrival)
        return ahead or Clocks(request.n_tok, request.n_done, request.drafted, request.limit)

    def _end_late(self) -> list[Request]:
        """End the requests whose deadline has passed; returns them."""
        if self._next_deadline_s == math.inf:
            return []
        now_s = self.ranks.agree(self.clock())
        if now_s < self._next_deadline_s:
            return []
        timed = [r for group in self._by_id.values() for r in group if r.deadline_at_s is not None]
        late = [r for r in timed if r.deadline_at_s is not None and r.deadline_at_s <= now_s]
        for request in late:
            self.stats.timeouts += 1
            self._finish(request, Finish.TIMEOUT)
        open_s = [r.deadline_at_s for r in timed if r.deadline_at_s is not None and not r.finish]
        self._next_deadline_s = min(open_s, default=math.inf)
        return late

    def _schedule(self) -> Schedule:
        """Compose grants; preempt until the composer is content."""
        last: tuple[float, float] = (math.inf, math.inf)
        while True:
            self.upkeep.retry()
            schedule = compose(self.scheduler, self.snapshot(last))
            if schedule.victim is None:
                return schedule
            if schedule.served is not None:
                last = min(last, schedule.served)
            self._preempt(self._running[schedule.victim])

    def snapshot(self, last: tuple[float, float] = (math.inf, math.inf)) -> Snapshot:
        """What the scheduler sees. Waiting requests beyond the budget are left out: they could get no row. Those
        without a seat too, unless a request of lower priority has one, and those behind the rank `last`."""
        waiting: list[RequestView] = []
        wanted = 0
        seats = self.config.max_num_seqs - len(self._running)
        lowest = max((r.priority for r in self._running.values()), default=-math.inf)
        for request in self._waiting:
            if (len(waiting) >= seats and request.priority >= lowest) or wanted >= self.budget:
                break
            if request.rank > last:
                break
            if self._parent_is_due(request):
                continue
            waiting.append(self._view(request))
            wanted += waiting[-1].most
        return Snapshot(
            running=[self._view(request) for request in self._running.values()],
            waiting=waiting,
            free_pages=self.cache.available,
            page_size=self.cache.page_size,
            budget=self.budget,
            max_running=self.config.max_num_seqs,
        )

    def _view(self, request: Request) -> RequestView:
        running = request.index >= 0
        clocks, trigger, kv_len, pages, idle = self._standing(request)
        demand = self.decoders[request.decoder].demand(clocks)
        if running and clocks.n_tok > request.n_tok and clocks.n_tok >= request.limit:
            demand = Demand(0, 0)  # the running step ends it
        # No row passes a trigger: behind it rows see what the upkeep leaves. Rows of a tree take slots too.
        most = min(max(demand.least, min(demand.most, trigger - clocks.n_done)), request.limit - clocks.n_done)
        return RequestView(
            key=request.arrival,
            arrival=request.arrival,
            running=running,
            least=demand.least,
            most=most,
            scratch=demand.scratch,
            most_slots=request.limit,
            decoding=running and clocks.n_tok - clocks.n_done == 1,
            kv_len=kv_len,
            pages=pages,
            idle_hits=idle,
            priority=request.priority,
            most_pages=self.upkeep.most_pages(self.budget + demand.scratch),
            waits=running and self.upkeep.waits(request),
        )

    def _standing(self, request: Request) -> _Standing:
        """Where a request stands behind all that was started, or where an admission would put it."""
        clocks = self._clocks(request)
        if request.index >= 0:
            slots = self.cache.pool_slots(request, clocks.n_done - request.n_done)
            return _Standing(clocks, request.trigger, slots, tuple(map(len, request.pages)))
        spilled = self.swap.get(request)
        if spilled is not None:
            pages, idle = self.swap.view(request, spilled)
            clocks = clocks._replace(n_done=spilled.n_done)
            return _Standing(clocks, spilled.trigger, tuple(spilled.slots), pages, idle)
        done, idle = request.prompt_len - 1, ()
        if self._parent_to_fork(request) is None:
            done, idle = self.cache.look_up(request)
        return _Standing(
            clocks._replace(n_done=done),
            self.upkeep.first_trigger(request, done),
            (done,) * len(self.cache.pools),
            self.cache.prefix_pages(done),
            idle,
        )

    def _parent_is_due(self, request: Request) -> bool:
        """Whether the first sample of the prompt is about to make the cache that this one can share."""
        parent = request.parent
        if parent is None or parent.state is State.FINISHED or request.n_tok > request.prompt_len:
            return False
        if self.swap.get(request) is not None:
            return False  # it has a cache of its own to come back to
        if request.scores_prompt or request.prompt_len > request.exact_len:
            return False
        return parent.n_done < request.prompt_len - 1

    def _parent_to_fork(self, request: Request) -> Request | None:
        """The first sample, if its cache holds the prompt and this one may start from it."""
        parent = request.parent
        if parent is None or request.index >= 0 or parent.index < 0 or request.scores_prompt:
            return None
        fresh = request.n_tok == request.prompt_len
        if not fresh or not parent.n_done >= request.prompt_len - 1 > 0 or request.prompt_len > request.exact_len:
            return None
        return parent if self.cache.can_fork(parent, request.prompt_len - 1) else None

    def _admit(self, schedule: Schedule) -> list[Granted]:
        """Take indices and pages for the grants."""
        newcomers: list[Request] = []
        for key in schedule.admitted:
            place = next(i for i, r in enumerate(self._waiting) if r.arrival == key)  # near the front
            newcomers.append(self._waiting.pop(place))
        self.swap.claim(newcomers)
        for request in newcomers:
            parent = self._parent_to_fork(request)
            spilled = self.swap.get(request)
            request.move(State.RUNNING)
            request.index = self._free_indices.pop()
            self._running[request.arrival] = request
            if spilled is not None:
                self.preemption.come_back(request, request.index)
            elif parent is not None:
                # The last token of the prompt is evaluated again: each sample draws from its logits for itself.
                self.cache.fork(parent, request, request.index, request.prompt_len - 1)
                self.stats.forks += 1
            else:
                self.cache.admit(request, request.index)
            if spilled is None:
                request.trigger = self.upkeep.first_trigger(request, request.n_done)
                self.states.admit(request.index)
            self.table.admit(request, request.index, spilled.clocks if spilled else None)
            self._processors[request.index] = [p for p in self.processors if p.wants(request.params)]
            for processor in self._processors[request.index]:
                processor.admit(request)
            self.decoders[request.decoder].admit(request)
        granted = []
        for key, rows in schedule.grants.items():
            request = self._running[key]
            clocks = self._clocks(request)
            n_done, pending = clocks.n_done, clocks.n_tok - clocks.n_done
            demand = self.decoders[request.decoder].demand(clocks)
            ahead = n_done - request.n_done
            self.cache.reserve(request, ahead + min(rows + demand.scratch, request.limit - n_done))
            self.stats.chunks += rows < pending
            self.stats.trigger_cuts += rows < pending and n_done + rows == request.trigger
            granted.append(Granted(request, rows, ahead, pending))
        # Requests of one decoder stand together; sorting keeps their order.
        order = {name: place for place, name in enumerate(self.decoders)}
        return sorted(granted, key=lambda g: order[g.request.decoder])

    def _processor_rows(self, granted: Sequence[Granted]) -> list[tuple[LogitProcessor, list[int]]]:
        """Each processor that is wanted in this step with its rows, in the order of registration."""
        if not any(self._processors.values()):
            return []
        active = [self._processors[g.request.index] for g in granted]
        rows = [(p, [i for i, wanted in enumerate(active) if p in wanted]) for p in self.processors]
        return [(processor, picked) for processor, picked in rows if picked]

    def _collect(self, flight: _Flight) -> list[Request]:
        """Wait for a step. Append what was committed, publish whole pages, end what has ended."""
        report = flight.report()
        emit, n_kv, given = report.emit, report.n_kv, report.given
        landed_s = time.perf_counter()
        # A step that was started beside the one before began to run when that one had ended.
        seconds = landed_s - max(flight.began_s, self._landed_s)
        self._landed_s = landed_s
        self.preemption.costs.saw_step(sum(g.rows for g in flight.granted), seconds)
        now_s = self.clock()
        changed: list[Request] = []
        for i, granted in enumerate(flight.granted):
            request = granted.request
            if request.finish:
                continue  # it was aborted, or ended in the step before this one was planned to follow
            request.n_done += n_kv[i]
            if i in given:
                if not request.prompt_logprobs:
                    request.prompt_logprobs.append(None)
                request.prompt_logprobs.extend(_positions(given[i], request.tokens, len(request.prompt_logprobs)))
            new, finish = emit[i], Finish(report.finish[i]) if report.finish[i] else Finish.NONE
            request.drafted = report.drafted[i]
            stop_text = self._take(request, new, report, i, now_s) if new else None
            if stop_text is not None:
                request.stop_reason = stop_text
                finish = Finish.STOP
            elif finish is Finish.STOP and new[-1] not in self.eos_ids:
                request.stop_reason = new[-1]
            if request.n_done < request.n_tok:  # otherwise rows behind a stop string were evaluated
                read_only = self.cache.publish(request)
                if read_only:
                    self.table.set_read_only(request.index, read_only)
            if finish is Finish.NONE:
                self.upkeep.after_commit(request)
            else:
                self._finish(request, finish)
            if new or finish is not Finish.NONE:
                changed.append(request)
        return changed

    def _take(self, request: Request, new: list[int], report: StepReport, i: int, now_s: float) -> str | None:
        """Append emitted tokens one by one, up to the one that completes a stop string; returns that string."""
        if request.first_token_s is None:
            request.first_token_s = now_s
        stop_text = None
        first, processors = request.n_tok, self._processors[request.index]
        for token, logprob in zip(new, report.logprob[i], strict=True):
            request.tokens.append(token)
            request.token_logprobs.append(logprob)
            for processor in processors:
                processor.observe(request.index, token)
            if self.on_token:
                stop_text = self.on_token(request, [token])
                if stop_text is not None:
                    break
        taken = request.n_tok - first
        self.stats.output_tokens += taken
        if i in report.top:
            request.top_logprobs.extend(_positions(report.top[i], request.tokens, first)[:taken])
        return stop_text

    # Ends

    def _preempt(self, request: Request) -> None:
        """Give back everything but the tokens; the request waits in its old place. It is evaluated again, unless its
        cache has been copied to host memory."""
        self.preemption.leave(request)
        self._leave(request)
        request.move(State.PREEMPTED)
        request.preemptions += 1
        self.stats.preemptions += 1
        bisect.insort(self._waiting, request, key=_rank)

    def _finish(self, request: Request, finish: Finish) -> None:
        if request.index >= 0:
            self._leave(request)
        else:
            self._waiting.remove(request)
            self.swap.drop(request)
        request.finish = finish
        request.finish_s = self.clock()
        if finish is Finish.ERROR:
            request.error = NumericalError(
                f"request {request.request_id}: the logits of token {request.n_tok} hold NaN or nothing finite, so no "
                "token can be drawn: check the weights, what the request's parameters forbid, or use a wider dtype"
            )
        request.move(State.FINISHED)
        self.stats.finished += 1
        siblings = self._by_id[request.request_id]
        siblings.remove(request)
        if not siblings:
            del self._by_id[request.request_id]

    def _leave(self, request: Request) -> None:
        """Give back pages, data and index."""
        self.upkeep.forget(request)
        self.cache.release(request)
        self.table.release(request.index)
        self.states.release(request.index)
        for processor in self._processors.pop(request.index):
            processor.release(request.index)
        self.decoders[request.decoder].release(request)
        request.drafted = 0
        del self._running[request.arrival]
        self._version += 1
        self._free_indices.append(request.index)
        request.index = -1

    # Books

    def digest(self, result: Any) -> int:
        """A number of what a command returned, tokens included, and of the free pages: the same on every rank."""
        requests = [r for r in result if isinstance(r, Request)] if isinstance(result, list) else []
        brought = [
            (r.arrival, r.n_tok, r.n_done, r.drafted, int(r.finish), *r.tokens[-DIGESTED_TOKENS:]) for r in requests
        ]
        # Whole numbers alone: the hash of anything else differs from process to process.
        return hash((*brought, len(self._running), len(self._waiting), self._arrivals, *self.cache.available))

    def audit(self) -> None:
        """Raise InvariantError unless pages, indices and clocks agree with the requests that hold them.

        Between two calls of `step` a step may be running, whose clocks nobody knows: then it is InvariantError too.
        """
        if self._flight:
            raise InvariantError("the books can only be checked when no step is running: call step once more")
        self.table.flush()
        self.cache.flush()
        running = list(self._running.values())
        self.cache.audit(running)
        self.states.audit({request.index: request.n_done for request in running})
        self.swap.audit(self._waiting)
        # Once for all requests: each look at a table of the device waits for it.
        i_B = torch.tensor([request.index for request in running], dtype=torch.int64, device=self.device)
        kv_len_GB = self.table.kv_len_of(0)
        n_tok, n_done, adapter, trigger, *kv_len = (
            torch.stack([self.table.n_tok, self.table.n_done, self.table.adapter, self.table.trigger, *kv_len_GB])
            .index_select(1, i_B)
            .tolist()
        )
        history = self.table.hist.index_select(0, i_B).tolist()
        taken = {request.index for request in running}
        if len(taken) + len(self._free_indices) != self.config.max_num_seqs or taken & set(self._free_indices):
            raise InvariantError("request indices are lost or held twice")
        for i, request in enumerate(running):
            clocks, lengths = (n_tok[i], n_done[i]), [column[i] for column in kv_len]
            expected = list(map(request.slots, range(len(lengths))))
            if clocks != (request.n_tok, request.n_done) or lengths != expected:
                raise InvariantError(
                    f"request {request.request_id}: clocks {clocks}, lengths {lengths} on the device; "
                    f"{request.n_tok}, {request.n_done}, {expected} in the books"
                )
            if not request.n_done <= request.n_tok <= request.limit or request.n_done > request.trigger:
                raise InvariantError(f"request {request.request_id}: clocks out of order")
            if adapter[i] != request.adapter:
                raise InvariantError(f"request {request.request_id}: its adapter differs from the device's")
            if trigger[i] != request.trigger:
                raise InvariantError(f"request {request.request_id}: its trigger differs from the device's")
            if request.n_done == request.trigger and not self.upkeep.waits(request):
                raise InvariantError(f"request {request.request_id} has passed a trigger without upkeep")
            if history[i][: request.n_tok] != request.tokens:
                raise InvariantError(f"request {request.request_id}: the history differs from the tokens")

    def check_idle(self) -> None:
        """Raise InvariantError unless an engine without work holds nothing."""
        self.audit()
        if not self.has_work and (held := [pool.held for pool in self.cache.pools]) and any(held):
            raise InvariantError(f"the engine is idle and holds pages: {held}")
        if not self.has_work and (len(self._free_indices) != self.config.max_num_seqs or self._by_id):
            raise InvariantError("the engine is idle and holds request indices")
        if not self.has_work and len(self.swap):
            raise InvariantError(f"the engine is idle and holds the caches of {len(self.swap)} requests in host memory")

    # Helpers

    def _enqueue(self, request: Request) -> None:
        request.arrival = self._arrivals
        self._arrivals += 1
        self._version += 1
        if request.deadline_at_s is not None:
            self._next_deadline_s = min(self._next_deadline_s, request.deadline_at_s)
        self.stats.requests += 1
        self.stats.prompt_tokens += request.prompt_len
        bisect.insort(self._waiting, request, key=_rank)
        self._by_id.setdefault(request.request_id, []).append(request)


def _rank(request: Request) -> tuple[int, int]:
    return request.rank


def _positions(top: TopLogprobs, tokens: Sequence[int], first: int) -> list[PositionLogprobs]:
    """One dict a row: the token itself, then the top ones with their ranks. Row i is the token at first + i."""
    columns = (top.ids_MN.tolist(), top.logprobs_MN.tolist(), top.chosen_M.tolist(), top.rank_M.tolist())
    positions = []
    for i, (ids, values, chosen, rank) in enumerate(zip(*columns, strict=True)):
        position: PositionLogprobs = {tokens[first + i]: Logprob(chosen, rank)}
        for place, (token, value) in enumerate(zip(ids, values, strict=True)):
            position.setdefault(token, Logprob(value, place + 1))
        positions.append(position)
    return positions
