"""The same engine on a GPU, in float64 and in float32 with TF32 off: its tokens are those of the CPU."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from tiny import VOCAB, alone_of, run_all, tiny_model

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.kernels.draw import DrawParams, draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


def test_law_one_on_the_gpu(events: Counter[str]) -> None:
    """Random requests under famine: tokens equal those of the same request alone on the CPU."""
    events.update({"chunk": 0, "famine": 0, "hit": 0, "abort": 0, "swap": 0})
    model = tiny_model(device="cuda")
    for seed in range(3):
        rng = random.Random(seed)
        config = EngineConfig(
            num_pages=30,
            page_size=rng.choice([4, 16]),
            max_model_len=80,
            max_num_seqs=8,
            max_num_batched_tokens=rng.choice([5, 64]),
            preemption=["recompute", "swap"][seed % 2],
            check_invariants=True,
        )
        engine = Engine(config, model, eos_ids=[3])
        requests = []
        for i in range(12):
            prompt = [(7 * j + 5) % VOCAB for j in range(rng.choice([3, 20, 36]))] + [rng.randrange(VOCAB)]
            params = SamplingParams(
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                top_p=rng.choice([1.0, 0.9]),
                max_tokens=rng.randint(1, 40),
                repetition_penalty=rng.choice([1.0, 1.2]),
            )
            requests += engine.add(prompt, params, request_id=str(i))
        engine.step()
        engine.abort("11")
        events["abort"] += 1
        run_all(engine)
        engine.check_idle()
        events["chunk"] += engine.stats.chunks
        events["famine"] += engine.stats.preemptions
        events["swap"] += engine.stats.swaps
        events["hit"] += engine.cache.hit_tokens > 0
        assert [tuple(r.output_ids) for r in requests[:-1]] == [alone_of(r)[0] for r in requests[:-1]]


def test_draws_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator) * 3
    params = DrawParams(
        torch.rand(64, generator=generator).round(decimals=1),
        torch.randint(0, 60, (64,), generator=generator, dtype=torch.int32),
        torch.rand(64, generator=generator) * 0.5 + 0.5,
        torch.rand(64, generator=generator) * 0.1,
    )
    stream = torch.randint(-(2**31), 2**31, (64, 2), generator=generator, dtype=torch.int64).int()
    t_out = torch.arange(64, dtype=torch.int32)
    here = draw(logits, params, stream, t_out)
    there = draw(logits.cuda(), DrawParams(*(p.cuda() for p in params)), stream.cuda(), t_out.cuda())
    assert torch.equal(here.id_M, there.id_M.cpu())
    torch.testing.assert_close(here.logp_raw_M, there.logp_raw_M.cpu(), atol=1e-5, rtol=1e-5)


def test_the_bundled_model_says_the_same_on_both_devices() -> None:
    prompts = ["def add(a, b):\n", "import os\n\n\ndef walk(path):\n", "class Stack:\n"]
    params = SamplingParams(temperature=0.0, max_tokens=32)
    texts = []
    torch.backends.cuda.matmul.allow_tf32 = False
    for device in ("cpu", "cuda"):
        llm = LLM(device=device, dtype="float32", kv_cache_gib=0.2, max_num_batched_tokens=64)
        texts.append([o.outputs[0].text for o in llm.generate(prompts, params)])
        llm.engine.check_idle()
    assert texts[0] == texts[1]


def test_bfloat16_is_the_gpus_own_type() -> None:
    llm = LLM(device="auto", max_num_seqs=32, kv_cache_gib=1.0)  # other tests run beside this one
    assert llm.engine.device.type == "cuda"
    assert llm.engine.dtype == torch.bfloat16
    outputs = llm.generate(["def f(x):\n"] * 40, SamplingParams(temperature=0.8, max_tokens=16, seed=0))
    assert len({o.outputs[0].text for o in outputs}) == 1
    llm.engine.check_idle()
