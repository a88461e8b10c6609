"""Rotation of heads in plain torch: the definition that every faster form is compared with.

x <- x * cos + (second half, first half) * sin, with sin negative in its first half: pair i = (x[i], x[i + D/2]) turns
(Su et al., arXiv 2104.09864). In 16 bits the first product is rounded before the sum.
Letters: R rows, N heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_reference_(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> None:
    """See `headrace.kernels.rotary.rotate_`. Any device and floating dtype."""
    first, second = x_RND.chunk(2, -1)
    swapped_RND = torch.cat((second, first), -1)
    x_RND.mul_(cos_R1D).addcmul_(swapped_RND, sin_R1D)
