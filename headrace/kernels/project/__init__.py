"""The operations `project` and `project_onto`: linear maps with the norm before and the gate or the sum behind them.

    project:       y = x W^T + b, x normalised first if asked (arXiv 1910.07467), y gated if asked (arXiv 2002.05202)
    project_onto:  y += x W^T + b in place

Every intermediate result (what the norm gives, the product, the silu) is rounded to the type of x, as if each were an
operation of its own. Letters: R rows, E inputs, N outputs, F = N / 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.project import gpu_shape
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul

__all__ = ["project", "project_onto"]


def project(
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
) -> Tensor:
    """A linear map. For few rows of 16-bit numbers a GPU has a kernel (`gpu_shape.CHOSEN_ROWS`); all else is composed.

    Composed means: `rms_norm`, the library's product, `silu_mul`.

    Args:
        x_RE: [R, E], left as it is.
        weight_NE: [N, E], of the type of x.
        bias_N: [N], or None.
        norm: weight [E] and eps of an RMS norm of x; None: x is taken as it is.
        gated: the first half of the outputs are gates of the second.

    Returns:
        A new tensor [R, N], or [R, N / 2] if gated.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        RuntimeError, ValueError: shapes or types do not fit, as the parts say it.
    """
    if x_RE.is_cuda and x_RE.shape[0] <= gpu_shape.CHOSEN_ROWS:
        from headrace.kernels.project import gpu  # Triton is loaded where it is used

        if gpu.takes(x_RE, weight_NE, bias_N, norm, gated=gated):
            return gpu.project_gpu(x_RE, weight_NE, bias_N, norm=norm, gated=gated)
    if norm is not None:
        x_RE = rms_norm(x_RE, *norm)
    y_RN = F.linear(x_RE, weight_NE, bias_N)
    return silu_mul(y_RN) if gated else y_RN


def project_onto(y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> None:
    """y += x W^T + b, in place: the sum costs no pass of its own. Which form runs: see `project`.

    Args:
        y_RN: [R, N], overwritten; shares no memory with x.
        x_RE: [R, E], left as it is.
        weight_NE: [N, E], of the type of x.
        bias_N: [N], or None. It is added to the rounded sum.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        RuntimeError: shapes or types do not fit, as torch says it.
    """
    if x_RE.is_cuda and x_RE.shape[0] <= gpu_shape.CHOSEN_ROWS:
        from headrace.kernels.project import gpu  # Triton is loaded where it is used

        if gpu.takes_onto(y_RN, x_RE, weight_NE, bias_N):
            return gpu.project_onto_gpu(y_RN, x_RE, weight_NE, bias_N)
    y_RN.addmm_(x_RE, weight_NE.t())
    if bias_N is not None:
        y_RN.add_(bias_N)
    return None
