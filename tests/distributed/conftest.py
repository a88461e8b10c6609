"""Two processes for all tests: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace.team import Lead


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def lead(_one_thread: None) -> Iterator[Lead]:
    """Rank 0 of two, for one engine after the other."""
    ranks = Lead(2, "cpu")
    yield ranks
    ranks.shutdown()
