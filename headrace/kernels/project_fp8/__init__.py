"""The operation `project_fp8`: y = x W^T with weights that are 8-bit floats in memory.

    w_ne = float(code_ne) * scale_ng,   g = e // group size

Letters: see the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.project_fp8.reference import FP8, project_fp8_reference

__all__ = ["FP8", "project_fp8"]


def project_fp8(x_RE: Tensor, codes_NE: Tensor, scales_NG: Tensor, *, group: int) -> Tensor:
    """A linear map over 8-bit weights; never more than a block of them is dense at a time.

    The CPU has compiled forms for float32, bfloat16 and float16, a GPU kernels for the same three; float64 is the
    reference's.

    Args:
        x_RE: [R, E], left as it is.
        codes_NE: float8_e4m3fn [N, E], no NaN.
        scales_NG: float32 [N, G].
        group: inputs that share a scale of an output; the last group may have fewer.

    Returns:
        A new tensor [R, N] of the type of x.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes do not fit.
    """
    outputs, inputs = codes_NE.shape
    if x_RE.shape[1] != inputs or scales_NG.shape != (outputs, -(-inputs // group)):
        raise ValueError(
            f"rows of {x_RE.shape[1]} inputs and groups of {group} do not fit codes {tuple(codes_NE.shape)} and scales "
            f"{tuple(scales_NG.shape)}"
        )
    if x_RE.dtype != torch.float64:
        if x_RE.is_cuda:
            from headrace.kernels.project_fp8 import gpu  # Triton is loaded where it is used

            return gpu.project_fp8_gpu(x_RE, codes_NE, scales_NG, group)
        if x_RE.is_cpu:
            from headrace.kernels.project_fp8 import cpu  # numba is loaded where it is used

            if cpu.takes(codes_NE, scales_NG):
                return cpu.project_fp8_cpu(x_RE, codes_NE, scales_NG, group)
    return project_fp8_reference(x_RE, codes_NE, scales_NG, group=group)
