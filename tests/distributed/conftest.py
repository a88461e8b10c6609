"""Two processes for all tests: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import cores
import pytest

from headrace.team import Lead

one_thread = cores.one_thread


@pytest.fixture(scope="package")
def lead(one_thread: None) -> Iterator[Lead]:
    """Rank 0 of two, for one engine after the other."""
    ranks = Lead(2, "cpu")
    yield ranks
    ranks.shutdown()
