"""The operation `walk`: the coupled walk along chains of drafts, of which plain decoding is the case without drafts.

Rows of a request are its pending tokens and then its drafts; its last rows have draws. Every draw from that of the last
pending row on is the target's own token: a draft is accepted while it equals what the row before it drew, and the
first draw that no draft matches is emitted too. With d accepted drafts the pending rows and d more are committed and
d + 1 tokens emitted; where the last pending row is not among the rows, they are committed and nothing is emitted.
(Speculative decoding: arXiv 2211.17192; with shared noise: the Gumbel coupling of arXiv 2403.10444.)

Letters: B requests of the step, M draws, K drafts at most, W = K + 1 tokens emitted at most.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.walk.reference import Drafts, Walked, Walks, walk_reference

__all__ = ["Drafts", "Walked", "Walks", "walk"]


def walk(walks: Walks, id_M: Tensor, drafts: Drafts | None = None) -> Walked:
    """What is committed and emitted. The CPU and a GPU run compiled forms. No host synchronisation.

    Args:
        walks: tables by request index, and the rows and draws of each request of the step, at least one each.
        id_M: drawn tokens, int32 [M].
        drafts: those of all requests by request index; None: there are none.
    """
    if id_M.device.type == "cpu":
        from headrace.kernels.walk.cpu import walk_cpu  # numba is loaded where it is used

        return walk_cpu(walks, id_M, drafts)
    if id_M.device.type == "cuda":
        from headrace.kernels.walk.gpu import walk_gpu  # Triton is loaded where it is used

        return walk_gpu(walks, id_M, drafts)
    return walk_reference(walks, id_M, drafts)
