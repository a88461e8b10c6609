"""schemathesis over the OpenAPI document of a live server: bodies made from the schemas never meet a 5xx."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import Live

pytest.importorskip("schemathesis")


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_no_body_meets_a_server_error(server: Live, examples: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--max-examples", str(examples), "--seed", "1"]
    command += [
        "--phases",
        "coverage,fuzzing",
        "--mode",
        "all",
        "--request-timeout",
        "20",
        "--generation-deterministic",
    ]
    command += ["--exclude-path", "/health", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env={**os.environ})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated", done.stdout)
    print(done.stdout[-800:])
    assert found, done.stdout[-1500:]
    assert int(found[1]) >= 100, "too little was tried to say anything"
    assert server.process.poll() is None
