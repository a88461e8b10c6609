"""Adapters through `LLM`, `AsyncLLM` and the command line, with the bundled model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest
import torch
from lora_files import modules_of, write_adapter

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.cli import main
from headrace.errors import AdapterError, CheckpointError, EngineDeadError, RequestError
from headrace.llm import BUNDLED_MODEL
from headrace.models.checkpoint import read_headers

PROMPTS = ["def fibonacci(n):\n", "import os\n\n\ndef walk(path):\n    "]
GREEDY = {"temperature": 0.0, "max_tokens": 10, "ignore_eos": True}
SMALL = {"kv_cache_gib": 0.1, "max_num_batched_tokens": 128, "device": "cpu"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two adapters of the bundled model."""
    entries = read_headers(BUNDLED_MODEL)
    shapes = modules_of({name: torch.empty(entry.shape, device="meta") for name, entry in entries.items()})
    made = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        write_adapter(made / name, shapes, rank=3 + seed, seed=seed, size=0.3)
    return {name: str(made / name) for name in ("one", "two")}


@pytest.fixture(scope="module")
def llm(adapters: dict[str, str]) -> LLM:
    return LLM(adapters={"one": adapters["one"]}, max_adapters=2, max_adapter_rank=4, **SMALL)


def texts(llm: LLM, *names: str | None) -> list[str]:
    params = [SamplingParams(**GREEDY, adapter=name) for name in names]
    return [o.outputs[0].text for o in llm.generate([PROMPTS[0]] * len(names), params)]


def test_a_batch_of_several_adapters(llm: LLM, adapters: dict[str, str]) -> None:
    assert [*llm.adapters] == ["one"]
    llm.load_adapter("two", adapters["two"])
    plain, one, two = texts(llm, None, "one", "two")
    assert len({plain, one, two}) == 3
    assert [texts(llm, name) for name in (None, "one", "two")] == [[plain], [one], [two]]
    assert texts(LLM(**SMALL), None) == [plain]
    llm.unload_adapter("two")
    with pytest.raises(RequestError, match="adapter='two' is not loaded; there are: one"):
        llm.generate(PROMPTS, SamplingParams(**GREEDY, adapter="two"))
    with pytest.raises(AdapterError, match="'one' is loaded already"):
        llm.load_adapter("one", adapters["two"])
    llm.engine.check_idle()


def test_scores_under_an_adapter(llm: LLM) -> None:
    plain, one = llm.score(PROMPTS[0]), llm.score(PROMPTS[0], adapter="one")
    assert plain[0].total != one[0].total
    assert llm.score(PROMPTS[0], adapter="one")[0].total == pytest.approx(one[0].total, abs=1e-3)


def test_adapters_of_a_running_engine(llm: LLM, adapters: dict[str, str], tmp_path: Path) -> None:
    expected = texts(llm, "one")[0]
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, adapter="one")

    async def run() -> None:
        async with AsyncLLM(front=llm.front) as served:
            with pytest.raises(RequestError, match="an AsyncLLM drives this model's engine"):
                llm.load_adapter("two", adapters["two"])
            async with contextlib.aclosing(served.generate(PROMPTS[0], long)) as stream:
                await anext(stream)
                await served.load_adapter("two", adapters["two"])
                assert [*served.adapters] == ["one", "two"]
                with pytest.raises(AdapterError, match=r"'one' is used by unfinished requests \(async-0\)"):
                    await served.unload_adapter("one")
                with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
                    await served.load_adapter("three", tmp_path)
                params = SamplingParams(**GREEDY, adapter="two")
                beside = [output async for output in served.generate(PROMPTS[0], params)][-1]
            with pytest.raises(RequestError, match="adapter='three' is not loaded"):
                await anext(served.generate(PROMPTS[0], SamplingParams(**GREEDY, adapter="three")))
            again = [output async for output in served.generate(PROMPTS[0], SamplingParams(**GREEDY, adapter="one"))]
            assert again[-1].outputs[0].text == expected
            assert beside.outputs[0].text != expected
            await served.unload_adapter("two")
        with pytest.raises(EngineDeadError):
            await served.unload_adapter("one")

    asyncio.run(asyncio.wait_for(run(), 60.0))
    assert [*llm.adapters] == ["one"]
    llm.engine.check_idle()


def test_the_command_line(adapters: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "params": {"adapter": "two"}}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = ",".join(f"{name}={path}" for name, path in adapters.items())
    engine = ["--adapters", named, "--kv-cache-gib", "0.1", "--max-num-batched-tokens", "64", "--device", "cpu"]
    given = ["--temperature", "0", "--max-tokens", "10", "--ignore-eos"]
    assert main(["generate", str(source), "-o", str(target), "--adapter", "one", *given, *engine]) == 0
    found = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    llm = LLM(adapters=named, **SMALL)
    assert found == texts(llm, "one", "two")
    assert main(["generate", "-p", "x", "--adapter", "three", *engine]) == 2
    assert "adapter='three' is not loaded; there are: one, two" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "--adapters", "one=nowhere/at/all"]) == 2
    assert "nowhere/at/all" in capsys.readouterr().err
