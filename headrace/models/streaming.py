"""Tensors of a checkpoint on their way from its files into the parameters of a model.

Files are mapped into memory. The CPU copies from there. A GPU would wait for the pages of a file and then take them at
the speed of ordinary memory; so several threads read, each into a buffer of pinned memory and on from there, while the
others read. Types and layouts change on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from headrace.layers.placement import Pieces

READERS = 8
"""Threads that read for a GPU."""
STAGING_BYTES = 2**24
"""Pinned memory of each."""


class Entry(NamedTuple):
    """One tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    name: str
    """Its name in the file."""


def stream_tensors(
    places: Mapping[str, list[Tensor]],
    entries: Mapping[str, Entry],
    narrower: Callable[[torch.dtype, torch.dtype], bool],
    advance: Callable[[int], None],
    readers: int | None = None,
) -> list[str]:
    """Copy every tensor into its views, file by file. `advance` is told the bytes of each that is there.

    Args:
        places: views by name, all on one device.
        entries: where each tensor lies.
        narrower: whether numbers of the second type may not fit into the first.
        advance: called from any thread.
        readers: threads; None: those that the device of the views wants, 0: this one, without a detour.

    Returns:
        The names of tensors with numbers that did not fit.
    """
    device = next(iter(places.values()))[0].device
    readers = (READERS if device.type == "cuda" else 0) if readers is None else readers
    if readers and device.type == "cuda":
        # Readers have queues of their own, and the memory of a parameter may have held what a kernel still reads.
        torch.cuda.synchronize(device)
    stagings: SimpleQueue[_Staging] = SimpleQueue()
    for _ in range(readers):
        stagings.put(_Staging(device))

    def load(opened: Any, name: str) -> bool:
        """Whether all numbers of a tensor fitted."""
        pairs = list(_pairs(opened, entries[name].name, places[name]))
        staging = stagings.get() if readers else None
        try:
            for view, source in pairs:
                if staging is None:
                    view.copy_(source)
                else:
                    staging.copy(view, source)
        finally:
            if staging is not None:
                stagings.put(staging)
        advance(sum(view.numel() * view.itemsize for view, _ in pairs))
        return all(not narrower(view.dtype, source.dtype) or bool(view.isfinite().all()) for view, source in pairs)

    with ExitStack() as stack:
        files = {entries[name].file for name in places}
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in files}
        # In the order of the files, so that disks read ahead.
        names = sorted(places, key=lambda name: entries[name].file)
        if not readers:
            return [name for name in names if not load(opened[entries[name].file], name)]
        pool = stack.enter_context(ThreadPoolExecutor(readers, "headrace-reader"))
        loads = [pool.submit(load, opened[entries[name].file], name) for name in names]
        try:
            return [name for name, fits in zip(names, loads, strict=True) if not fits.result()]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pairs(opened: Any, name: str, views: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of one tensor, each with what of the mapped file goes there, in the same shape."""
    if isinstance(views, Pieces):
        stored = opened.get_slice(name)
        yield from ((view, stored[where]) for view, where in zip(views, views.where, strict=True))
    else:
        source = opened.get_tensor(name)
        yield from ((view, source.reshape(view.shape)) for view in views)


class _Staging:
    """A buffer of the host, from which copies to a device do not pass through another one, and a queue of its own."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._device = device
        self._buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=is_cuda)
        self._queue = torch.cuda.Stream(device) if is_cuda else None

    def copy(self, view: Tensor, source: Tensor) -> None:
        """view <- source, in parts that the buffer holds. It is there when this returns."""
        with nullcontext() if self._queue is None else torch.cuda.stream(self._queue):
            self._copy(view, source)

    def _copy(self, view: Tensor, source: Tensor) -> None:
        nbytes = source.numel() * source.itemsize
        if nbytes <= STAGING_BYTES:
            self._copy_part(view, source, nbytes)
            return
        rows = max(1, STAGING_BYTES * source.shape[0] // nbytes)
        for first in range(0, source.shape[0], rows):
            last = first + rows
            if rows == 1:  # a single row may be larger than the buffer too
                self._copy(view[first], source[first])
            else:
                self._copy(view[first:last], source[first:last])

    def _copy_part(self, view: Tensor, source: Tensor, nbytes: int) -> None:
        staged = self._buffer[:nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        if view.dtype is source.dtype and view.is_contiguous():
            view.copy_(staged, non_blocking=True)
        else:  # otherwise the host would convert it
            view.copy_(staged.to(self._device, non_blocking=True))
        if self._queue is not None:
            self._queue.synchronize()
