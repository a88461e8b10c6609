"""`place` on a GPU: one kernel, a block of rows a program."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import tl, triton

_BLOCK = 128
"""Rows of a program."""


@triton.jit(do_not_specialize=["n_rows"])
def _place(
    req_R, dst_R, kv_len_B, page_table_BP, out_R, n_rows, table_row, n_pages, S: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < n_rows
    req = tl.load(req_R + row, mask=here, other=0).to(tl.int64)
    slot = tl.load(kv_len_B + req, mask=here, other=0) + tl.load(dst_R + row, mask=here, other=0)
    inside = here & (slot >= 0) & (slot < n_pages * S)
    page = tl.load(page_table_BP + req * table_row + slot // S, mask=inside, other=0).to(tl.int64)
    # Triton's remainder has the sign of the dividend.
    tl.store(out_R + row, page * S + (slot % S + S) % S, mask=here)


def place_gpu(req_R: Tensor, dst_R: Tensor, kv_len_B: Tensor, page_table_BP: Tensor, page_size: int) -> Tensor:
    """See the package. All tables have neighbouring entries along their last axis."""
    n_rows = req_R.shape[0]
    out_R = torch.empty(n_rows, dtype=torch.int64, device=req_R.device)
    if n_rows:
        _place[(-(-n_rows // _BLOCK),)](
            req_R,
            dst_R,
            kv_len_B,
            page_table_BP,
            out_R,
            n_rows,
            page_table_BP.stride(0),
            page_table_BP.shape[1],
            S=page_size,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out_R
