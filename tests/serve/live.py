"""A server as its users start it: a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 60.0
SMALL = ("--device", "cpu", "--kv-cache-gib", "0.1", "--max-num-batched-tokens", "256")
"""Starts fast and leaves the other cores to other tests."""
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> answer with <tool_call>{{ '\\n' }}{% endif %}"
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{{ '\\n' }}{% endif %}"
)


class Live:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int, log: Path) -> None:
        self.process, self.host, self.port, self._log = process, host, port, log
        self.url = f"http://{host}:{port}"

    @property
    def log(self) -> str:
        """What it has said on stderr."""
        return self._log.read_text()

    def raw(self, *parts: bytes, pause_s: float = 0.0, patience_s: float = 10.0) -> bytes:
        """What comes back for these bytes until the server closes, or says nothing for half a second."""
        with socket.create_connection((self.host, self.port), timeout=patience_s) as connection:
            with contextlib.suppress(OSError):
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause_s)
            return read_all(connection, patience_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


def read_all(connection: socket.socket, patience_s: float) -> bytes:
    """Bytes until the other side closes; after the first ones half a second of silence is the end too."""
    data = b""
    connection.settimeout(patience_s)
    with contextlib.suppress(OSError):
        while part := connection.recv(65536):
            data += part
            connection.settimeout(0.5)
    return data


@contextlib.contextmanager
def serve(*options: str, environment: dict[str, str] | None = None) -> Iterator[Live]:
    """Start a server, wait for its line, and end it."""
    command = [sys.executable, "-m", "headrace.cli", "serve", "--port", "0", *SMALL, *options]
    root = Path(__file__).resolve().parents[2]
    given = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=given)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://([\d.]+):(\d+)", line)
            assert found, f"{line!r}\n{log.read_text()}"
            yield Live(process, found[1], int(found[2]), log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20.0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if process.stdout is not None:
                process.stdout.close()
