"""The operation `project_int4`: y = x W with weights that are 4-bit codes in memory.

    w_en = (code_en - zero_gn) * scale_gn,   g = e // group size

The layout of the engine: words of eight inputs, outputs side by side. Checkpoints of other layouts are rearranged when
they are loaded (`headrace.quantization`). Letters: see the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.project_int4.reference import project_int4_reference

__all__ = ["project_int4"]


def project_int4(x_RE: Tensor, words_WN: Tensor, zeros_GN: Tensor, scales_GN: Tensor, *, group: int) -> Tensor:
    """A linear map over packed weights; never more than a block of them is dense at a time.

    The CPU has compiled forms for float32, bfloat16 and float16, a GPU kernels for the same three; float64 is the
    reference's.

    Args:
        x_RE: [R, E], left as it is.
        words_WN: int32 [W, N], the code of input 8 w + i in bits 4 i to 4 i + 3 of word w.
        zeros_GN: uint8 [G, N], 0 to 16.
        scales_GN: float32 [G, N].
        group: inputs of a group; the last group may have fewer.

    Returns:
        A new tensor [R, N] of the type of x.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes do not fit.
    """
    inputs, groups = x_RE.shape[1], -(-x_RE.shape[1] // group)
    if words_WN.shape[0] != -(-inputs // 8) or zeros_GN.shape != scales_GN.shape or scales_GN.shape[0] != groups:
        raise ValueError(
            f"rows of {inputs} inputs in groups of {group} do not fit words {tuple(words_WN.shape)}, zeros "
            f"{tuple(zeros_GN.shape)} and scales {tuple(scales_GN.shape)}"
        )
    if x_RE.dtype != torch.float64:
        if x_RE.is_cuda:
            from headrace.kernels.project_int4 import gpu  # Triton is loaded where it is used

            return gpu.project_int4_gpu(x_RE, words_WN, zeros_GN, scales_GN, group)
        if x_RE.is_cpu:
            from headrace.kernels.project_int4 import cpu  # numba is loaded where it is used

            if cpu.takes(words_WN, zeros_GN, scales_GN, group):
                return cpu.project_int4_cpu(x_RE, words_WN, zeros_GN, scales_GN, group)
    return project_int4_reference(x_RE, words_WN, zeros_GN, scales_GN, group=group)
