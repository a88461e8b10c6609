"""The GPU forms compile for an H100, wherever this runs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")
SHARED_BYTES = 227 * 2**10


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and platform.system() != "Linux",
    reason="Triton is published for Linux only",
)
def test_kernels_compile() -> None:
    root = SCRIPT.parents[2]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = Counter(launch["kernel"] for launch in found)
    assert kernels == {"list_tiles": 5, "attend_tiles": 5, "merge_splits": 2, "write_rows": 5}
    assert all(launch["shared"] <= SHARED_BYTES for launch in found)
