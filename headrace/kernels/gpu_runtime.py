"""Triton for the kernels of GPUs, or a sentence that says how to get it.

Only modules of kernels import this, and they are imported when the first one is about to run: Triton comes with the
CUDA builds of torch, and the CPU needs none. With TRITON_INTERPRET=1 set before Triton is first imported, the kernels
run on tensors of the CPU, slowly.
"""

from __future__ import annotations

import torch

from headrace.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ConfigError(
        f"torch {torch.__version__} runs on a GPU, but Triton, in which the kernels of GPUs are written, cannot be "
        f"imported ({error}): install it (pip install triton), or run on the CPU with device='cpu'"
    ) from error

__all__ = ["begin", "tl", "triton"]


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Let the next launch begin and wait for the one before: what a kernel launched with `launch_pdl` does first.

    A kernel that waits for the launch before it has waited for all before that one, too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
