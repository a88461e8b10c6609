"""What the compiled forms of the CPU know, apart from them: a process that works on a GPU loads no numba."""

from __future__ import annotations

import torch

TYPES = (torch.float32, torch.bfloat16)
"""Element types of the forms that go row by row."""
