"""Every row reads the whole cache of its request."""

from __future__ import annotations

from torch import Tensor

from headrace.selection.base import SELECTORS, Selector


@SELECTORS.register(
    "all",
    label="exact",
    summary="Every row reads everything.",
)
class Everything(Selector):
    """Has no budget."""

    selects = False

    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        """All pages are worth the same."""
        return q_XHD.new_zeros(page_XP.shape)
