"""Arrays of the host on their way to a device: all of a step in one buffer, so that one copy brings them.

A copy from ordinary memory waits for the device; this one starts from pinned memory and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Sheet:
    """A buffer on the device for arrays of fixed shapes and types."""

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        """Buffer and views for arrays of these shapes and types."""
        self._ends: list[int] = []
        end = 0
        for array in arrays:
            end += -(-array.nbytes // 8) * 8  # the widest elements have eight bytes
            self._ends.append(end)
        self._buffer = torch.empty(end, dtype=torch.uint8, device=device)
        self.views = [
            self._part(self._buffer, i, array).view(torch.from_numpy(array).dtype).view(array.shape)
            for i, array in enumerate(arrays)
        ]

    def _part(self, buffer: Tensor, i: int, array: np.ndarray) -> Tensor:
        begin = self._ends[i - 1] if i else 0
        return buffer[begin : begin + array.nbytes]

    def fill(self, arrays: Sequence[np.ndarray]) -> None:
        """Copy arrays of the same shapes. Does not wait: the device gets them in the order of its stream."""
        # The allocator of pinned memory gives a block to others only when its copies are done.
        staged = torch.empty(self._buffer.shape, dtype=torch.uint8, pin_memory=self._buffer.is_cuda)
        for i, array in enumerate(arrays):
            self._part(staged, i, array).numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._buffer.copy_(staged, non_blocking=True)


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on a device, by one copy that nobody waits for."""
    sheet = Sheet(arrays, device)
    sheet.fill(arrays)
    return sheet.views
