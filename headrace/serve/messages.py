"""What the HTTP process and the engine's process say to each other: msgpack frames over one pair of sockets.

A frame is its length (four bytes, little endian) and a tagged struct. The engine sends one `Outputs` a step, with what
is new of every request.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from headrace import errors
from headrace.errors import EngineDeadError, HeadraceError
from headrace.request import Logprob, PositionLogprobs

Position = list[tuple[int, float, int]]
"""Token, log-prob, rank; the order of the entries is the engine's."""


class Failure(msgspec.Struct, array_like=True):
    """An error on its way: the name of its class and its words."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of an error."""
        return cls(type(error).__name__, str(error))

    def error(self) -> HeadraceError:
        """The error again; one that is none of ours becomes an EngineDeadError that names it."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, HeadraceError):
            return kind(self.message)
        return EngineDeadError(f"{self.kind}: {self.message}")


# To the engine


class Add(msgspec.Struct, array_like=True, tag="add"):
    """Queue a prompt. `number` keys its noise where it has no seed."""

    key: int
    number: int
    ids: list[int]
    text: str | None
    params: dict[str, Any]
    priority: int
    deadline_s: float | None


class Abort(msgspec.Struct, array_like=True, tag="abort"):
    """End a request; its last delta says so."""

    key: int


class Errand(msgspec.Struct, array_like=True, tag="errand"):
    """Something to do between two steps; an `Answer` comes back."""

    key: int
    what: str
    arguments: list[Any]


ToEngine = Add | Abort | Errand


# From the engine


class Loading(msgspec.Struct, array_like=True, tag="loading"):
    """A stage of the start begins."""

    stage: str


class EngineInfo(msgspec.Struct, array_like=True, tag="ready"):
    """What was started."""

    model: str
    path: str
    tokenizer_path: str | None
    max_model_len: int
    vocab_size: int
    device: str
    dtype: str
    scheduler: str
    decoder: str
    evictor: str
    codec: str
    selector: str
    page_size: int
    pages: int
    cache_bytes: int
    max_num_seqs: int
    row_budget: int
    tensor_parallel_size: int
    adapters: list[str]


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """The engine ends."""

    failure: Failure


class Delta(msgspec.Struct, array_like=True):
    """What is new of one sample."""

    key: int
    sample: int
    tokens: list[int]
    text: str | None
    """New text, where the engine had to make it to find stop strings."""
    logprobs: list[Position] | None
    finish: str | None
    stop_reason: int | str | None
    failure: Failure | None


class End(msgspec.Struct, array_like=True):
    """All samples of a request have ended."""

    key: int
    prompt_logprobs: list[Position | None] | None
    arrival_s: float
    first_token_s: float | None
    finish_s: float | None
    cached_tokens: int
    preemptions: int
    peak_cache_slots: int
    peak_cache_bytes: int


class Accepted(msgspec.Struct, array_like=True):
    """A request is queued. `ids`: its prompt, where it was cut."""

    key: int
    seed: int
    ids: list[int] | None


class Refused(msgspec.Struct, array_like=True):
    """A request can never be served."""

    key: int
    failure: Failure


class EngineStats(msgspec.Struct):
    """Counters since the first engine, and where things stand."""

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    aborts: int = 0
    timeouts: int = 0
    swaps: int = 0
    steps: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    running: int = 0
    waiting: int = 0
    pages_in_use: int = 0
    pages_total: int = 0
    leaked: int = 0
    output_tok_s: float = 0.0


COUNTERS = EngineStats.__struct_fields__[:11]
"""Those that only grow."""


class Outputs(msgspec.Struct, array_like=True, tag="outputs"):
    """What one turn of the engine's loop brought."""

    accepted: list[Accepted]
    refused: list[Refused]
    deltas: list[Delta]
    ends: list[End]
    stats: EngineStats | None


class Answer(msgspec.Struct, array_like=True, tag="answer"):
    """What came of an errand."""

    key: int
    value: Any
    failure: Failure | None


FromEngine = Loading | EngineInfo | Failed | Outputs | Answer

_LENGTH = struct.Struct("<I")
HEAD_BYTES = _LENGTH.size


def frame(encoder: msgspec.msgpack.Encoder, message: Any) -> bytes:
    """The message as bytes."""
    body = encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def length(head: bytes) -> int:
    """Bytes of the message behind the head."""
    return int(_LENGTH.unpack(head)[0])


def packed(position: PositionLogprobs) -> Position:
    """Log-probs of one position without the texts, which the HTTP process knows itself."""
    return [(token, one.logprob, one.rank) for token, one in position.items()]


def unpacked(position: Position, texts: Any) -> PositionLogprobs:
    """The same with texts, where `texts(token)` gives them."""
    return {token: Logprob(logprob, rank, texts(token)) for token, logprob, rank in position}
