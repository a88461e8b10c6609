"""The operation `adapt_`: each row's own low-rank change of a linear map (LoRA, arXiv 2106.09685).

    y += B_s (A_s x) for the rows x with place s > 0; rows with place 0 stay as they are

Rows of any places in any order share one call, as in Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285). A_s x is
rounded to the type of x; its product with B_s is summed in float32 (float64 for float64) and rounded with the sum.
Letters: R rows, E inputs, N outputs, P projections side by side, Q rank, K = P Q, S places.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.adapt.reference import Factors, adapt_reference_
from headrace.kernels.cpu_types import TYPES

__all__ = ["Factors", "adapt_"]


def adapt_(y_RN: Tensor, x_RE: Tensor, slot_R: Tensor, factors: Factors) -> None:
    """Add to each row what its place says, in place.

    The CPU runs the compiled form for float32 and bfloat16, in which a row's bits depend on the row alone; a GPU its
    own for these, float16 and float64, without waiting. Everything else runs the reference.

    Args:
        y_RN: [R, N], what the linear map gave; overwritten.
        x_RE: [R, E], the map's input, left as it is.
        slot_R: places, int32 [R], 0 to S - 1.
        factors: of all places, of the type of x and y.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes or types do not fit.
    """
    (_, inputs, _), (_, _, outputs) = factors.a_SEK.shape, factors.b_SQN.shape
    rows = slot_R.shape[0]
    if y_RN.shape != (rows, outputs) or x_RE.shape != (rows, inputs):
        raise ValueError(
            f"y has shape {tuple(y_RN.shape)} and x {tuple(x_RE.shape)}; {rows} places of factors from {inputs} to "
            f"{outputs} need ({rows}, {outputs}) and ({rows}, {inputs})"
        )
    if not y_RN.dtype == x_RE.dtype == factors.a_SEK.dtype == factors.b_SQN.dtype:
        raise ValueError(f"y is {y_RN.dtype}, x {x_RE.dtype}, the factors {factors.a_SEK.dtype}: they must be the same")
    if y_RN.is_cpu and y_RN.dtype in TYPES:
        from headrace.kernels.adapt.cpu import adapt_cpu_  # numba is loaded where it is used

        return adapt_cpu_(y_RN, x_RE, slot_R, factors)
    if y_RN.is_cuda:
        from headrace.kernels.adapt import gpu  # Triton is loaded where it is used

        return gpu.adapt_gpu_(y_RN, x_RE, slot_R, factors)
    return adapt_reference_(y_RN, x_RE, slot_R, factors)
