"""The kernels of GPUs compile, GPU or not: what the interpreter forgives, the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = {"_norm", "_rotate", "_silu_mul", "scan", "contest", "finish", "_advance", "_fill"}
NAMES |= {"_place", "_walk", "_gather", "_pack", "_turn"}
NAMES |= {"multiply_row", "multiply_tile", "multiply_fixed", "multiply_experts"}
NAMES |= {"_shrink_row", "_expand_row", "_shrink_tile", "_expand_tile"}
NAMES |= {"list_items", "list_tiles", "attend_tiles", "attend_few", "merge_splits", "write_rows"}
NAMES |= {"int4_row", "int4_tile", "int4_unpack", "fp8_row", "fp8_tile", "fp8_unpack"}
MOST_SHARED = 227 * 2**10
"""Bytes of shared memory that a program can have on compute capability 9.0."""


def test_all_kernels_compile(tmp_path: Path) -> None:
    """In a process of its own: this one may have imported Triton for its interpreter."""
    pytest.importorskip("triton", reason="the kernels of GPUs are written in Triton")
    # An empty cache: a kernel from it would not have been compiled.
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_gpu_forms.py"))],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shared = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in shared} == NAMES
    assert all(int(size) <= MOST_SHARED for _, size in shared), "a program asks for more than there is"
