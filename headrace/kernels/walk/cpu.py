"""`walk` on the CPU, compiled: one pass instead of twenty-five small operations of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu_runtime import njit_serial
from headrace.kernels.walk.reference import Drafts, Walked, Walks


@njit_serial()
def _walk(walks: Any, id_M: Any, token_BK: Any, count_B: Any, out_2B: Any, emit_BW: Any, priced_by_BW: Any) -> None:
    n_tok, n_done, reqs_B, grant_B, n_out_B, out_first_B = walks
    for i in range(len(reqs_B)):
        r = reqs_B[i]
        pending = np.int64(n_tok[r]) - n_done[r]
        start = pending - 1 - (grant_B[i] - n_out_B[i])
        for w in range(emit_BW.shape[1]):
            place = out_first_B[i] + min(max(start + w, 0), n_out_B[i] - 1)
            emit_BW[i, w], priced_by_BW[i, w] = id_M[place], place
        if grant_B[i] < pending:
            out_2B[0, i], out_2B[1, i] = grant_B[i], 0
            continue
        accepted = 0
        for k in range(emit_BW.shape[1] - 1):
            drawn = max(start + k + 1, 0) < n_out_B[i]
            if not drawn or k >= count_B[r] or emit_BW[i, k] != token_BK[r, k]:
                break
            accepted += 1
        out_2B[0, i], out_2B[1, i] = pending + accepted, accepted + 1


_NONE_2 = np.zeros((1, 0), np.int32)
_NONE_1 = np.zeros(1, np.int32)


def walk_cpu(walks: Walks, id_M: Tensor, drafts: Drafts | None = None) -> Walked:
    """See the package."""
    n_reqs, width = len(walks.reqs_B), 1 if drafts is None else drafts.token_BK.shape[1] + 1
    out_2B = np.empty((2, n_reqs), np.int32)
    emit_BW, priced_by_BW = np.empty((2, n_reqs, width), np.int32)
    tables = (_NONE_2, _NONE_1) if drafts is None else (drafts.token_BK.numpy(), drafts.count_B.numpy())
    _walk(tuple([x.numpy() for x in walks]), id_M.numpy(), *tables, out_2B, emit_BW, priced_by_BW)
    return Walked(*map(torch.from_numpy, (*out_2B, emit_BW, priced_by_BW)))
