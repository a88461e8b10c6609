"""Set-up of the tests of GPU forms: on a GPU compiled and marked `gpu`, elsewhere in Triton's interpreter on the CPU.

Import this before anything that imports Triton: it reads the variable when it is first imported.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

if not HAS_GPU and os.environ.setdefault("TRITON_INTERPRET", "1") == "1" and "triton" in sys.modules:
    import triton.language as tl

    # Triton's own functions became compiled ones, which the interpreter cannot call.
    assert "Interpreted" in type(tl.max).__name__, "Triton was imported before TRITON_INTERPRET was set"

pytest.importorskip("triton", reason="the kernels of GPUs are written in Triton")

marks = [pytest.mark.gpu] if HAS_GPU else []
