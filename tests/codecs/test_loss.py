"""What lossy codecs cost, measured on the bundled model: the test prints it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import headrace.registry
from headrace.llm import LLM
from headrace.params import SamplingParams
from headrace.parts import CODECS

TOKENS = 400


def logits_of(codec: str) -> tuple[Tensor, int]:
    """Logits [T, V] of a source text, and the bytes of pages that its request held at most."""
    llm = LLM(codec=codec, num_pages=100, max_num_seqs=1, max_num_batched_tokens=64, page_size=16)
    seen: list[Tensor] = []
    model: Any = llm.engine.model
    logits = model.logits
    model.logits = lambda hidden_RE: (seen.append(logits(hidden_RE)), seen[-1])[1]
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.encode(inspect.getsource(headrace.registry))[:TOKENS]
    (out,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    assert out.metrics is not None
    scored = torch.cat([x for x in seen if len(x) > 1])
    assert scored.shape[0] >= TOKENS - 1 - TOKENS // 64
    return scored.double().log_softmax(1), out.metrics.peak_cache_bytes


@pytest.mark.parametrize("codec", [part.name for part in CODECS if part.label == "lossy"])
def test_measured_loss(codec: str, capsys: pytest.CaptureFixture[str]) -> None:
    (full_TV, full_bytes), (coded_TV, coded_bytes) = logits_of("model"), logits_of(codec)
    kl = float((full_TV.exp() * (full_TV - coded_TV)).sum(1).mean())
    agree = float((full_TV.argmax(1) == coded_TV.argmax(1)).double().mean())
    with capsys.disabled():
        print(
            f"\n{codec}: KL {kl:.2e} nats a token, top-1 agreement {agree:.1%}, "
            f"{coded_bytes / full_bytes:.1%} of the bytes of float32 pages"
        )
    assert 0 < kl < 1e-2
    assert agree > 0.95
    assert coded_bytes < full_bytes
