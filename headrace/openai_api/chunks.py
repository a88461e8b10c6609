"""Answers piece by piece, as server-sent events. Bytes are joined by hand: this runs for every token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Protocol

from headrace.errors import HeadraceError
from headrace.openai_api.answers import (
    calls_reason,
    chat_logprobs,
    error_body,
    text_logprobs,
    usage,
)
from headrace.openai_api.calls import CallFilter, call_body
from headrace.openai_api.work import Work
from headrace.request import PositionLogprobs

DONE = b"data: [DONE]\n\n"


class Piece(Protocol):
    """What is new of one sample."""

    @property
    def index(self) -> int:
        """Of the sample, from 0."""

    @property
    def text(self) -> str:
        """New text."""

    @property
    def token_ids(self) -> Sequence[int]:
        """New tokens."""

    @property
    def logprobs(self) -> Sequence[PositionLogprobs] | None:
        """Of the new tokens."""

    @property
    def finish_reason(self) -> str | None:
        """None while it goes on."""

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or token."""

    @property
    def error(self) -> HeadraceError | None:
        """Why it failed."""


class Chunks:
    """Makes the events of one answer. `created` in seconds since 1970."""

    def __init__(self, work: Work, *, request_id: str, created: int, model: str) -> None:
        self._work = work
        self._id = request_id
        kind = "text_completion" if work.kind == "completions" else "chat.completion.chunk"
        head = {"id": request_id, "object": kind, "created": created, "model": model}
        self._head = "data: " + json.dumps(head, separators=(",", ":"))[:-1] + ',"choices":['
        self._tail = ',"usage":null}\n\n' if work.include_usage else "}\n\n"
        self._filters: dict[int, CallFilter] = {}
        self._offsets: dict[int, int] = {}
        self._is_chat = work.kind == "chat"

    def opening(self, place: int, prompt: str | None = None, prompt_ids: Sequence[int] = ()) -> bytes:
        """What stands before anything else of the samples of prompt `place`: the role, or with `echo` the `prompt`."""
        made = []
        for sample in range(self._work.params.n):
            index = place * self._work.params.n + sample
            ids = {"prompt_token_ids": list(prompt_ids)} if self._work.return_token_ids else {}
            if self._is_chat:
                made.append(self._event(index, '"delta":{"role":"assistant","content":""}', "null", None, ids))
            elif self._work.echo:
                self._offsets[index] = len(prompt or "")
                made.append(self._event(index, f'"text":{quoted(prompt or "")}', "null", None, ids))
            elif ids:
                made.append(self._event(index, '"text":""', "null", None, ids))
        return "".join(made).encode()

    def piece(self, place: int, piece: Piece, seed: int | None = None) -> bytes:
        """What is new of a sample of prompt `place`; empty where nothing of it can be told yet."""
        index = place * self._work.params.n + piece.index
        if piece.finish_reason == "error" and piece.error is not None:
            return self.error(piece.error)
        if self._work.tools is not None:
            return self._piece_with_calls(index, piece, seed)
        reason, ids = piece.finish_reason, piece.token_ids
        if not piece.text and reason is None and not (piece.logprobs or self._work.return_token_ids):
            return b""
        body = f'"delta":{{"content":{quoted(piece.text)}}}' if self._is_chat else f'"text":{quoted(piece.text)}'
        extras: dict[str, Any] = {"token_ids": list(ids)} if self._work.return_token_ids else {}
        if reason is not None:
            extras |= {"stop_reason": piece.stop_reason} | ({} if seed is None else {"seed": seed})
        return self._event(index, body, self._logprobs(index, piece), reason, extras).encode()

    def _piece_with_calls(self, index: int, piece: Piece, seed: int | None) -> bytes:
        known = self._filters.get(index)
        if known is None:
            assert self._work.tools is not None
            known = self._filters[index] = CallFilter(self._work.tools, self._work.hidden)
        place = known.n_calls
        found = known.push(piece.text)
        reason = piece.finish_reason
        if reason is not None:
            found += known.finish()
        logprobs = self._logprobs(index, piece)
        made = []
        extras: dict[str, Any] = {"token_ids": list(piece.token_ids)} if self._work.return_token_ids else {}
        for part in found:
            if isinstance(part, str):
                delta = f'{{"content":{quoted(part)}}}'
            else:
                call = {"index": place} | call_body(part, self._id, index, place)
                place += 1
                delta = f'{{"tool_calls":[{json.dumps(call, separators=(",", ":"))}]}}'
            # Log-probs and ids are those of the tokens that came, whatever of them is shown: they go with the first.
            made.append(self._event(index, f'"delta":{delta}', logprobs, None, extras))
            logprobs, extras = "null", {}
        if reason is not None:
            extras = extras | {"stop_reason": piece.stop_reason} | ({} if seed is None else {"seed": seed})
            if known.error is not None:
                extras["tool_call_error"] = str(known.error)
            end = calls_reason(reason) if known.n_calls else reason
            made.append(self._event(index, '"delta":{}', logprobs, end, extras))
        elif not made and (logprobs != "null" or extras):
            made.append(self._event(index, '"delta":{}', logprobs, None, extras))
        return "".join(made).encode()

    def usage(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> bytes:
        """The event with the tokens of the request; it has no choices."""
        told = json.dumps(usage(prompt_tokens, completion_tokens, cached_tokens), separators=(",", ":"))
        return f'{self._head}],"usage":{told}}}\n\n'.encode()

    def error(self, error: BaseException) -> bytes:
        """The event that says why there is no more."""
        return b"data: " + json.dumps(error_body(error), separators=(",", ":")).encode() + b"\n\n"

    def _event(self, index: int, body: str, logprobs: str, reason: str | None, extras: dict[str, Any]) -> str:
        more = "," + json.dumps(extras, separators=(",", ":"))[1:-1] if extras else ""
        end = "null" if reason is None else f'"{reason}"'
        return f'{self._head}{{"index":{index},{body},"logprobs":{logprobs},"finish_reason":{end}{more}}}]{self._tail}'

    def _logprobs(self, index: int, piece: Piece) -> str:
        top = self._work.top_logprobs
        if top is None or not piece.logprobs:
            return "null"
        if self._is_chat:
            made = chat_logprobs(piece.token_ids, piece.logprobs, top, self._work.tokenizer)
        else:
            offset = self._offsets.get(index, 0)
            made = text_logprobs(piece.token_ids, piece.logprobs, self._work.tokenizer, offset)
            self._offsets[index] = offset + sum(
                len(position[token].decoded_token or "") for token, position in zip(piece.token_ids, piece.logprobs)
            )
        return json.dumps(made, separators=(",", ":"))
