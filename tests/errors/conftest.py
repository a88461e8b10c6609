"""One tiny model for all tests of bad input, on one thread: other tests may use the other cores."""

from __future__ import annotations

from collections.abc import Iterator

import cores
import pytest

from tools.bad_input import Bench

one_thread = cores.one_thread


@pytest.fixture(scope="package")
def bench(one_thread: None) -> Iterator[Bench]:
    with Bench() as made:
        yield made
