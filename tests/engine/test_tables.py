"""Host copies of device tables, on the path where host and device do not share memory."""

from __future__ import annotations

import torch

from headrace.step import Mirror, flush


def test_only_touched_rows_are_uploaded() -> None:
    for axis in (0, 1):
        shape = (4, 3) if axis == 0 else (2, 4)
        mirror = Mirror(shape, torch.int32, torch.device("cpu"), 7, axis)
        mirror._shared = False
        mirror.host = mirror.host.copy()
        mirror.host[...] = 1
        mirror.touch(2)
        flush((mirror,))
        expected = torch.full(shape, 7, dtype=torch.int32)
        expected.select(axis, 2).fill_(1)
        assert torch.equal(mirror.device_table, expected)
        mirror.host[...] = 5
        flush((mirror,))
        assert torch.equal(mirror.device_table, expected)


def test_on_the_cpu_host_and_device_are_one() -> None:
    mirror = Mirror((3,), torch.float32, torch.device("cpu"), 0.5)
    mirror.host[1] = 2.0
    assert mirror.device_table.tolist() == [0.5, 2.0, 0.5]
