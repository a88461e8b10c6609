"""The host starts steps, and waits for nothing but their reports: else the device would idle between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import VOCAB, tiny_model

from headrace import SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


@contextmanager
def no_waiting() -> Iterator[None]:
    """A call that waits for the device raises; to wait for an event, as for a report, is no such call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("decoder", ["autoregressive", "ngram"])
def test_requests_come_and_go_without_waiting(decoder: str, events: Counter[str]) -> None:
    config = EngineConfig(
        num_pages=2000, page_size=4, max_num_seqs=16, max_num_batched_tokens=600, decoder=decoder, max_model_len=96
    )
    engine = Engine(config, tiny_model("float32", device="cuda"), eos_ids=[3])

    def wave(count: bool) -> None:
        for i in range(40):
            prompt = [(5 * i * (j + 2) + j) % VOCAB for j in range(3 + 5 * (i % 12))]
            params = SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=4 + 3 * (i % 7), ignore_eos=True)
            engine.add(prompt, params, request_id=str(i))
            engine.step()
            events["joined a running batch"] += count and len(engine.running) > 1
        while engine.has_work:
            engine.step()
        engine.cache.drop_idle()

    # Shapes are recorded at their first or second meeting, which may wait.
    for _ in range(3):
        wave(False)
    replays = engine.runner.graphs.replays if engine.runner.graphs else 0
    with no_waiting():
        wave(True)
    assert engine.runner.graphs is not None
    events["replayed"] += engine.runner.graphs.replays - replays
    engine.check_idle()
