"""The operation `silu_mul`: out = silu(gate) * up on gate and up side by side (arXiv 2002.05202).

Letters: R rows, F feed-forward width.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.cpu_types import TYPES
from headrace.kernels.silu_mul.reference import silu_mul_reference

__all__ = ["silu_mul"]


def silu_mul(gate_up_R2F: Tensor) -> Tensor:
    """silu(gate) * up. The CPU runs the compiled form for float32 and bfloat16, a GPU its own for these and float16.

    Everything else runs the reference.

    Args:
        gate_up_R2F: [R, 2F], in each row F gates and then F ups; any strides; left as it is.

    Returns:
        A new tensor [R, F].

    Raises:
        ConfigError: the tensor is on a GPU and Triton cannot be imported.
        ValueError: not a matrix with an even number of columns.
    """
    if gate_up_R2F.dim() != 2 or gate_up_R2F.shape[1] % 2:
        raise ValueError(f"gate and up have shape {tuple(gate_up_R2F.shape)}; silu_mul takes [rows, 2 * width]")
    if gate_up_R2F.is_cpu and gate_up_R2F.dtype in TYPES:
        from headrace.kernels.silu_mul.cpu import silu_mul_cpu  # numba is loaded where it is used

        return silu_mul_cpu(gate_up_R2F)
    if gate_up_R2F.is_cuda:
        from headrace.kernels.silu_mul import gpu  # Triton is loaded where it is used

        if gate_up_R2F.dtype in gpu.TYPES:
            return gpu.silu_mul_gpu(gate_up_R2F)
    return silu_mul_reference(gate_up_R2F)
