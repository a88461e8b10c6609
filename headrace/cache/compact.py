"""Moving the slots that a request keeps to the front of its pages.

Slots keep their order, so what a request computes afterwards has the same bits whether its pages were rewritten in
place or copied. All sources are read before anything is written.

Letters: L layers, K key/value heads, P pages of the pool, S slots in a page, D head size, n slots before, m after,
x = m - first slots that are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.ranks import ONE, Ranks


@dataclass
class Move:
    """What a compaction does in one group."""

    first: int
    """First slot that is written, the first of its page."""
    source_LKx: Tensor
    """Where the slots from `first` on come from, int64."""
    slots: int
    """Slots afterwards: m."""
    dropped: int
    """Slots less: n - m."""
    pages: int
    """Pages afterwards."""
    rewritten: range
    """Places of the pages that are written."""
    fresh: list[int] = field(default_factory=list)
    """Those of them that others see too and a fresh page replaced."""


def plan_move(keep_LKm: Tensor, n: int, page_size: int, ranks: Ranks = ONE) -> Move:
    """The move that keeps `keep_LKm` (ascending) of `n` slots. Waits for the device.

    Ranks keep other slots, each of its own heads, in the same pages: they settle on the first that any of them writes.
    """
    m = keep_LKm.shape[2]
    stays_m = (keep_LKm == torch.arange(m, device=keep_LKm.device)).flatten(0, 1).all(0)
    staying = ranks.least(int(stays_m.int().cumprod(0).sum()))
    pages = -(-m // page_size)
    first_page = pages if staying == m else staying // page_size
    first = min(first_page * page_size, m)
    return Move(first, keep_LKm[:, :, first:], m, n - m, pages, range(first_page, pages))


def _places(pages: Sequence[int], slot: Tensor, page_size: int) -> Tensor:
    page_P = torch.tensor(pages, dtype=torch.int64, device=slot.device)
    return page_P[slot // page_size] * page_size + slot % page_size


def gather(pool_LKPSD: Tensor, pages: Sequence[int], slot_LKx: Tensor) -> Tensor:
    """A copy [L, K, x, D] of slots of a plane, each cell its own; `pages` are those of the request.

    The axis D stands for any number of axes, none included.
    """
    layers, heads, _, page_size = pool_LKPSD.shape[:4]
    place_LKx = _places(pages, slot_LKx, page_size)
    layer_L11 = torch.arange(layers, device=slot_LKx.device)[:, None, None]
    head_K1 = torch.arange(heads, device=slot_LKx.device)[:, None]
    return pool_LKPSD.flatten(2, 3)[layer_L11, head_K1, place_LKx]


def scatter(pool_LKPSD: Tensor, pages: Sequence[int], first: int, kept_LKxD: Tensor) -> None:
    """Write slots [first, first + x) of all cells."""
    slot_x = torch.arange(first, first + kept_LKxD.shape[2], device=kept_LKxD.device)
    pool_LKPSD.flatten(2, 3)[:, :, _places(pages, slot_x, pool_LKPSD.shape[3])] = kept_LKxD
