"""Adapters are models to a client: `model` selects one, and it survives the engine's death."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import openai
import pytest
import torch
from live import serve
from lora_files import modules_of, write_adapter

from headrace import LLM, SamplingParams
from headrace.llm import BUNDLED_MODEL
from headrace.models.checkpoint import read_headers

PROMPT = "def fibonacci(n):\n"


def test_an_adapter_by_its_name(tmp_path: Path) -> None:
    entries = read_headers(BUNDLED_MODEL)
    shapes = modules_of({name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()})
    write_adapter(tmp_path / "one", shapes, rank=3, seed=1, size=0.3)
    params = SamplingParams(max_tokens=16, seed=1, adapter="one")
    llm = LLM(device="cpu", kv_cache_gib=0.1, max_num_batched_tokens=256, adapters={"one": str(tmp_path / "one")})
    expected = llm.generate(PROMPT, params)[0].outputs[0].text
    assert expected != llm.generate(PROMPT, SamplingParams(max_tokens=16, seed=1))[0].outputs[0].text
    with serve("--adapters", f"one={tmp_path / 'one'}") as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)
        assert [model.id for model in client.models.list()] == ["headrace-py-16m", "one"]
        made = client.completions.create(model="one", prompt=PROMPT, max_tokens=16, seed=1)
        assert made.choices[0].text == expected
        assert made.model == "one"
        with pytest.raises(openai.NotFoundError, match="one"):
            client.completions.create(model="two", prompt=PROMPT)
        child = int(Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()[0])
        os.kill(child, signal.SIGKILL)
        time.sleep(0.3)
        made = client.completions.create(model="one", prompt=PROMPT, max_tokens=16, seed=1)
        assert made.choices[0].text == expected
