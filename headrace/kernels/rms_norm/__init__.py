"""The operation `rms_norm`: y = x / sqrt(mean(x^2) + eps) * w over the last axis (arXiv 1910.07467).

A result is rounded to the type of x once. A row's bits depend on that row alone.
Letters: R rows, N heads, E width of what is normalised.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.cpu_types import TYPES
from headrace.kernels.rms_norm.reference import rms_norm_reference

__all__ = ["rms_norm"]


def rms_norm(x_RE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Normalise every row. The CPU runs the compiled form for float32 and bfloat16, a GPU its own for float16 too.

    Everything else runs the reference.

    Args:
        x_RE: [..., E], any strides; left as it is.
        weight_E: [E], or [N, E] for x [..., N, E]: one weight a head. Of the type of x, or wider.
        eps: added to the mean square.

    Returns:
        A new contiguous tensor of the shape of x.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: the weight's shape is not that of the last one or two axes of x.
    """
    axes = weight_E.dim()
    if not 1 <= axes <= 2 or x_RE.shape[-axes:] != weight_E.shape:
        raise ValueError(
            f"weight has shape {tuple(weight_E.shape)}; its axes must be the last one or two of x {tuple(x_RE.shape)}"
        )
    if x_RE.is_cpu and x_RE.dtype in TYPES and weight_E.dtype is x_RE.dtype:
        from headrace.kernels.rms_norm.cpu import rms_norm_cpu  # numba is loaded where it is used

        return rms_norm_cpu(x_RE, weight_E, eps)
    if x_RE.is_cuda:
        from headrace.kernels.rms_norm import gpu  # Triton is loaded where it is used

        if x_RE.dtype in gpu.TYPES and weight_E.dtype in gpu.TYPES:
            return gpu.rms_norm_gpu(x_RE, weight_E, eps)
    return rms_norm_reference(x_RE, weight_E, eps)
