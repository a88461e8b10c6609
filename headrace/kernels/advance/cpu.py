"""`advance` on the CPU, compiled: thirty small operations of torch would cost a tenth of a step of a small model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.advance.reference import Advanced, Clocks
from headrace.kernels.cpu_runtime import njit_serial
from headrace.request import Finish

_LENGTH, _STOP, _ERROR = int(Finish.LENGTH), int(Finish.STOP), int(Finish.ERROR)


@njit_serial()
def _advance(clocks: Any, reqs_B: Any, n_kv_B: Any, n_emit_B: Any, emit_BE: Any, out_3B: Any) -> None:
    n_tok, n_done, finish, hist, kv_len, limit, trigger, stop_ids = clocks
    for i in range(len(reqs_B)):
        r = reqs_B[i]
        if r == len(n_tok) - 1 or finish[r] != 0:
            out_3B[0, i], out_3B[1, i], out_3B[2, i] = 0, 0, finish[r]
            continue
        late = max(n_done[r] + n_kv_B[i] - trigger[r], 0)
        wanted = max(n_emit_B[i] - late, 0)
        room = max(limit[r] - n_tok[r], 0)
        most = min(wanted, room)
        reason = _LENGTH if wanted > 0 and most >= room else 0
        kept = 0
        while kept < most:
            token = emit_BE[i, kept]
            if token < 0:
                reason = _ERROR
                break
            hist[r, n_tok[r] + kept] = token
            kept += 1
            stopped = False
            for s in range(stop_ids.shape[1]):
                stopped |= stop_ids[r, s] == token
            if stopped:
                reason = _STOP
                break
        rows = n_kv_B[i] - max(late, n_emit_B[i] - kept)
        n_tok[r] += kept
        n_done[r] += rows
        for g in range(len(kv_len)):
            kv_len[g, r] += rows
        finish[r] = reason
        out_3B[0, i], out_3B[1, i], out_3B[2, i] = rows, kept, reason


def advance_cpu(clocks: Clocks, reqs_B: Tensor, n_kv_B: Tensor, n_emit_B: Tensor, emit_BE: Tensor) -> Advanced:
    """See the package."""
    out_3B = np.empty((3, len(reqs_B)), np.int32)
    tables = tuple([x.numpy() for x in clocks])
    _advance(tables, reqs_B.numpy(), n_kv_B.numpy(), n_emit_B.numpy(), emit_BE.contiguous().numpy(), out_3B)
    return Advanced(*map(torch.from_numpy, out_3B))
