"""The engine: admit requests, plan a step, run it, collect what came of it.

One request's way: `add` puts it into the waiting line; `step` takes a snapshot, lets the scheduler compose
grants, takes pages and a request index for newcomers, runs the rows, and appends what was committed; when
it ends, pages, index and data go back, so that an idle engine holds nothing. The engine knows scheduler,
decoder, processors and layer kinds only through their contracts.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from headrace.cache.manager import CacheGroup, CacheManager, group_layers
from headrace.cache.states import StateStore, check_decoder, group_states, state_bytes
from headrace.cache.swap import SwapSpace
from headrace.checks import show, whole_number
from headrace.codecs.base import Codec, load_codecs
from headrace.codecs.forms import Form, Selected
from headrace.config import EngineConfig
from headrace.decoding.base import Clocks, Decoder, Demand, Setup
from headrace.engine.adapters import Adapters, LoadedAdapter
from headrace.engine.graphs import Pool, StepGraphs
from headrace.engine.pieces import StepPieces
from headrace.engine.preempt import Preemption, SwapStats, swap_space_bytes
from headrace.engine.runner import Granted, Runner, StepReport, Stream
from headrace.engine.sizing import MAX_ROWS, check_tables, choose_pages, fit_length, measure_knee, pieces_bytes
from headrace.engine.steady import SteadyBatch
from headrace.engine.upkeep import Upkeep
from headrace.errors import ConfigError, InvariantError, NumericalError, RequestError
from headrace.eviction.base import Evictor, Unit, budget_of, finest, load_evictors
from headrace.kernels.draw import stream_key
from headrace.models.adapters import Adapter
from headrace.models.base import CausalLM
from headrace.params import MAX_SEED, SamplingParams
from headrace.parts import DECODERS, PROCESSORS, SCHEDULERS
from headrace.ranks import ONE, Ranks, command
from headrace.request import Finish, Logprob, PositionLogprobs, Request, State, check_record
from headrace.sampling.logprobs import TopLogprobs
from headrace.sampling.processors import LogitProcessor
from headrace.sampling.processors import Setup as ProcessorSetup
from headrace.scheduling.base import RequestView, Schedule, Snapshot, compose
from headrace.selection.base import Selector, load_selector
from headrace.step import LayerState
from headrace.tables import MAX_STOP_IDS, RequestTable

log = logging.getLogger("headrace")

PLAIN = next(iter(DECODERS)).name
"""The decoder that every engine has: the first one registered."""

PARITY_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""By device the types for which all kernels of a model have a fixed order of sums."""

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
    ) -> None:
        """Size cache and step, and build the tables. `clock` gives seconds for deadlines and metrics. `ranks` are those
        among which the model's layers are divided. `spellings` gives the bytes of each token, for what has to know
        them. Raises ConfigError or CapacityError."""
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
        setup = Setup(config, model, config.max_num_seqs, wished_len, self.device)
        self.decoders: dict[str, Decoder] = {name: DECODERS[name].make(setup) for name in _decoder_names(config)}
        self.evictors = load_evictors(config, model.layer_states())
        own_models = [own for decoder in self.decoders.values() for own in decoder.models]
        self.codec, own_codec = load_codecs(config, self.dtype, model.layer_states())
        self.selector = load_selector(config, model.layer_states())
        check_cache_parts(config, self.codec, self.selector, self.evictors)
        check_ranks(ranks.size, config, model.layer_states(), self.selector)
        if config.parity:
            check_parity(config, model, self._form(), self.evictors, self.decoders)
        codecs = [self.codec, *(own_codec for _ in own_models)]
        # Decoders' own models keep and read everything.
        forms = [self._form(), *(own_codec.form(self.device) for _ in own_models)]
        unit = finest(list(self.evictors.values()))
        streams = _streams([model, *own_models], codecs, forms, unit)
        groups = [group for found in streams.values() for group in found]
        state_groups = group_states(model.layer_states())
        for name, part in self.decoders.items():
            own_states = [state for own in part.models for state in own.layer_states()]
            check_decoder(name, state_groups, drafts=part.e_max - 1 + part.n_soft, tree=part.tree, own=own_states)
        fixed_bytes = state_bytes(state_groups, config.max_num_seqs, self.dtype)
        most_rows = config.max_num_batched_tokens or MAX_ROWS[self.device.type]
        most_rows = min(most_rows, config.max_num_seqs * wished_len)
        records = config.cuda_graphs and self.device.type == "cuda"
        arena_bytes, kept_bytes = 0, 0
        if records and not state_groups:
            arena_bytes, kept_bytes = pieces_bytes(model, most_rows, forms[0].turns)
        n_pages = choose_pages(config, groups, self.device, wished_len, fixed_bytes, ranks, kept_bytes)
        self.max_model_len = fit_length(config, model.max_model_len, n_pages)
        self.scheduler = SCHEDULERS[config.scheduler].make()
        self.processors: list[LogitProcessor] = [
            part.make(ProcessorSetup(self.vocab_size, self.device, spellings)) for part in PROCESSORS
        ]
        self.table = RequestTable(
            config.max_num_seqs, self.max_model_len, [len(found) for found in streams.values()], self.device
        )
        self.cache = CacheManager(
            groups,
            n_pages=n_pages,
            page_size=config.page_size,
            max_reqs=config.max_num_seqs,
            max_len=self.max_model_len,
            device=self.device,
            # A hit would need the states at its end, and none are kept.
            prefix_caching=config.enable_prefix_caching and not state_groups,
            namespace=f"{[stream.model.config for stream in streams]!r} {self.dtype} page {config.page_size} "
            f"codec {config.codec}{' parity' * config.parity}",
            ranks=ranks,
        )
        if config.enable_prefix_caching and state_groups:
            log.info("the model has layers with fixed states: no prompt is found in the prefix cache")
        self.states = StateStore(state_groups, max_reqs=config.max_num_seqs, dtype=self.dtype, device=self.device)
        most_rows = min(most_rows, config.max_num_seqs * self.max_model_len)
        pool = Pool(self.device, arena_bytes) if records else None
        graphs = StepGraphs(self.device, most_rows, pool) if records else None
        self.runner = Runner(list(streams), self.cache, self.table, self.decoders, most_rows, self.states, graphs)
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
        self.runner.warm_up()
        self.step_times_s: dict[int, float] = {}
        self.budget = most_rows
        if config.max_num_batched_tokens is None:
            self.budget, self.step_times_s = measure_knee(
                lambda rows: ranks.agree(self.runner.time_step(rows)), most_rows
            )
        self.stats = EngineStats()
        limit_bytes = swap_space_bytes(config, self.device.type) // ranks.size
        self.swap = SwapSpace(self.cache, self.table, self.states, limit_bytes=limit_bytes)
        row_s = self.step_times_s[self.budget] / self.budget if self.step_times_s else None
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

    def _form(self) -> Form:
        """How the attention of the model that decodes reads its cache."""
        if not self.selector.selects:
            return self.codec.form(self.device)
        return Selected(self.codec, self.selector)

    @cached_property
    def model_law(self) -> str:
        """The model that tokens come from, as far as its configuration tells: weights are not compared."""
        said = {name: value for name, value in vars(self.model.config).items() if name != "dtype"}
        digest = hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()[:12]
        layers = len(self.model.layer_states())
        kind = said.get("model_type", "a model")
        return f"{kind} with {layers} layers and {self.vocab_size} tokens, configuration {digest}"

    @property
    def cache_law(self) -> str:
        """The options of the cache that tokens depend on."""
        config = self.config
        law = f"codec={config.codec!r}, selector={config.selector!r}"
        if self.selector.selects:
            law += f", selector_budget={config.selector_budget}"
        # What is sealed or selected is whole pages.
        return f"{law}, page_size={config.page_size}" if self.selector.selects or self.codec.seal_interval else law

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
        tokens = self.check(prompt_ids, params)
        arrival_s = self.ranks.agree(self.clock()) if arrival_s is None else arrival_s
        if request_id in self._by_id:
            raise RequestError(f"request_id {show(request_id)} is in use: choose another one")
        seed = params.seed
        if seed is None:
            high, low = stream_key(self.config.seed % MAX_SEED, number if number is not None else self._arrivals, (0,))
            seed = ((high % 2**32) << 32) | (low % 2**32)
        samples = [
            Request(
                request_id=request_id,
                prompt=prompt,
                prompt_len=len(tokens),
                tokens=list(tokens),
                params=params,
                seed=seed,
                sample=sample,
                priority=priority,
                deadline_at_s=None if deadline_s is None else arrival_s + deadline_s,
                arrival_s=arrival_s,
                **self._derived(params, len(tokens), seed, sample),
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
        """The tokens of a prompt that could be served with these parameters. Raises RequestError for one that never
        can; queues nothing."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling parameters are {show(params)}: give a SamplingParams(...)")
        tokens = self._checked_prompt(prompt_ids, params)
        self._derived(params, len(tokens), 0, 0)
        return tokens

    @command
    def resume(self, record: dict[str, Any]) -> Request:
        """Queue a request from its portable record; it continues with the tokens it would have had.

        Raises RequestError for a record that is damaged, of another release, model or cache, or finished.
        """
        params = check_record(record)
        if record["model_law"] != self.model_law:
            raise RequestError(
                f"the record was taken with {show(record['model_law'])}, and this engine runs {self.model_law}: resume "
                "it with the same model"
            )
        if any(r.sample == record["sample"] for r in self._by_id.get(record["request_id"], ())):
            raise RequestError(
                f"request_id {show(record['request_id'])} is in use by sample {record['sample']}: abort that one first"
            )
        if record.get("adapter") is not None:
            params = replace(params, adapter=self.adapters.name_of(record["adapter"], params.adapter))
            record = {**record, "params": params.to_dict()}
        evictor, budget, exact_len = record["eviction"]
        if record["cache_law"] != self.cache_law:
            raise RequestError(
                f"the record's cache is kept with {record['cache_law']}, here with {self.cache_law}, so the tokens "
                "would differ: use an engine with the same options"
            )
        derived = self._derived(
            params,
            record["prompt_len"],
            record["seed"],
            record["sample"],
            evictor=evictor,
            cache_budget=budget or None,
            output_ids=record["tokens"][record["prompt_len"] :],
        )
        if derived["exact_len"] != exact_len:
            raise RequestError(
                f"the record's cache is first compacted at token {exact_len}, here at {derived['exact_len']}, so the "
                "tokens would differ: use an engine with the same cache_interval; "
                f"here it is {self.config.cache_interval}"
            )
        request = Request.from_record(record, **derived)
        self._check_whole(request)
        request.arrival_s = self.ranks.agree(self.clock())
        left_s = record["deadline_left_s"]
        request.deadline_at_s = None if left_s is None else request.arrival_s + left_s
        self._enqueue(request)
        return request

    def _check_whole(self, request: Request) -> None:
        """Raise RequestError unless a request from a record could have got where it stands in this engine."""
        # The prompt was cut, if at all, before the record was taken.
        params = replace(request.params, truncate_prompt_tokens=None)
        self._checked_prompt(request.tokens[: request.prompt_len], params)
        if request.output_ids:
            _check_ids(request.output_ids, self.vocab_size, "the record's output")
        if not set(request.output_ids).isdisjoint(request.stop_ids):
            raise RequestError("the record's output holds a stop token, so the request has ended: nothing to resume")
        if request.n_tok > request.limit or (request.output_ids and request.n_tok == request.limit):
            raise RequestError(
                f"the record has {len(request.output_ids)} output tokens of {request.limit - request.prompt_len} that "
                "its parameters and this engine allow: there is nothing to resume"
            )

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
        taken = {request.index for request in running}
        if len(taken) + len(self._free_indices) != self.config.max_num_seqs or taken & set(self._free_indices):
            raise InvariantError("request indices are lost or held twice")
        for request in running:
            i = request.index
            clocks = int(self.table.n_tok[i]), int(self.table.n_done[i])
            lengths = [int(kv_len_B[i]) for kv_len_B in self.table.kv_len_of(0)]
            expected = list(map(request.slots, range(len(lengths))))
            if clocks != (request.n_tok, request.n_done) or lengths != expected:
                raise InvariantError(
                    f"request {request.request_id}: clocks {clocks}, lengths {lengths} on the device; "
                    f"{request.n_tok}, {request.n_done}, {expected} in the books"
                )
            if not request.n_done <= request.n_tok <= request.limit or request.n_done > request.trigger:
                raise InvariantError(f"request {request.request_id}: clocks out of order")
            if int(self.table.adapter[i]) != request.adapter:
                raise InvariantError(f"request {request.request_id}: its adapter differs from the device's")
            if int(self.table.trigger[i]) != request.trigger:
                raise InvariantError(f"request {request.request_id}: its trigger differs from the device's")
            if request.n_done == request.trigger and not self.upkeep.waits(request):
                raise InvariantError(f"request {request.request_id} has passed a trigger without upkeep")
            if self.table.hist[i, : request.n_tok].tolist() != request.tokens:
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

    def _derived(
        self,
        params: SamplingParams,
        prompt_len: int,
        seed: int,
        sample: int,
        *,
        evictor: str | None = None,
        cache_budget: int | None = None,
        output_ids: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Fields of a request that follow from the parameters and this engine.

        `evictor`, `cache_budget` and `output_ids` are what a record settled; without them the parameters ask.
        """
        stops = dict.fromkeys(self.stop_ids(params))
        if len(stops) > MAX_STOP_IDS:
            raise RequestError(
                f"stop_token_ids: {len(stops)} stop ids with the model's own; at most {MAX_STOP_IDS}: pass fewer"
            )
        self.prepare(params, output_ids)
        room = self.max_model_len - prompt_len
        names = list(self.decoders)
        decoder = params.decoder or names[0]
        if decoder not in self.decoders:
            raise RequestError(
                f"decoder={decoder!r} is not loaded; this engine has {', '.join(names)}: name it in its decoder option"
            )
        asked = (evictor, cache_budget) if evictor else (params.evictor, params.cache_budget)
        name, budget = budget_of(self.evictors, *asked, self.config.cache_budget)
        exact_len = self.evictors[name].next_trigger(prompt_len, 0, budget)
        if self.selector.selects:  # later rows pass over parts of the cache
            exact_len = min(exact_len, prompt_len)
        adapter = self.adapters.of(params.adapter)
        # Requests with another decoder may lack the cache of this decoder's own models; with another adapter, all.
        salt = decoder.encode() if self.decoders[decoder].models else b""
        if adapter is not None:
            salt += b"\0" + adapter.digest.encode()
        return {
            "evictor": name,
            "cache_law": self.cache_law,
            "model_law": self.model_law,
            "cache_budget": budget,
            "exact_len": exact_len,
            "decoder": decoder,
            "adapter": adapter.slot if adapter else 0,
            "adapter_digest": adapter.digest if adapter else None,
            "salt": salt,
            "stream": stream_key(seed, sample),
            "stop_ids": tuple(stops),
            "limit": prompt_len + min(room, room if params.max_tokens is None else params.max_tokens),
        }

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Token ids that end a request with these parameters."""
        return list(dict.fromkeys([*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos_ids)]))

    def prepare(self, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        """Make what a request with these parameters needs and what takes long, as grammars do. `add` and `resume` do it
        too; whoever must not wait there does it before, in any thread. Raises RequestError for what cannot be done."""
        for processor in self.processors:
            if processor.wants(params):
                processor.prepare(params, self.stop_ids(params), output_ids)

    def _checked_prompt(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        params.check_vocabulary(self.vocab_size)
        tokens = as_ids(prompt_ids)
        if params.truncate_prompt_tokens is not None:
            tokens = tokens[-params.truncate_prompt_tokens :]
        if not tokens:
            raise RequestError("the prompt is empty; a model needs at least one token to continue from")
        _check_ids(tokens, self.vocab_size, "the prompt")
        longest = self.max_model_len - (params.max_tokens != 0)
        if len(tokens) > longest:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; at most {longest} leave room for output in a length of "
                f"{self.max_model_len}: shorten it, pass truncate_prompt_tokens={longest}, or raise max_model_len"
            )
        return tokens


def as_ids(prompt_ids: Sequence[int]) -> list[int]:
    """A list of their own as plain ints, of whole numbers of any library. Raises RequestError for others."""
    try:
        ids = None if isinstance(prompt_ids, (str, bytes, Mapping)) else list(prompt_ids)
    except TypeError:  # nothing to go through, or an array without dimensions
        ids = None
    if ids is None:
        raise RequestError(f"prompt_token_ids is {show(prompt_ids)}; it must be a list of token ids")
    if set(map(type, ids)) <= {int}:
        return ids
    tokens: list[int] = []
    for place, value in enumerate(ids):
        token = whole_number(value)
        if token is None:
            raise RequestError(f"the prompt has {show(value)} at place {place}; token ids are whole numbers from 0")
        tokens.append(token)
    return tokens


def _check_ids(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(t for t in tokens if not 0 <= t < vocab_size)
        raise RequestError(
            f"{what} has token id {show(wrong)}; the model's vocabulary has {vocab_size} tokens: use ids from 0 to "
            f"{vocab_size - 1}"
        )


def _decoder_names(config: EngineConfig) -> list[str]:
    """The decoders to load, the default of requests first; plain decoding is always among them."""
    names = [name.strip() for name in config.decoder.split(",")]
    return list(dict.fromkeys([*names, PLAIN]))


def _streams(
    models: Sequence[CausalLM], codecs: Sequence[Codec], forms: Sequence[Form], unit: Unit
) -> dict[Stream, list[CacheGroup]]:
    """Layers and cache groups of several models, numbered one after the other. `unit` is what may have a length of its
    own in the first, which decodes."""
    streams: dict[Stream, list[CacheGroup]] = {}
    first_layer = first_group = 0
    for model, codec, form in zip(models, codecs, forms, strict=True):
        states = model.layer_states()
        groups = group_layers(states, codec, first_layer, split=unit != "request" and not streams)
        of_model = range(first_group, first_group + len(groups))
        streams[Stream(model, first_layer, of_model, form)] = groups
        first_layer, first_group = first_layer + len(states), first_group + len(groups)
    return streams


def check_cache_parts(config: EngineConfig, codec: Codec, selector: Selector, evictors: Mapping[str, Evictor]) -> None:
    """Raise ConfigError for a codec or a selector that stands on whole pages beside an evictor that moves slots."""
    moving = [name for name, evictor in evictors.items() if evictor.evicts]
    if codec.seal_interval and moving:
        raise ConfigError(
            f"codec={config.codec!r} seals whole pages, and evictor={moving[0]!r} moves slots out of them: load one of "
            "the two"
        )
    if selector.selects and moving:
        raise ConfigError(
            f"selector={config.selector!r} chooses among whole pages of tokens, and evictor={moving[0]!r} moves slots "
            "between them: load one of the two"
        )


def check_ranks(size: int, config: EngineConfig, states: Sequence[LayerState], selector: Selector) -> None:
    """Raise ConfigError for parts that ranks with different heads would decide differently, and for a number of ranks
    that is not the one asked for."""
    if size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, and the engine is started on {size} ranks: start "
            "it by LLM or AsyncLLM, which start the ranks"
        )
    if size == 1:
        return
    if selector.selects:
        raise ConfigError(
            f"selector={config.selector!r} chooses pages by the keys of all heads of a layer, and with "
            f"tensor_parallel_size={size} no rank has all of them: leave one of the two out"
        )
    if any(state.kind == "fixed" for state in states):
        raise ConfigError(
            f"tensor_parallel_size is {size}, and the model has layers with fixed states, which are not divided: use "
            "tensor_parallel_size=1"
        )


def check_parity(
    config: EngineConfig,
    model: CausalLM,
    form: Form,
    evictors: Mapping[str, Evictor],
    decoders: Mapping[str, Decoder],
) -> None:
    """Raise ConfigError for parts whose results may follow from the other rows of a step."""
    place = next(model.parameters())
    types = PARITY_TYPES[place.device.type]
    if not model.parity:
        raise ConfigError(
            "parity=True, and the model was built without: load it with load_model(..., parity=True), as LLM does"
        )
    if place.dtype not in types:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise ConfigError(
            f"parity=True, and the model is in {str(place.dtype).removeprefix('torch.')}: on {place.device.type} the "
            f"order of sums is fixed for {known}; choose another dtype, or leave parity out"
        )
    if any(state.kind == "fixed" for state in model.layer_states()):
        raise ConfigError(
            "parity=True, and the model has layers with fixed states, whose order of sums is not fixed: leave parity "
            "out, or use another model"
        )
    if not form.parity:
        raise ConfigError(
            f"parity=True, and with codec={config.codec!r}, selector={config.selector!r} attention reads another table "
            "in every step, so its order of sums is not fixed: leave out codec and selector, or parity"
        )
    for name in (name for name, evictor in evictors.items() if evictor.evicts):
        raise ConfigError(
            f"parity=True, and evictor={name!r} chooses slots by sums whose order is not fixed: leave one of the "
            "two out"
        )
    for name in (name for name, decoder in decoders.items() if decoder.tree or not decoder.causal):
        raise ConfigError(
            f"parity=True, and decoder={name!r} evaluates rows that see other slots than all up to their own, "
            "for which the order of sums is not fixed: leave one of the two out"
        )


def check_urgency(priority: int, deadline_s: float | None) -> None:
    """Raise RequestError unless priority is a whole number and the deadline a positive number of seconds."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority is {show(priority)}; it must be a whole number, and the lower one goes first")
    if deadline_s is None:
        return
    number = isinstance(deadline_s, (int, float)) and not isinstance(deadline_s, bool)
    if not number or not 0.0 < deadline_s <= sys.float_info.max:
        raise RequestError(
            f"deadline_s is {show(deadline_s)}; it must be a positive number of seconds, or None for no deadline"
        )


def check_request_id(request_id: str) -> None:
    """Raise RequestError unless it is a text."""
    if not isinstance(request_id, str):
        raise RequestError(f"request_id is {show(request_id)}; it must be a text")


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
