"""`turn` in plain torch, from the definitions of its parts: what the fast form is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.attention.reference import write_kv
from headrace.kernels.rms_norm.reference import rms_norm_reference
from headrace.kernels.rotary.reference import rotate_reference_
from headrace.step import Turn


def turn_reference(work: Turn, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """See the package. Any device and floating dtype."""
    turned = work.heads + work.kv_heads
    qk_RND, v_RKD = work.qkv_RND.split((turned, work.kv_heads), 1)
    if work.norm is not None:
        qk_RND.copy_(rms_norm_reference(qk_RND, *work.norm))
    cos_RD, sin_RD = (table[work.pos_R.long()].to(qk_RND.dtype) for table in (work.cos_PD, work.sin_PD))
    rotate_reference_(qk_RND, torch.cat((cos_RD, cos_RD), -1)[:, None], torch.cat((-sin_RD, sin_RD), -1)[:, None])
    write_kv(qk_RND[:, work.heads :], v_RKD, k_pool_KPSD, v_pool_KPSD, place_R)
