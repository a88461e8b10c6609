"""One thread for the tests of a folder: tiny models gain nothing from more, and lose much on cores that are busy with
other tests. A folder takes it by `one_thread = cores.one_thread` in its conftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
