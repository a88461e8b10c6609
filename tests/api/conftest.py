"""One LLM over the bundled model for all tests of the interface."""

from __future__ import annotations

import pytest

from headrace import LLM


@pytest.fixture(scope="session")
def llm() -> LLM:
    return LLM(device="cpu", kv_cache_gib=0.25, max_num_batched_tokens=256)
