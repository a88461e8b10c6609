"""uvicorn's protocol of one connection, with limits on what comes before a request is one: head, and time for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.openai_api.answers import error_body


class Protocol(HttpToolsProtocol):
    """One connection. The limits are set on a subclass, see `limited`."""

    max_head_bytes: ClassVar[int] = 65536
    head_timeout_s: ClassVar[float] = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_bytes = 0
        self._in_head = True
        self._begun = False
        self._n_whole = 0
        """Requests that have arrived whole."""
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._late = self.loop.call_later(self.head_timeout_s, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._forget_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the head while it is not whole."""
        if self.parser is None or self.transport.is_closing():
            return
        begun, n_whole = self._begun, self._n_whole
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._in_head or (self._n_whole > n_whole and not self._begun):
            self._forget_clock()  # the body has a clock of its own, and so has an idle connection
            return
        if begun and self._begun:
            self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self.refuse(431, f"the head of the request has more than {self.max_head_bytes} bytes: send shorter headers")
        elif self._late is None:
            self._late = self.loop.call_later(self.head_timeout_s, self._too_late)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head, self._begun, self._head_bytes = True, True, 0
        self.scope["headrace.transport"] = self.transport  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        """The head is whole."""
        length = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if length > self.max_head_bytes:
            raise ValueError("the head is too long")  # the parser turns it into 400
        self._in_head = self._begun = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is whole; what comes next is a head."""
        super().on_message_complete()
        self._in_head, self._begun = True, False
        self._n_whole += 1

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self.refuse(400, "the request is no HTTP/1.1: send it with an HTTP client")

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error and close."""
        body = json.dumps(error_body(message, status)).encode()
        head = (
            f"HTTP/1.1 {status} Error\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _too_late(self) -> None:
        self._late = None
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._in_head and not busy and not self.transport.is_closing():
            self.refuse(408, f"the head of a request did not arrive within {self.head_timeout_s:g} s: send it faster")

    def _forget_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def limited(max_head_bytes: int, head_timeout_s: float) -> type[Protocol]:
    """The protocol with these limits."""
    return type("LimitedProtocol", (Protocol,), {"max_head_bytes": max_head_bytes, "head_timeout_s": head_timeout_s})
