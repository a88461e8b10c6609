"""Two GPUs: all-reduces over NCCL, inside the recorded steps. Where torch finds fewer, nothing of it can run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pair import PROMPTS
from tiny_models import reference

from headrace import LLM, SamplingParams

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs")

EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "intermediate_size": 256}
PARAMS = SamplingParams(temperature=0.0, max_tokens=32, logprobs=8, ignore_eos=True)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_tokens_are_those_of_one_gpu(graphs: bool, tmp_path: Path) -> None:
    """In float32; where a token differs, both were about as likely."""
    reference("llama", tmp_path, **EVEN)
    runs: list[Any] = []
    for size in (1, 2):
        llm = LLM(
            str(tmp_path),
            device="cuda",
            dtype="float32",
            skip_tokenizer_init=True,
            tensor_parallel_size=size,
            cuda_graphs=graphs,
            num_pages=256,
        )
        runs.append([output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)])
        if graphs:
            assert llm.engine.runner.graphs is not None
            assert llm.engine.runner.graphs.replays > 0
        llm.shutdown()
    for mine, theirs in zip(*runs, strict=True):
        pairs = zip(mine.token_ids, theirs.token_ids, strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            top = mine.logprobs[first]
            assert top[mine.token_ids[first]].logprob - top[theirs.token_ids[first]].logprob < 1e-3
