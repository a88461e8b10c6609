"""The operation `rotate_`: x <- x * cos + (second half, first half) * sin in place (Su et al., arXiv 2104.09864).

Letters: R rows, N heads, D head size.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.cpu_types import TYPES
from headrace.kernels.rotary.reference import rotate_reference_

__all__ = ["rotate_"]


def rotate_(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> None:
    """Turn all heads of each row in place. The CPU runs the compiled form for float32 and bfloat16, a GPU its own for
    these and float16; everything else runs the reference.

    Args:
        x_RND: [R, N, D], D even; may be a view of a wider tensor.
        cos_R1D: [R, 1, D], cosines of the row's angles, twice.
        sin_R1D: [R, 1, D], sines of the row's angles, twice, the first time negative.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes do not fit together.
    """
    shape = (x_RND.shape[0], 1, x_RND.shape[-1])
    if x_RND.dim() != 3 or shape[2] % 2 or cos_R1D.shape != shape or sin_R1D.shape != shape:
        raise ValueError(
            f"x has shape {tuple(x_RND.shape)}, cos {tuple(cos_R1D.shape)}, sin {tuple(sin_R1D.shape)}; "
            "rotate_ takes [rows, heads, size], size even, and twice [rows, 1, size]"
        )
    dtype = x_RND.dtype
    if x_RND.is_cpu and dtype in TYPES and cos_R1D.dtype is dtype and sin_R1D.dtype is dtype and x_RND.stride(2) == 1:
        from headrace.kernels.rotary.cpu import rotate_cpu_  # numba is loaded where it is used

        rotate_cpu_(x_RND, cos_R1D, sin_R1D)
        return
    if x_RND.is_cuda:
        from headrace.kernels.rotary import gpu  # Triton is loaded where it is used

        if dtype in gpu.TYPES and cos_R1D.dtype is dtype and sin_R1D.dtype is dtype:
            gpu.rotate_gpu_(x_RND, cos_R1D, sin_R1D)
            return
    rotate_reference_(x_RND, cos_R1D, sin_R1D)
