"""Steps that are recorded once and replayed: CUDA graphs keyed by bucketed rows and requests.

A step is padded with ghosts up to the next bucket, so that few shapes cover all steps; what changes from step to step
is data in buffers at fixed addresses. The first step of a shape runs as it is, which also loads and tunes its kernels,
and is then recorded; the following ones are replayed. Of wide steps there are many shapes, and each takes memory: they
are recorded when they come again, share one block of memory, and those unused for longest are given up. The CPU records
nothing, but replays as strictly: it calls the first step again, with whatever of the host that step has kept, so that
tests find what a recording would freeze.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from headrace.staging import Sheet

T = TypeVar("T")

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows and requests of recorded steps; of wide ones the requests."""
WIDEST = 8192
"""Rows of the widest recorded forward: above, the device has more to do than the host, however small the model."""
WIDEST_WHOLE = 2048
"""Rows of the widest step that is recorded whole. Wider ones come in too many shapes, and in pieces lose little."""
PER_OCTAVE = 8
"""Sizes of wide steps between a number of rows and its double."""
MEETINGS = 2
"""The step of a wide shape that is recorded, if that is worth it: one that comes once is not."""
MOST = 40
"""Recordings of wide steps that are kept; the one unused for longest goes first."""
RECORDING_BYTES = 8 * 2**20
"""What such a recording takes beside its tensors: about 200 KiB for each graph of a layer's kernels."""


def sizes(most: int) -> list[int]:
    """Numbers of rows that steps of at most `most` rows are padded to: narrow ones to `BUCKETS`, wide ones to the next
    eighth of an octave. `most` itself is one of them, since full steps are the most frequent ones."""
    found = list(BUCKETS)
    while found[-1] < most:
        found.append(found[-1] + 2 ** (found[-1].bit_length() - 1) // PER_OCTAVE)
    return [*(size for size in found if size < most), most]


def bucket(n: int) -> int | None:
    """The smallest bucket that holds n, or None."""
    return next((size for size in BUCKETS if size >= n), None)


def ghost_grants(grants: Sequence[int], wide: Sequence[int] = ()) -> list[int] | None:
    """Rows of the ghosts that pad a step up to buckets of rows and requests; None: the step is too wide.

    Each ghost has a row at least, and all have about equally many. `wide`: numbers of rows above the buckets. A step of
    so many has one request more than a bucket, so that there is always a ghost for the rows that are left.
    """
    n_rows, n_reqs = sum(grants), len(grants)
    for size in BUCKETS:
        ghosts = size - n_reqs
        rows = bucket(n_rows + max(ghosts, 0))
        if ghosts < 0 or rows is None or (ghosts == 0 and rows > n_rows):
            continue
        share, rest = divmod(rows - n_rows, max(ghosts, 1))
        return [share + (i < rest) for i in range(ghosts)]
    requests = bucket(n_reqs)
    if requests is None:
        return None
    ghosts = requests + 1 - n_reqs
    rows = next((size for size in wide if size >= n_rows + ghosts), None)
    if rows is None:
        return None
    share, rest = divmod(rows - n_rows, ghosts)
    return [share + (i < rest) for i in range(ghosts)]


class Pool:
    """Memory on a GPU that recordings share. None of them holds any between its runs, nor do two run at once.

    `arena_bytes` are taken as one block at the first recording, from which the allocator cuts; blocks of one size for
    each recording would add up. What it does not hold is taken when it is needed.
    """

    def __init__(self, device: torch.device, arena_bytes: int) -> None:
        self.device, self.arena_bytes = device, arena_bytes
        self.handle: Any = torch.cuda.graph_pool_handle()
        # The allocator keeps what is freed for the stream that had it.
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Graphs are recorded within."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        # What the collector frees while a graph is recorded could break it, and to collect before takes long.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            if collects:
                gc.enable()
        current.wait_stream(self.stream)

    def begin(self) -> torch.cuda.CUDAGraph:
        """Begin a graph, which the caller ends."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
        if self.arena_bytes:
            torch.empty(self.arena_bytes, dtype=torch.uint8, device=self.device)
            self.arena_bytes = 0
        return graph


class Recent(Generic[T]):
    """The recordings of wide steps that are worth it, by key: at most `MOST`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._met: dict[Hashable, int] = {}
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self.meetings = MEETINGS

    @property
    def keys(self) -> list[Hashable]:
        """Of what is kept."""
        return list(self._kept)

    def get(self, key: Hashable) -> T | None:
        """What was recorded, if it is still there."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def is_due(self, key: Hashable) -> bool:
        """Count a meeting; whether it is time to record."""
        self._met[key] = self._met.get(key, 0) + 1
        return self._met[key] >= self.meetings

    def put(self, key: Hashable, recording: T) -> None:
        """Keep one, and give up another."""
        while len(self._kept) >= MOST:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # it may still run
            old, _ = self._kept.popitem(last=False)
            del self._met[old]
        self._kept[key] = recording


class StepGraphs:
    """Recorded steps by key.

    Args:
        most_rows: bounds the rows of a step; above the buckets steps are recorded if there is a pool or no GPU.
        pool: the memory of wide steps.
    """

    def __init__(self, device: torch.device, most_rows: int = 0, pool: Pool | None = None) -> None:
        self._device = device
        self._sheets: dict[Hashable, Sheet] = {}
        self._recorded: dict[Hashable, Callable[[], Tensor]] = {}
        self._handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._pool = pool
        widest = min(most_rows, WIDEST_WHOLE) if pool or device.type == "cpu" else 0
        self.wide = [size for size in sizes(widest) if size > BUCKETS[-1]] if widest else []
        """Rows of wide steps."""
        self.recent: Recent[Callable[[], Tensor]] = Recent(device)
        self.replays = 0
        self.wide_replays = 0

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

    def wants(self, key: Hashable, is_wide: bool) -> bool:
        """Count a meeting; whether a step of this key is to be run here: it is replayed, or recorded afterwards."""
        return not is_wide or self.recent.get(key) is not None or self.recent.is_due(key)

    def run(self, key: Hashable, step: Callable[[], Tensor], is_wide: bool = False) -> Tensor:
        """What `step` returns: by a replay if the key was met before. Read it before the next run of the key."""
        recorded = self.recent.get(key) if is_wide else self._recorded.get(key)
        if recorded is not None:
            self.replays += 1
            self.wide_replays += is_wide
            return recorded()
        packed = step()
        if not is_wide:
            self._recorded[key] = step if self._device.type == "cpu" else self._record(step)
        else:
            self.recent.put(key, step if self._pool is None else self._record_shared(step, self._pool))
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
                graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
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

    def _record_shared(self, step: Callable[[], Tensor], pool: Pool) -> Callable[[], Tensor]:
        with pool.recording():
            graph = pool.begin()
            try:
                packed = step()
            finally:
                graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return packed

        return replay
