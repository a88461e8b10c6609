"""The stages of a start: how long each took, and a line for whoever waits longer than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

PATIENCE_S = 1.0
"""A stage that takes longer shows that it goes on."""
REFRESH_S = 0.25
_ERASE_LINE = "\r\x1b[K"


class Stages:
    """Seconds by stage, in the order in which they began.

    Args:
        show: write a line for each stage that takes longer than a second: on a terminal one that is kept up to date,
            elsewhere one when it is late and one at its end. None: on a terminal only.
        stream: where to write; None: stderr as it is then.
    """

    def __init__(self, show: bool | None = False, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._is_terminal = bool(show is not False and self._out.isatty())
        self._shows = self._is_terminal if show is None else show
        self.seconds: dict[str, float] = {}

    @property
    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time what runs within. Gives a function that is told, from any thread, how much of `total` bytes is done."""
        began_s = time.perf_counter()
        done = _Count()
        over = threading.Event()
        if self._shows:
            line = threading.Thread(target=self._watch, args=(name, total, done, began_s, over), daemon=True)
            line.start()
        try:
            yield done.add
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began_s
            if self._shows:
                over.set()
                line.join()

    def _watch(self, name: str, total: int | None, done: _Count, began_s: float, over: threading.Event) -> None:
        if over.wait(PATIENCE_S):
            return
        if not self._is_terminal:
            self._write(f"headrace: {name} ...\n")
        while not over.wait(REFRESH_S):
            if self._is_terminal:
                much = "" if not total else f" {done.n / 2**30:.1f} of {total / 2**30:.1f} GiB,"
                self._write(f"{_ERASE_LINE}headrace: {name} ...{much} {time.perf_counter() - began_s:.0f} s")
        begin = _ERASE_LINE if self._is_terminal else ""
        self._write(f"{begin}headrace: {name}: {time.perf_counter() - began_s:.1f} s\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def __str__(self) -> str:
        """All stages with their seconds."""
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())


class _Count:
    """A number that several threads raise."""

    def __init__(self) -> None:
        self.n = 0
        self._lock = threading.Lock()

    def add(self, more: int) -> None:
        with self._lock:
            self.n += more
