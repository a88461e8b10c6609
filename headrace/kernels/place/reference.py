"""`place` in plain torch: the definition that the compiled forms are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def place_reference(req_R: Tensor, dst_R: Tensor, kv_len_B: Tensor, page_table_BP: Tensor, page_size: int) -> Tensor:
    """See the package."""
    req_R = req_R.long()
    slot_R = (kv_len_B[req_R] + dst_R).long()
    inside_R = (slot_R >= 0) & (slot_R < page_table_BP.shape[1] * page_size)
    place_R = torch.where(inside_R, slot_R // page_size, 0)
    page_R = torch.where(inside_R, page_table_BP[req_R, place_R].long(), 0)
    return page_R * page_size + slot_R % page_size
