"""What the forms ask of pools: the elements of a slot are neighbours, slots follow one another at one distance."""

from __future__ import annotations

from torch import Tensor


def pool_strides(pool_KPSD: Tensor) -> tuple[int, int]:
    """Elements from one head to the next, and from one slot to the next; physical slots of all pages count on.

    A pool of values may be the first part of each slot of the keys' (latent attention); one head may be repeated.

    Raises:
        ValueError: other strides.
    """
    _, pages, slots, size = pool_KPSD.shape
    head, page, slot, element = pool_KPSD.stride()
    if pool_KPSD[0].is_contiguous():
        return head, size
    if slots == 1:
        slot = page
    if element != 1 or slot < size or (pages > 1 and page != slots * slot):
        raise ValueError(
            f"pool strides are {pool_KPSD.stride()} for {tuple(pool_KPSD.shape)}: the elements of a slot must be "
            "neighbours, and slots at one distance"
        )
    return head, slot
