"""One LLM over the bundled model for all tests of the interface, on one thread: other tests may use the other cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace import LLM


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def llm(one_thread: None) -> LLM:
    return LLM(device="cpu", kv_cache_gib=0.25, max_num_batched_tokens=256)
