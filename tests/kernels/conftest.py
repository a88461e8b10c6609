"""Where the tests of GPU kernels run: compiled on the GPU if there is one, else in Triton's interpreter on the CPU.

A test that takes the fixture `device` is such a test. With a GPU it carries the marker `gpu`, so that `make test-gpu`
runs it; without one it is part of every run. Triton reads TRITON_INTERPRET when it is imported, which nothing has done
when pytest reads this file.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if HAS_GPU and here in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels' tensors."""
    if HAS_GPU:
        return torch.device("cuda")
    if importlib.util.find_spec("triton") is None and platform.system() != "Linux":
        pytest.skip("Triton is published for Linux only")
    from triton.runtime import interpreter

    from headrace.kernels.gpu_runtime import tl

    assert isinstance(tl.sum, interpreter.InterpretedFunction), "Triton was imported before tests/kernels/conftest.py"
    _teach_bfloat16(interpreter.InterpreterBuilder)
    return torch.device("cpu")


def _teach_bfloat16(builder: Any) -> None:
    """The interpreter keeps bfloat16 as bits in uint16, and its matrix product multiplies these bits as numbers."""
    from triton.runtime.interpreter import TensorHandle

    from headrace.kernels.gpu_runtime import tl

    create_dot = builder.create_dot

    def widen(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot_of_floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    builder.create_dot = create_dot_of_floats
