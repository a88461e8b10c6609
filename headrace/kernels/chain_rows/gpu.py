"""`chain_rows` on a GPU: one kernel, a block of rows a program."""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.chain_rows.reference import History
from headrace.kernels.gpu_runtime import tl, triton
from headrace.step import NONE, RowTable

_NONE = tl.constexpr(NONE)
_BLOCK = 128
"""Rows of a program."""


@triton.jit(do_not_specialize=["n_rows"])
def _fill(
    tok,
    req,
    t,
    pos_AR,
    dst,
    a,
    b,
    c,
    bits,
    reqs_B,
    hist,
    n_done,
    pos_off,
    entry_R,
    k_R,
    n_rows,
    ghost,
    n_axes,
    hist_row,
    pos_row,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < n_rows
    r = tl.load(reqs_B + tl.load(entry_R + row, mask=here, other=0), mask=here, other=0)
    is_request = here & (r != ghost)
    k = tl.load(k_R + row, mask=is_request, other=0)
    index = tl.load(n_done + r, mask=is_request, other=0) + k
    position = index + tl.load(pos_off + r, mask=is_request, other=0)
    tl.store(tok + row, tl.load(hist + r.to(tl.int64) * hist_row + index, mask=is_request, other=0), mask=here)
    tl.store(req + row, r, mask=here)
    tl.store(t + row, index, mask=here)
    tl.store(dst + row, k, mask=here)
    tl.store(a + row, tl.where(r == ghost, _NONE, 0), mask=here)
    tl.store(b + row, tl.zeros_like(k), mask=here)
    tl.store(c + row, k + 1, mask=here)
    tl.store(bits + row, tl.full([BLOCK], -1, tl.int32), mask=here)
    for axis in range(n_axes):
        tl.store(pos_AR + axis * pos_row + row, position, mask=here)


def chain_rows_gpu(rows: RowTable, history: History, entry_R: Tensor, k_R: Tensor) -> None:
    """See the package. All tables have neighbouring entries along their last axis."""
    n_rows = k_R.shape[0]
    if not n_rows:
        return
    _fill[(-(-n_rows // _BLOCK),)](
        rows.tok,
        rows.req,
        rows.t,
        rows.pos,
        rows.dst,
        rows.a,
        rows.b,
        rows.c,
        rows.bits,
        rows.reqs,
        *history,
        entry_R.contiguous(),
        k_R.contiguous(),
        n_rows,
        history.n_done.shape[0] - 1,
        rows.pos.shape[0],
        history.hist.stride(0),
        rows.pos.stride(0),
        BLOCK=_BLOCK,
        num_warps=4,
    )
