"""The operation `advance`: clamp what was resolved, append it to the histories, advance the clocks.

A request emits nothing behind its first stop token, its limit or its trigger: rows behind a trigger would see what a
cache policy is about to change. Each token that is not emitted is a row less that is committed. An emitted id of -1
(nothing could be drawn) ends the request with an error and is not emitted. Requests that have ended already, and the
ghost, stay as they are. Letters: B requests of the step, Bmax request indices (index Bmax is the ghost), E tokens at
most, G cache groups.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.advance.reference import Advanced, Clocks, advance_reference

__all__ = ["Advanced", "Clocks", "advance"]


def advance(clocks: Clocks, reqs_B: Tensor, n_kv_B: Tensor, n_emit_B: Tensor, emit_BE: Tensor) -> Advanced:
    """Change the tables in place. The CPU and a GPU run compiled forms. No host synchronisation.

    Args:
        clocks: tables by request index.
        reqs_B: request indices, int64 [B], each once but for the ghost's.
        n_kv_B, n_emit_B: rows and tokens as resolved, int32 [B].
        emit_BE: token ids, int32 [B, E]; entries from n_emit on are not read.
    """
    if reqs_B.device.type == "cpu":
        from headrace.kernels.advance.cpu import advance_cpu  # numba is loaded where it is used

        return advance_cpu(clocks, reqs_B, n_kv_B, n_emit_B, emit_BE)
    if reqs_B.device.type == "cuda":
        from headrace.kernels.advance.gpu import advance_gpu  # Triton is loaded where it is used

        return advance_gpu(clocks, reqs_B, n_kv_B, n_emit_B, emit_BE)
    return advance_reference(clocks, reqs_B, n_kv_B, n_emit_B, emit_BE)
