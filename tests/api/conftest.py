"""One LLM over the bundled model for all tests of the interface, on one thread: other tests may use the other cores."""

from __future__ import annotations

import cores
import pytest

from headrace import LLM

one_thread = cores.one_thread


@pytest.fixture(scope="package")
def llm(one_thread: None) -> LLM:
    return LLM(device="cpu", kv_cache_gib=0.25, max_num_batched_tokens=256)
