"""Steps that are recorded once and replayed: CUDA graphs keyed by bucketed rows and requests.

A step is padded with ghosts up to the next bucket, so that few shapes cover all steps; what changes from step to step
is data in buffers at fixed addresses. The first step of a shape runs as it is, which also loads and tunes its kernels,
and is then recorded; the following ones are replayed. The CPU records nothing, but replays as strictly: it calls the
first step again, with whatever of the host that step has kept, so that tests find what a recording would freeze.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.staging import Sheet

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows and requests of recorded steps; wider ones are not recorded."""


def bucket(n: int) -> int | None:
    """The smallest bucket that holds n, or None."""
    return next((size for size in BUCKETS if size >= n), None)


def ghost_grants(grants: Sequence[int]) -> list[int] | None:
    """Rows of the ghosts that pad a step up to buckets of rows and requests; None: the step is too wide.

    Each ghost has a row at least, and all have about equally many.
    """
    n_rows, n_reqs = sum(grants), len(grants)
    for size in BUCKETS:
        ghosts = size - n_reqs
        rows = bucket(n_rows + max(ghosts, 0))
        if ghosts < 0 or rows is None or (ghosts == 0 and rows > n_rows):
            continue
        share, rest = divmod(rows - n_rows, max(ghosts, 1))
        return [share + (i < rest) for i in range(ghosts)]
    return None


class StepGraphs:
    """Recorded steps by key."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sheets: dict[Hashable, Sheet] = {}
        self._recorded: dict[Hashable, Callable[[], Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.replays = 0

    @property
    def keys(self) -> list[Hashable]:
        """Of the steps met so far."""
        return list(self._sheets)

    def sheet(self, key: Hashable, arrays: Sequence[np.ndarray]) -> Sheet:
        """The filled sheet of a key, always at the same address."""
        if key not in self._sheets:
            self._sheets[key] = Sheet(arrays, self._device)
        self._sheets[key].fill(arrays)
        return self._sheets[key]

    def run(self, key: Hashable, step: Callable[[], Tensor]) -> Tensor:
        """What `step` returns: by a replay if the key was met before. Read it before the next run of the key."""
        if key in self._recorded:
            self.replays += 1
            return self._recorded[key]()
        packed = step()
        self._recorded[key] = step if self._device.type == "cpu" else self._record(step)
        return packed

    def _record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        # What the collector frees while a graph is recorded could break it, and to collect before takes long.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    packed = step()
                finally:
                    graph.capture_end()
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(self._device).wait_stream(stream)

        def replay() -> Tensor:
            graph.replay()
            return packed

        return replay
