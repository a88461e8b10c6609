"""The operations `project` and `project_onto` with sums in a fixed order: a row's bits depend on that row alone.

    project_fixed:       y = x W^T + b, x normalised first if asked, y gated if asked
    project_fixed_onto:  y += x W^T + b in place

A library chooses how it sums over the inputs by the number of rows, so a row's last bits change with its batch. Here
the order follows from the weight's shape only: not from the number of rows, nor from a row's place among them
("Defeating Nondeterminism in LLM Inference", Thinking Machines, 2025). Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.cpu_types import TYPES
from headrace.kernels.project_fixed.reference import project_fixed_onto_reference, project_fixed_reference
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul

__all__ = ["project_fixed", "project_fixed_onto"]


def project_fixed(
    x_RE: Tensor,
    weight_NE: Tensor,
    bias_N: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
) -> Tensor:
    """A linear map. Everything that has no kernel runs the reference, row by row.

    Args:
        x_RE: [R, E], left as it is.
        weight_NE: [N, E], of the type of x. On the CPU float32 and bfloat16 have a kernel, on a GPU float16 too.
        bias_N: [N], or None. Added to the sum before that is rounded.
        norm: weight [E] and eps of an RMS norm of x; None: x is taken as it is.
        gated: the first half of the outputs are gates of the second.

    Returns:
        A new tensor [R, N], or [R, N / 2] if gated.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes or types do not fit.
    """
    if norm is not None:
        x_RE = rms_norm(x_RE, *norm)
    _check(x_RE, weight_NE, bias_N)
    y_RN = _multiply(x_RE, weight_NE, bias_N, None)
    return silu_mul(y_RN) if gated else y_RN


def project_fixed_onto(y_RN: Tensor, x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> None:
    """y += x W^T + b, in place.

    Args:
        y_RN: [R, N], overwritten; shares no memory with x.
        x_RE, weight_NE: see `project_fixed`.
        bias_N: [N], or None. It is added to the rounded sum.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes or types do not fit.
    """
    _check(x_RE, weight_NE, bias_N)
    if y_RN.shape != (x_RE.shape[0], weight_NE.shape[0]) or y_RN.dtype is not x_RE.dtype:
        raise ValueError(f"y is {y_RN.dtype} {list(y_RN.shape)}, the product {x_RE.dtype} of {weight_NE.shape[0]}")
    _multiply(x_RE, weight_NE, bias_N, y_RN)


def _multiply(x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, onto_RN: Tensor | None) -> Tensor:
    """x W^T + b; with `onto` the sum goes there, and is returned."""
    if x_RE.is_cuda:
        from headrace.kernels.project_fixed import gpu  # Triton is loaded where it is used

        if x_RE.dtype in gpu.TYPES:
            return gpu.multiply_gpu(x_RE, weight_NE, bias_N, onto_RN)
    elif x_RE.is_cpu and x_RE.dtype in TYPES:
        from headrace.kernels.project_fixed import cpu  # numba is loaded where it is used

        return cpu.multiply_cpu(x_RE, weight_NE, bias_N, onto_RN)
    if onto_RN is None:
        return project_fixed_reference(x_RE, weight_NE, bias_N)
    project_fixed_onto_reference(onto_RN, x_RE, weight_NE, bias_N)
    return onto_RN


def _check(x_RE: Tensor, weight_NE: Tensor, bias_N: Tensor | None) -> None:
    if x_RE.dim() != 2 or weight_NE.dim() != 2 or x_RE.shape[1] != weight_NE.shape[1]:
        raise ValueError(f"x is {list(x_RE.shape)} and the weight {list(weight_NE.shape)}: [R, E] and [N, E]")
    if x_RE.dtype is not weight_NE.dtype or (bias_N is not None and bias_N.dtype is not x_RE.dtype):
        raise ValueError(f"x is {x_RE.dtype} and the weight {weight_NE.dtype}: one type for all, the bias too")
    if bias_N is not None and bias_N.shape != weight_NE.shape[:1]:
        raise ValueError(f"the bias is {list(bias_N.shape)}, and there are {weight_NE.shape[0]} outputs")
