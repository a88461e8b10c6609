"""Root mean square normalisation in plain torch: the definition that every faster form is compared with.

y = x / sqrt(mean(x^2) + eps) * w, the mean over the last axis, all in float32 (float64 for float64) and rounded to the
type of x once, at the end (Zhang and Sennrich, arXiv 1910.07467; rounding as `torch.nn.functional.rms_norm`, where
LlamaRMSNorm of transformers rounds before the weight too). Letters: R rows, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x_RE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """See `headrace.kernels.rms_norm.rms_norm`. Any device and floating dtype."""
    if weight_E.dim() == 1 and weight_E.dtype is x_RE.dtype:
        return F.rms_norm(x_RE, weight_E.shape, weight_E, eps)
    kind = torch.float64 if x_RE.dtype == torch.float64 else torch.float32
    return F.rms_norm(x_RE.to(kind), x_RE.shape[-1:], None, eps).mul_(weight_E).to(x_RE.dtype)
