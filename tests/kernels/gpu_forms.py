"""Set-up of the tests of GPU forms: on a GPU compiled and marked `gpu`, elsewhere in Triton's interpreter on the CPU.

conftest.py has asked for the interpreter where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

pytest.importorskip("triton", reason="the kernels of GPUs are written in Triton")

marks = [pytest.mark.gpu] if HAS_GPU else []
