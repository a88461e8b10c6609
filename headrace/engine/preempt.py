"""Preemption: what becomes of a victim's cache. It is evaluated again, or copied to host memory and back.

Both give the same tokens; which one is taken depends on measured seconds alone. Where nothing was evicted, a victim is
evaluated again: that is one prefill, of which the prefix cache may bring a part. Where an evictor has dropped slots the
prefill stops at every trigger of the past, while the copy is as small as the evictor made it; and a fixed state is
small, however long the sequence was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from headrace.cache.swap import Spilled, SwapSpace
from headrace.config import EngineConfig
from headrace.engine.upkeep import Upkeep
from headrace.memory import GIB
from headrace.request import Request

SWAP_SPACE_GIB = {"cpu": 0.5, "cuda": 4.0}
MANY_ROWS = 64
"""Steps of at least so many rows tell what a row of a prefill costs; in smaller ones weights are most of the cost."""
NEWEST_SHARE = 0.2
"""Weight of the newest measurement in a running mean."""


@dataclass
class SwapStats:
    """Counters since the start."""

    swaps: int = 0
    """Victims whose cache was copied to host memory."""
    swap_full: int = 0
    """Victims that are evaluated again because host memory was full."""
    swapped_bytes: int = 0
    """Bytes copied, out and back."""
    swap_s: float = 0.0
    """Seconds that it took."""


class Costs:
    """Measured seconds of rows and of copied bytes, as running means."""

    def __init__(self, row_s: float | None = None, byte_s: float = 0.0) -> None:
        """`row_s`: seconds a row of a large step, if known. `byte_s`: seconds a byte copied in one direction; 0: not
        known yet, and then a copy is tried."""
        self.row_s = row_s or 0.0
        self.byte_s = byte_s
        self._steps = self._large = int(row_s is not None)

    def saw_step(self, rows: int, seconds: float) -> None:
        """A step was run. Small steps count until the first large one."""
        large = rows >= MANY_ROWS
        if self._large and not large:
            return
        known = self._large if large else self._steps
        self.row_s = _mean(self.row_s, seconds / rows, known)
        self._steps += 1
        self._large += large

    def saw_copy(self, nbytes: int, seconds: float) -> None:
        """Bytes were copied in one direction."""
        if nbytes:
            self.byte_s = _mean(self.byte_s, seconds / nbytes, int(self.byte_s > 0))

    def swap_is_cheaper(self, rows: int, nbytes: int) -> bool:
        """Whether bytes are copied out and back in less time than rows are evaluated."""
        return 2 * nbytes * self.byte_s < rows * self.row_s


def _mean(before: float, new: float, known: int) -> float:
    return before + NEWEST_SHARE * (new - before) if known else new


class Preemption:
    """Chooses for each victim, and keeps time.

    Args:
        row_s: seconds a row of a large step, if that was measured.
        stats: counts what is done.
    """

    def __init__(
        self, config: EngineConfig, space: SwapSpace, upkeep: Upkeep, row_s: float | None, stats: SwapStats
    ) -> None:
        self.mode, self.space, self.upkeep, self.stats = config.preemption, space, upkeep, stats
        self.costs = Costs(row_s, space.time_copy() if space.limit_bytes else 0.0)

    def wants_swap(self, request: Request) -> bool:
        """Whether the victim's cache should be copied out, as far as time is concerned."""
        if self.mode == "recompute" or not self.space.limit_bytes or not request.n_done:
            return False
        if self.upkeep.waits(request):
            return False  # it would come back to a compaction that lacks pages; evaluated again, it shares anew
        if self.mode == "swap":
            return True
        if not any(request.dropped) and not self.space.states.groups:
            return False
        return self.costs.swap_is_cheaper(request.n_done, self.space.bytes_of(request))

    def leave(self, request: Request) -> bool:
        """A victim is about to be released: copy its cache out if that is the better way. Returns whether it was."""
        if not self.wants_swap(request):
            return False
        if self.space.held_bytes + self.space.bytes_of(request) > self.space.limit_bytes:
            self.stats.swap_full += 1
            return False
        began = time.perf_counter()
        self._count(self.space.spill(request).nbytes, began)
        self.stats.swaps += 1
        return True

    def come_back(self, request: Request, index: int) -> Spilled:
        """Restore a request at a request index."""
        began = time.perf_counter()
        spilled = self.space.restore(request, index)
        shared = [len(pages) for pages in spilled.claimed]
        self._count(spilled.nbytes - self.space.cache.bytes_of_pages(shared), began)
        return spilled

    def _count(self, nbytes: int, began: float) -> None:
        seconds = time.perf_counter() - began
        self.costs.saw_copy(nbytes, seconds)
        self.stats.swapped_bytes += nbytes
        self.stats.swap_s += seconds


def swap_space_bytes(config: EngineConfig, device: str) -> int:
    """Host memory for the caches of preempted requests on this kind of device."""
    if config.preemption == "recompute":
        return 0
    gib = SWAP_SPACE_GIB[device] if config.swap_space_gib is None else config.swap_space_gib
    return int(gib * GIB)
