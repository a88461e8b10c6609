"""Root mean square normalisation in plain torch: the definition that every faster form is compared with.

y = w * round(x / sqrt(mean(x^2) + eps)), the mean over the last axis and the bracket in float32 (float64 for
float64), rounded to the type of x before it meets the weight (Zhang and Sennrich, arXiv 1910.07467; the order of
rounding is that of LlamaRMSNorm in transformers). Letters: R rows, E width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x_RE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See `headrace.kernels.rms_norm.rms_norm`. Any device and floating dtype."""
    return F.rms_norm(x_RE, x_RE.shape[-1:], None, eps) * weight_E
