"""The gate of a feed-forward layer in plain torch: the definition that every faster form is compared with.

out = silu(gate) * up, silu(x) = x / (1 + exp(-x)) (Shazeer, arXiv 2002.05202). In 16 bits silu is rounded before the
product, as two torch operations do it. Letters: R rows, F feed-forward width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul_reference(gate_up_R2F: Tensor) -> Tensor:
    """See `headrace.kernels.silu_mul.silu_mul`. Any device and floating dtype."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, -1)
    return F.silu(gate_RF).mul_(up_RF)
