"""Long prompts on a GPU: their own rows are computed beside the pages."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from headrace.kernels.attention import gpu, squares
from headrace.llm import LLM
from headrace.params import SamplingParams

pytestmark = pytest.mark.gpu


def test_a_step_of_the_engine_takes_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the prompt to the kernel: in bfloat16 on a GPU, prompts of a real model's head size."""
    taken = []
    original = gpu.attend_square

    def counted(q_rHD: Tensor, *rest: Any) -> Any:
        taken.append(len(q_rHD))
        return original(q_rHD, *rest)

    monkeypatch.setattr(gpu, "attend_square", counted)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompt = {"prompt_token_ids": [5 + i % 300 for i in range(300)]}
    texts = []
    monkeypatch.setattr(squares, "GRAIN", 4)
    for least in (4, 10**9):
        monkeypatch.setattr(squares, "LEAST", least)
        # Chunks of so few rows would be recorded, and squares are for those that are too wide for that.
        llm = LLM(device="cuda", dtype="bfloat16", max_num_batched_tokens=128, kv_cache_gib=0.5, cuda_graphs=False)
        texts.append(llm.generate([prompt], params)[0].outputs[0].token_ids)
    assert set(taken) == {128, 44}
    assert texts[0] == texts[1], "a near tie may differ: then choose another prompt"
