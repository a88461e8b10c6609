"""What launches on a GPU depend on: sizes, and what the chip can do."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def next_power(n: int) -> int:
    """The smallest power of two that is not below n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; Triton's interpreter on the CPU counts as two."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take: a multiprocessor's, less the kilobyte that the system keeps.

    The interpreter on the CPU gets that of an H100, so that it runs the same shapes.
    """
    if device.type != "cuda":
        return 227 * 2**10
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 2**10


def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended (programmatic dependent launch)."""
    return not _apart and _can_overlap(device)


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_apart = False


@contextmanager
def apart() -> Iterator[None]:
    """Within, launches wait for the one before them: to measure what overlapping brings."""
    global _apart
    _apart, before = True, _apart
    try:
        yield
    finally:
        _apart = before
