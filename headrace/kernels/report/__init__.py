"""The operation `report`: everything that the host reads of a step in one tensor, so that one copy brings it.

Lines of the result, int32 [4 + 2 E, B]: rows committed, tokens emitted, finish reason, drafts for the next step, E
tokens, and the bits of their E log-probs (float32). Letters: B requests, E tokens emitted at most, M draws.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.advance import Advanced
from headrace.kernels.report.reference import HEAD, Priced, report_reference

__all__ = ["HEAD", "Priced", "report"]


def report(advanced: Advanced, drafted_B: Tensor | None, priced: Priced) -> Tensor:
    """Pack. A GPU runs a compiled form; on the CPU nobody needs the result but tests. No host synchronisation.

    Args:
        advanced: rows, tokens and finish reasons, int32 [B] each.
        drafted_B: int32 [B]; None: nothing was drafted.
        priced: tokens and where their log-probs stand.
    """
    if priced.logp_M.device.type == "cuda":
        from headrace.kernels.report.gpu import report_gpu  # Triton is loaded where it is used

        return report_gpu(advanced, drafted_B, priced)
    return report_reference(advanced, drafted_B, priced)
