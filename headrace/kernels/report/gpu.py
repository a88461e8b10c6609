"""`report` on a GPU: one kernel, a block of requests a program."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.advance import Advanced
from headrace.kernels.gpu_runtime import tl, triton
from headrace.kernels.report.reference import HEAD, Priced

_BLOCK = 32
"""Requests of a program."""


@triton.jit(do_not_specialize=["n_reqs"])
def _pack(
    n_kv_B,
    n_emit_B,
    finish_B,
    drafted_B,
    emit_BE,
    priced_by_BE,
    logp_M,
    out,
    n_reqs,
    e_max,
    emit_row,
    priced_row,
    HAS_DRAFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < n_reqs
    tl.store(out + i, tl.load(n_kv_B + i, mask=here, other=0), mask=here)
    tl.store(out + n_reqs + i, tl.load(n_emit_B + i, mask=here, other=0), mask=here)
    tl.store(out + 2 * n_reqs + i, tl.load(finish_B + i, mask=here, other=0), mask=here)
    drafted = tl.zeros([BLOCK], tl.int32)
    if HAS_DRAFTED:
        drafted = tl.load(drafted_B + i, mask=here, other=0)
    tl.store(out + 3 * n_reqs + i, drafted, mask=here)
    for e in range(e_max):
        token = tl.load(emit_BE + i * emit_row + e, mask=here, other=0)
        draw = tl.load(priced_by_BE + i * priced_row + e, mask=here, other=0)
        logp = tl.load(logp_M + draw, mask=here, other=0.0)
        tl.store(out + (4 + e) * n_reqs + i, token, mask=here)
        tl.store(out + (4 + e_max + e) * n_reqs + i, logp.to(tl.int32, bitcast=True), mask=here)


def report_gpu(advanced: Advanced, drafted_B: Tensor | None, priced: Priced) -> Tensor:
    """See the package. Tokens of a request are neighbours."""
    n_reqs, e_max = priced.emit_BE.shape
    emit_BE, priced_by_BE = (x if x.stride(1) == 1 else x.contiguous() for x in priced[:2])
    out = torch.empty((HEAD + 2 * e_max, n_reqs), dtype=torch.int32, device=emit_BE.device)
    if n_reqs:
        _pack[(-(-n_reqs // _BLOCK),)](
            *advanced,
            advanced.n_kv_B if drafted_B is None else drafted_B.contiguous(),
            emit_BE,
            priced_by_BE,
            priced.logp_M,
            out,
            n_reqs,
            e_max,
            emit_BE.stride(0),
            priced_by_BE.stride(0),
            HAS_DRAFTED=drafted_B is not None,
            BLOCK=_BLOCK,
            num_warps=1,
        )
    return out
