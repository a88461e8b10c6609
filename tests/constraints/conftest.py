"""One LLM over the bundled model with every decoder, and a checkpoint-less vocabulary (see walker)."""

from __future__ import annotations

import cores
import pytest

from headrace import LLM

pytest.importorskip("xgrammar")


one_thread = cores.one_thread


@pytest.fixture(scope="package")
def llm(one_thread: None) -> LLM:
    return LLM(device="cpu", kv_cache_gib=0.5, max_num_batched_tokens=256, decoder="autoregressive,ngram,draft_model")
