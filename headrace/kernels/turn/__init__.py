"""The operation `turn`: what happens to queries and keys between their product and attention, and the cache's write.

Query and key heads are normalised (if the layer has a norm for them) and rotated in place, and keys and values are
stored at the rows' physical slots. Letters: R rows, H query heads, K key/value heads, D head size, P pages, S slots
in a page.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.turn.reference import turn_reference
from headrace.step import Turn

__all__ = ["turn"]


def turn(work: Turn, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Turn the heads of `work.qkv_RND` in place and store keys and values. A GPU runs one kernel. Nobody waits.

    Args:
        work: the product and what is done to it.
        k_pool_KPSD, v_pool_KPSD: the layer's pools, of the type of the product; may be a part of a larger tensor along
            their first dimension.
        place_R: physical slots, int64 [R]; rows that must leave no trace go to page 0.
    """
    if work.qkv_RND.is_cuda:
        from headrace.kernels.turn.gpu import turn_gpu  # Triton is loaded where it is used

        turn_gpu(work, k_pool_KPSD, v_pool_KPSD, place_R)
    else:
        turn_reference(work, k_pool_KPSD, v_pool_KPSD, place_R)
