"""Tool calls in an answer's text: what is text goes to the reader as it comes, what is a call goes when it is whole."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from headrace.errors import ToolCallError
from headrace.text.tools import ToolCall, ToolFormat

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class CallFilter:
    """Divides one answer into text and calls. How the text was cut into pushes never matters.

    Space in front of a call, and behind the last one, belongs to neither and is dropped. What follows an opening mark
    and cannot be read is neither text nor call: it is in `error` at the end.

    Parameters
    ----------
    reader: the format of the calls.
    hidden: special tokens that are no marks of calls.
    """

    def __init__(self, reader: ToolFormat, hidden: re.Pattern[str] | None) -> None:
        self._reader = reader
        self._hidden = hidden
        self._held = ""
        """Outside of calls: what may begin a mark. Inside: all of the call."""
        self._space = ""
        self._inside = False
        self._searched = 0
        self.n_calls = 0
        self.error: ToolCallError | None = None

    def push(self, text: str) -> list[str | ToolCall]:
        """Take new text; returns what is certain now."""
        self._held += text
        found: list[str | ToolCall] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[str | ToolCall]:
        """The answer has ended; returns what was held back."""
        found: list[str | ToolCall] = []
        if self._inside:
            self._end_inside(found)
        else:
            self._give(self._held, found)
            if self._space and not self.n_calls:
                found.append(self._space)
        self._held = self._space = ""
        return found

    def _step(self, found: list[str | ToolCall]) -> bool:
        """One change between text and call, if there is one in what is held."""
        opening, closing = self._reader.opening, self._reader.closing
        if not self._inside:
            at = self._held.find(opening)
            if at < 0:
                keep = _beginning_of(opening, self._held)
                self._give(self._held[: len(self._held) - keep], found)
                self._held = self._held[len(self._held) - keep :]
                return False
            self._give(self._held[:at], found)
            self._held, self._inside, self._searched, self._space = self._held[at:], True, len(opening), ""
            return True
        if closing is None:
            return False
        at = self._held.find(closing, self._searched)
        if at < 0:
            self._searched = max(len(opening), len(self._held) - len(closing) + 1)
            return False
        end = at + len(closing)
        try:
            calls = self._reader.read(self._held[:end])
        except ToolCallError:
            self._searched = end  # the mark may stand in a text of the arguments
            return True
        self._take(calls, found)
        self._held, self._inside = self._held[end:], False
        return True

    def _end_inside(self, found: list[str | ToolCall]) -> None:
        text = self._held
        if self._hidden is not None:
            text = re.sub(rf"(?:{self._hidden.pattern})+\s*\Z", "", text)
        try:
            self._take(self._reader.read(text), found)
        except ToolCallError as error:
            self.error = error

    def _take(self, calls: list[ToolCall], found: list[str | ToolCall]) -> None:
        self.n_calls += len(calls)
        found += calls

    def _give(self, text: str, found: list[str | ToolCall]) -> None:
        if self._hidden is not None:
            text = self._hidden.sub("", text)
        text = self._space + text
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if solid:
            found.append(solid)


def _beginning_of(mark: str, text: str) -> int:
    """Length of the longest end of the text that begins the mark."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


def call_body(call: ToolCall, request_id: str, choice: int, place: int) -> dict[str, Any]:
    """A call as OpenAI writes it. The id follows from where it stands; nine letters, as Mistral's templates want."""
    digest = int.from_bytes(hashlib.blake2s(f"{request_id}/{choice}/{place}".encode(), digest_size=8).digest(), "big")
    letters = "".join(_LETTERS[digest // 62**i % 62] for i in range(9))
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": letters, "type": "function", "function": {"name": call.name, "arguments": arguments}}
