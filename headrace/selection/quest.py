"""Query-aware selection of pages (Quest, arXiv 2406.10774): a page is worth the largest score that a key within the
bounds of its keys could have, sum over d of max(q_d min_d, q_d max_d), where min and max are over the page's keys.

Here the heads of a layer choose together, by the largest bound of any of its heads; the paper chooses head by head and
leaves the first two layers whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.selection.base import SELECTORS, Selector


@SELECTORS.register(
    "quest",
    label="lossy",
    option='selector="quest", selector_budget=<slots>',
    summary="Rows behind the prompt read the older pages whose bounds promise the largest scores; in a form that is "
    "right and saves no time yet.",
    source="arXiv 2406.10774; one choice for all heads of a layer, in every layer",
    composes="everything; evictors and models with sliding-window layers are refused",
    example={"selector": "quest", "selector_budget": 8, "page_size": 4},
)
class Quest(Selector):
    """Bounds are taken from the pages at each step."""

    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        """The largest bound of any head, [X, P]."""
        rows, heads, size = q_XHD.shape
        kv_heads = k_KTSD.shape[0]
        q_XKGD = q_XHD.view(rows, kv_heads, heads // kv_heads, size)
        low_KTD, high_KTD = k_KTSD.amin(2), k_KTSD.amax(2)
        bound_XKGT = torch.einsum("xkgd,ktd->xkgt", q_XKGD.clamp(min=0), high_KTD)
        bound_XKGT += torch.einsum("xkgd,ktd->xkgt", q_XKGD.clamp(max=0), low_KTD)
        return bound_XKGT.amax((1, 2)).gather(1, page_XP)
