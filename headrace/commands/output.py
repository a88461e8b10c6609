"""Lines on their way to a file or to standard output: whole lines, in order, whatever happens on the way."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from headrace.errors import OutputError, RequestError

Opener = Callable[[Path], IO[bytes]]


def open_unbuffered(path: Path) -> IO[bytes]:
    """So that what a write says it wrote is what the file has."""
    return open(path, "wb", buffering=0)


class Lines:
    """JSON lines, one a completion, written as soon as all before them are.

    The file is called `<name>.partial` until `close`, which gives it its name; one without lines goes away. After a
    failure it has every line that was whole, and no half of one. What is no file but a device or a pipe is written to
    as it is. `path` None: standard output.

    Raises RequestError at once where no such file can be written, so that nobody waits for a run in vain.
    """

    def __init__(self, path: Path | None, count: int, opener: Opener = open_unbuffered) -> None:
        self.path, self.count = path, count
        self.written = 0
        self._next = 0
        self._held: dict[int, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        self._partial = Path()
        self._target = Path()
        self._is_special = False
        self._good_bytes = 0
        if path is None:
            return
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._is_special = path.exists() and not path.is_file()
            self._target = path if self._is_special else Path(os.path.realpath(path))
            self._partial = path if self._is_special else self._target.with_name(self._target.name + ".partial")
            self._file = opener(self._partial)
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise RequestError(f"{path}: {_reason(error)}; give a file that can be written with -o") from error

    def put(self, place: int, record: dict[str, Any]) -> None:
        """Take the line of a place. Raises OutputError if it, or one that waited for it, cannot be written."""
        self._held[place] = record
        while self._next in self._held:
            self._write(self._held[self._next])
            del self._held[self._next]
            self._next += 1

    def close(self) -> None:
        """Write what was held back, in order, and give the file its name. Raises OutputError."""
        if self._file is not None and not self._is_special and self._file.tell() != self._good_bytes:
            self._cut()  # an interrupt came in the middle of a line
        for place in sorted(self._held):
            self._write(self._held[place])
            del self._held[place]
        self._settle()

    def abandon(self) -> None:
        """The same after a failure, as far as it goes; raises nothing."""
        with contextlib.suppress(OutputError):
            self.close()

    @property
    def kept(self) -> str:
        """How much there is and where, for a message."""
        if self.path is None:
            return f"{self.written} of {self.count} completions were written"
        if not self.written:
            return "none was kept"
        return f"{self.written} of {self.count} completions are in {self.path}"

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            self._print(record)
            return
        data = memoryview(_encoded(record, "utf-8") + b"\n")
        size = len(data)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._held.clear()
            self._cut()
            self._settle()
            raise OutputError(f"{self.path}: {_reason(error)}; {self.kept}: make room and run the others") from error
        self.written += 1
        self._good_bytes += size

    def _print(self, record: dict[str, Any]) -> None:
        line = _encoded(record, sys.stdout.encoding or "utf-8").decode(sys.stdout.encoding or "utf-8")
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # the reader has had enough
        except OSError as error:
            self._held.clear()
            raise OutputError(f"standard output: {_reason(error)}; {self.kept}: make room and run again") from error
        self.written += 1

    def _cut(self) -> None:
        """Take the half of a line away."""
        assert self._file is not None
        if self._is_special:
            return
        try:
            self._file.seek(self._good_bytes)
            self._file.truncate()
        except OSError:
            self.written = 0  # the file cannot be trusted: it goes
            self._good_bytes = 0

    def _settle(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self.written and not self._is_special:
                os.fsync(file.fileno())
            file.close()
        except OSError as error:
            # What a disk refuses so late may be any part of the file, so nothing of it is passed off as whole.
            self._remove()
            raise OutputError(f"{self.path}: {_reason(error)}; none was kept: make room and run again") from error
        if self._is_special:
            return
        if not self.written:
            self._remove()
            return
        try:
            os.replace(self._partial, self._target)
        except OSError as error:
            raise OutputError(
                f"{self.path}: {_reason(error)}; {self.written} of {self.count} completions are in {self._partial}"
            ) from error

    def _remove(self) -> None:
        self.written = 0
        if not self._is_special:
            with contextlib.suppress(OSError):
                self._partial.unlink(missing_ok=True)


def _encoded(record: dict[str, Any], encoding: str) -> bytes:
    """One line. Characters that the encoding has not (halves of surrogate pairs, in UTF-8) are escaped."""
    try:
        return json.dumps(record, ensure_ascii=False).encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(record).encode(encoding)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
