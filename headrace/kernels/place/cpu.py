"""`place` on the CPU, compiled: one pass instead of ten small operations of torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.kernels.cpu_runtime import njit_serial


@njit_serial()
def _place(req_R: Any, dst_R: Any, kv_len_B: Any, page_table_BP: Any, page_size: int, out_R: Any) -> None:
    slots = page_table_BP.shape[1] * page_size
    for row in range(len(req_R)):
        slot = np.int64(kv_len_B[req_R[row]]) + dst_R[row]
        page = page_table_BP[req_R[row], slot // page_size] if 0 <= slot < slots else 0
        out_R[row] = np.int64(page) * page_size + slot % page_size


def place_cpu(req_R: Tensor, dst_R: Tensor, kv_len_B: Tensor, page_table_BP: Tensor, page_size: int) -> Tensor:
    """See the package."""
    out_R = np.empty(len(req_R), np.int64)
    _place(req_R.numpy(), dst_R.numpy(), kv_len_B.numpy(), page_table_BP.numpy(), page_size, out_R)
    return torch.from_numpy(out_R)
