"""Sizes of launches on a GPU."""

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
