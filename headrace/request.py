"""A request: its state machine, its clocks, and the one portable record.

The record holds everything that a request is between two steps: tokens, log-probs, parameters and
clocks. Noise is keyed by (stream, position), so there is no generator state to carry: a request
resumed anywhere from its record continues with the same tokens.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.checks import show
from headrace.errors import HeadraceError, InvariantError, RequestError
from headrace.params import MAX_SEED, SamplingParams

RECORD_VERSION = 5
NEVER = 2**30
"""A token index that is never reached."""


class State(enum.Enum):
    """Where a request stands in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    REMOTE = "remote"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.PAUSED, State.REMOTE, State.FINISHED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.FINISHED}),
    State.PAUSED: frozenset({State.RUNNING, State.FINISHED}),
    State.REMOTE: frozenset({State.RUNNING, State.FINISHED}),
    State.FINISHED: frozenset(),
}


class Finish(enum.IntEnum):
    """Why a request ended; 0 while it runs. The number is the one in the device table."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    TIMEOUT = 5

    @property
    def reason(self) -> str | None:
        """The word users see; None while the request runs."""
        return None if self is Finish.NONE else self.name.lower()


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token under the model's own distribution, and its rank (1: most probable)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id to log-probability, at one position."""


@dataclass
class Request:
    """One sample of one prompt. Owned by the engine; `tokens` grows, the rest of the identity is fixed."""

    request_id: str
    prompt_len: int
    tokens: list[int]
    """Prompt and output, by index."""
    params: SamplingParams
    seed: int
    sample: int
    stream: tuple[int, int]
    """Key of the noise, as two int32 bit patterns."""
    limit: int
    """Bound on the number of tokens known."""
    stop_ids: tuple[int, ...]
    arrival: int = 0
    """Order among requests of one priority; a preempted one keeps its place."""
    priority: int = 0
    """The lower number goes first. Decides when tokens come, never which."""
    deadline_at_s: float | None = None
    """Time on the engine's clock from which on the request is ended where it stands."""
    prompt: str | None = None
    state: State = State.WAITING
    index: int = -1
    """Row in every device table while it holds one; -1 otherwise."""
    n_done: int = 0
    """Tokens whose cache is committed."""
    finish: Finish = Finish.NONE
    stop_reason: int | str | None = None
    """The stop string or token id that ended the output, other than the model's own end token."""
    error: HeadraceError | None = None
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    """Page ids by pool, in the order of slots; the first `freed` of a pool have been given back and are trash."""
    freed: list[int] = field(default_factory=list)
    """Pages by pool that no later row sees and that were given back: behind the window, or sealed."""
    dropped: list[int] = field(default_factory=list)
    """Tokens by group whose slots were evicted: the cache holds `n_done` minus these."""
    evictor: str = ""
    """Which of the engine's evictors bounds its cache."""
    model_law: str = ""
    """The model that its tokens come from."""
    cache_law: str = ""
    """The options of the engine's cache that its tokens depend on."""
    cache_budget: int = 0
    """Slots that a cell keeps at an eviction; 0: all."""
    exact_len: int = NEVER
    """Tokens below this index have the cache of a whole prefill: the first eviction comes here."""
    trigger: int = NEVER
    """Token index at which its cache is compacted next."""
    peak_cache_slots: int = 0
    """Most slots that a cell had room for in the request's pages."""
    peak_cache_bytes: int = 0
    """Most bytes of pages that it held at once, shared ones included."""
    parent: Request | None = None
    """The first sample of the prompt, whose cache of the prompt this one shares."""
    decoder: str = ""
    """Which of the engine's decoders runs it."""
    adapter: int = 0
    """Place of its adapter; 0: none."""
    adapter_digest: str | None = None
    """What that adapter holds."""
    drafted: int = 0
    """Drafts that the decoder holds for the next step."""
    salt: bytes = b""
    """Whose cache entries the request may share: those of requests with the same salt."""
    unit_keys: list[bytes] = field(default_factory=list)
    """Prefix keys of the whole units of `tokens` seen so far."""
    published: int = 0
    """Units already offered to the prefix index."""
    hit_tokens: int = 0
    """Prompt tokens found in the prefix cache at the last admission."""
    preemptions: int = 0
    arrival_s: float = 0.0
    first_token_s: float | None = None
    finish_s: float | None = None

    @property
    def n_tok(self) -> int:
        """Tokens known."""
        return len(self.tokens)

    def slots(self, group: int) -> int:
        """Committed slots in a cache group. (Of a decoder's own model: a bound, its clock is the decoder's.)"""
        return self.n_done - (self.dropped[group] if self.dropped else 0)

    @property
    def pending(self) -> int:
        """Tokens known but not committed."""
        return len(self.tokens) - self.n_done

    @property
    def output_ids(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.prompt_len :]

    @property
    def rank(self) -> tuple[int, int]:
        """Place among all requests: by priority, then by arrival."""
        return self.priority, self.arrival

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt rows must be evaluated for their log-probs (so that no prefix may be skipped)."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    def move(self, state: State) -> None:
        """Change state. Raises InvariantError for a move that the state machine does not have."""
        if state not in _MOVES[self.state]:
            raise InvariantError(f"request {self.request_id}: no move from {self.state.value} to {state.value}")
        self.state = state

    def to_record(self, now_s: float | None = None) -> dict[str, Any]:
        """The portable record: plain data that JSON can carry.

        A deadline travels as the seconds left, since clocks of two machines share no zero: give `now_s`, the time on
        the engine's clock (`Engine.export` does). Time on the way does not count. Raises InvariantError for a
        request with a deadline and no `now_s`.
        """
        if self.deadline_at_s is not None and now_s is None:
            raise InvariantError(
                f"request {self.request_id} has a deadline, and its record holds the seconds left: pass now_s, "
                "or call Engine.export"
            )
        left_s = None if self.deadline_at_s is None or now_s is None else self.deadline_at_s - now_s
        return {
            "version": RECORD_VERSION,
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_len": self.prompt_len,
            "tokens": list(self.tokens),
            "params": self.params.to_dict(),
            "seed": self.seed,
            "sample": self.sample,
            "token_logprobs": list(self.token_logprobs),
            "top_logprobs": [_plain(p) for p in self.top_logprobs],
            "prompt_logprobs": [_plain(p) for p in self.prompt_logprobs],
            "preemptions": self.preemptions,
            "model_law": self.model_law,
            "cache_law": self.cache_law,
            "eviction": [self.evictor, self.cache_budget, self.exact_len],
            "adapter": self.adapter_digest,
            "priority": self.priority,
            "deadline_left_s": left_s,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], **derived: Any) -> Request:
        """A request in WAITING that continues where a record was taken that `check_record` has passed.

        `derived` are the fields the engine computes from its own configuration and clock (stream, limit, stop_ids,
        deadline_at_s).
        """
        return cls(
            request_id=record["request_id"],
            prompt=record["prompt"],
            prompt_len=record["prompt_len"],
            tokens=list(record["tokens"]),
            params=SamplingParams.from_dict(record["params"]),
            seed=record["seed"],
            sample=record["sample"],
            token_logprobs=list(record["token_logprobs"]),
            top_logprobs=[_rich(p) or {} for p in record["top_logprobs"]],
            prompt_logprobs=[_rich(p) for p in record["prompt_logprobs"]],
            preemptions=record["preemptions"],
            priority=record["priority"],
            **derived,
        )


def _plain(position: PositionLogprobs | None) -> list[list[Any]] | None:
    return None if position is None else [[t, p.logprob, p.rank, p.decoded_token] for t, p in position.items()]


def _rich(position: list[list[Any]] | None) -> PositionLogprobs | None:
    return None if position is None else {t: Logprob(p, rank, text) for t, p, rank, text in position}


def check_record(record: Any) -> SamplingParams:
    """The sampling parameters of a portable record. Raises RequestError, naming the entry, for one that is damaged or
    of another release."""
    if not isinstance(record, Mapping):
        raise RequestError(f"the record is {show(record)}; it must be an object, as Engine.export gives it")
    if record.get("version") != RECORD_VERSION:
        raise RequestError(
            f"the record has version {show(record.get('version'))}; this release reads {RECORD_VERSION}: "
            "export it again with the same release"
        )
    for name, (is_good, must) in _ENTRIES.items():
        if name not in record or not is_good(record[name]):
            found = show(record[name]) if name in record else "missing"
            raise RequestError(f"the record's {name} is {found}; it must be {must}: export the request again")
    params = SamplingParams.from_dict(record["params"])
    outputs = len(record["tokens"]) - record["prompt_len"]
    top, given = len(record["top_logprobs"]), len(record["prompt_logprobs"])
    rules = [
        ("prompt_len", outputs >= 0, f"at most the number of its tokens, {len(record['tokens'])}"),
        ("sample", record["sample"] < params.n, f"below n = {params.n}"),
        ("token_logprobs", len(record["token_logprobs"]) == outputs, f"a list of {outputs}, one an output token"),
        ("top_logprobs", top == (0 if params.logprobs is None else outputs), "one an output token where asked for"),
        (
            "prompt_logprobs",
            given <= (0 if params.prompt_logprobs is None else record["prompt_len"]),
            "at most one a prompt token, where asked for",
        ),
    ]
    for name, holds, must in rules:
        if not holds:
            raise RequestError(
                f"the record's {name} is {show(record[name])}; it must be {must}: export the request again"
            )
    return params


def _is_count(value: Any, low: int = 0, below: float = 2**31) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < below


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_seconds(value: Any) -> bool:
    return value is None or (_is_number(value) and abs(value) <= 1e15 and not math.isnan(value))


def _is_position(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(entry, (list, tuple))
        and len(entry) == 4
        and _is_count(entry[0])
        and _is_number(entry[1])
        and _is_count(entry[2])
        and (entry[3] is None or isinstance(entry[3], str))
        for entry in value
    )


def _is_list(value: Any, is_good: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_good, value))


def _is_eviction(value: Any) -> bool:
    name_first = isinstance(value, (list, tuple)) and len(value) == 3 and isinstance(value[0], str) and value[0] != ""
    return name_first and _is_count(value[1]) and _is_count(value[2])


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "request_id": (lambda x: isinstance(x, str), "a text"),
    "prompt": (lambda x: x is None or isinstance(x, str), "a text or null"),
    "prompt_len": (lambda x: _is_count(x, 1), "a whole number from 1"),
    "adapter": (lambda x: x is None or isinstance(x, str), "the digest of an adapter or null"),
    "tokens": (lambda x: _is_list(x, _is_count), "a list of token ids"),
    "params": (lambda x: isinstance(x, dict), "an object"),
    "seed": (lambda x: _is_count(x, 0, MAX_SEED), "a whole number in [0, 2**64)"),
    "sample": (_is_count, "a whole number from 0"),
    "token_logprobs": (lambda x: _is_list(x, _is_number), "a list of numbers"),
    "top_logprobs": (lambda x: _is_list(x, _is_position), "a list of lists of [token, log-prob, rank, text]"),
    "prompt_logprobs": (
        lambda x: _is_list(x, lambda p: p is None or _is_position(p)),
        "a list of null or lists of [token, log-prob, rank, text]",
    ),
    "preemptions": (_is_count, "a whole number from 0"),
    "model_law": (lambda x: isinstance(x, str), "a text"),
    "cache_law": (lambda x: isinstance(x, str), "a text"),
    "eviction": (_is_eviction, "[evictor, budget, token index]"),
    "priority": (lambda x: _is_count(x, -(2**63), 2**63), "a whole number"),
    "deadline_left_s": (_is_seconds, "a number of seconds or null"),
}
"""Entry of a record, whether a value of it is well formed, and what it must be."""
