"""What launches on a GPU depend on: sizes, and what the chip can do."""

from __future__ import annotations

import functools

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


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch may begin before the one before it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
