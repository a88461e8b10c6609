"""One tiny model for all tests of bad input, on one thread: other tests may use the other cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tools.bad_input import Bench


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def bench(one_thread: None) -> Iterator[Bench]:
    with Bench() as made:
        yield made
