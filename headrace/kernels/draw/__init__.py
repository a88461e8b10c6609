"""The operation `draw`: one token a row, from keyed noise.

    token = argmax over v of log p'(v) + g(stream, t_out, nth, purpose, v),   ties to the lowest id

p' is what temperature, min-p, top-k and top-p, in this order, leave of softmax(logits); g is standard Gumbel noise
from Philox4x32-10 (Salmon et al. 2011). A token is thus a function of its own row and key, whatever else runs.
Letters: M output rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.draw.keys import stream_key
from headrace.kernels.draw.reference import Drawn, DrawParams, draw_reference

__all__ = ["DrawParams", "Drawn", "draw", "stream_key"]


def draw(
    logits_MV: Tensor,
    params: DrawParams,
    stream_M2: Tensor,
    t_out_M: Tensor,
    *,
    raw_MV: Tensor | None = None,
    nth: int | Tensor = 0,
    purpose: int = 0,
) -> Drawn:
    """Draw one token a row. float32 on the CPU runs the compiled form; on a GPU float32, bfloat16 and float16 do.

    Everything else runs the reference. Nothing waits for the device.

    Args:
        logits_MV: [M, V] after bias, penalties and grammar; entries may be -inf.
        params: filters, one entry a row.
        stream_M2: int32 [M, 2], key of the row's noise stream, as `stream_key` gives it.
        t_out_M: int32 [M], index of the token that the row decides.
        raw_MV: [M, V], the model's own logits; None: the same as `logits_MV`.
        nth: step inside a block, one number or int32 [M].
        purpose: what the noise is for; 0 for tokens.

    Returns:
        Ids and log-probs. A row that holds NaN, +inf or nothing finite, here or in `raw_MV`, has id -1.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: shapes do not fit together.
    """
    _check(logits_MV, params, stream_M2, t_out_M, raw_MV)
    if logits_MV.dtype is torch.float32 and logits_MV.device.type == "cpu":
        from headrace.kernels.draw.cpu import draw_cpu  # numba is loaded where it is used

        return draw_cpu(logits_MV, params, stream_M2, t_out_M, raw_MV=raw_MV, nth=nth, purpose=purpose)
    if logits_MV.device.type == "cuda":
        from headrace.kernels.draw import gpu  # Triton is loaded where it is used

        if logits_MV.dtype in gpu.TYPES:
            return gpu.draw_gpu(logits_MV, params, stream_M2, t_out_M, raw_MV=raw_MV, nth=nth, purpose=purpose)
    return draw_reference(logits_MV, params, stream_M2, t_out_M, raw_MV=raw_MV, nth=nth, purpose=purpose)


def _check(logits_MV: Tensor, params: DrawParams, stream_M2: Tensor, t_out_M: Tensor, raw_MV: Tensor | None) -> None:
    if logits_MV.dim() != 2 or logits_MV.shape[1] == 0:
        raise ValueError(f"logits have shape {tuple(logits_MV.shape)}; draw takes [rows, vocabulary], vocabulary > 0")
    rows = logits_MV.shape[0]
    if raw_MV is not None and raw_MV.shape != logits_MV.shape:
        raise ValueError(f"raw logits have shape {tuple(raw_MV.shape)}; logits have {tuple(logits_MV.shape)}")
    if stream_M2.shape != (rows, 2):
        raise ValueError(f"stream has shape {tuple(stream_M2.shape)}; {rows} rows need {(rows, 2)}")
    for tensor_M in (*params, t_out_M):
        if tensor_M.shape != (rows,):
            names = [*params._fields, "t_out_M"]
            raise ValueError(f"{rows} rows need {names} of shape {(rows,)}; one has {tuple(tensor_M.shape)}")
