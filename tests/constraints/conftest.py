"""One LLM over the bundled model with every decoder, and a checkpoint-less vocabulary (see walker)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headrace import LLM

pytest.importorskip("xgrammar")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def llm(one_thread: None) -> LLM:
    return LLM(device="cpu", kv_cache_gib=0.5, max_num_batched_tokens=256, decoder="autoregressive,ngram,draft_model")
