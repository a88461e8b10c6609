"""Attention of long prompts among their own rows, by torch's fused attention (cuDNN): the causal square of a chunk.

Row i of a chain sees the committed slots and the rows 0..i of its request. The second part is a square that has nothing
to do with pages: its keys and values are the step's own. cuDNN computes it at twice the rate of a kernel that looks up
pages; the committed slots are left to that kernel, and the two are joined by their log-sum-exp. A square takes whole
multiples of `GRAIN` rows, since cuDNN builds a plan for each size that it meets, which takes 40 ms; the rows behind it
are left to the kernel too. Letters: see `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TYPES = (torch.bfloat16, torch.float16)
"""Element types that cuDNN's attention knows."""
SIZES = (64, 128)
"""Head sizes."""
GRAIN = 512
"""Rows of a square are multiples of this."""
LEAST = 1024
"""Rows below which a square is not worth its launch."""


class Chain(NamedTuple):
    """A request of the step whose row i sees slot s if and only if s <= committed + i."""

    first: int
    """Its first row."""
    rows: int
    """Its number of rows."""
    committed: int
    """n, exactly."""


def find_squares(chains: Sequence[Chain]) -> list[Chain]:
    """The first rows of the long chains, as many as a square takes."""
    return [chain._replace(rows=chain.rows // GRAIN * GRAIN) for chain in chains if chain.rows >= max(LEAST, GRAIN)]


def attend_square(q_rHD: Tensor, k_rKD: Tensor, v_rKD: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    """out [r, H, D] in the type of q and lse [r, H] in float32 (only if asked for) of rows that see the rows up to
    themselves. Queries, keys and values may be views of one product: any strides with neighbouring elements."""
    q_1HrD, k_1KrD, v_1KrD = (x.transpose(0, 1)[None] for x in (q_rHD, k_rKD, v_rKD))
    if q_rHD.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_1HrD, k_1KrD, v_1KrD, None, need_lse, 0.0, True, False, scale=scale
        )
        return out[0].transpose(0, 1), lse.view(lse.shape[:3])[0].t() if need_lse else lse
    # For tests without a GPU.
    group = q_rHD.shape[1] // k_rKD.shape[1]
    k_HrD, v_HrD = (x[0].repeat_interleave(group, 0).float() for x in (k_1KrD, v_1KrD))
    score_Hrr = torch.einsum("hid,hjd->hij", q_1HrD[0].float(), k_HrD) * scale
    score_Hrr += torch.full_like(score_Hrr[0], float("-inf")).triu(1)
    lse_Hr = score_Hrr.logsumexp(2)
    return (score_Hrr.softmax(2) @ v_HrD).to(q_rHD.dtype).transpose(0, 1), lse_Hr.t()


def join(out_rHD: Tensor, lse_rH: Tensor, part_rHD: Tensor, part_lse_rH: Tensor) -> None:
    """Join two parts of the softmax: `out_rHD` becomes the whole, in place."""
    lse_rH1, part_lse_rH1 = lse_rH[..., None], part_lse_rH[..., None]
    share_rH1 = torch.sigmoid(part_lse_rH1 - lse_rH1)
    # lerp(a, b, w) = a + w (b - a), in float32.
    out_rHD.copy_(torch.lerp(out_rHD.float(), part_rHD.float(), share_rH1))
