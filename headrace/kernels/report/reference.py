"""`report` in plain torch: the definition that the compiled form is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headrace.kernels.advance import Advanced

HEAD = 4
"""Lines in front of the tokens."""


class Priced(NamedTuple):
    """Tokens and their log-probs."""

    emit_BE: Tensor
    """int32 [B, E]"""
    priced_by_BE: Tensor
    """The draw of each token, int32 [B, E]."""
    logp_M: Tensor
    """Log-prob of each draw, float32 [M]."""


def report_reference(advanced: Advanced, drafted_B: Tensor | None, priced: Priced) -> Tensor:
    """See the package."""
    drafted_B = torch.zeros_like(advanced.n_kv_B) if drafted_B is None else drafted_B
    logp_BE = priced.logp_M[priced.priced_by_BE.long()].float()
    lines = (torch.stack((*advanced, drafted_B)), priced.emit_BE.t(), logp_BE.t().contiguous().view(torch.int32))
    return torch.cat(lines)
