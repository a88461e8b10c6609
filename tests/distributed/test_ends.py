"""How ranks end: at a rank that dies, fails or goes another way, at Ctrl-C, and with rank 0. Nobody is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pair import PROMPTS, TINY, both
from safetensors.torch import load_file, save_file
from tiny import make_engine, run_all
from tiny_models import reference
from toy import toy

from headrace import LLM, AsyncLLM, SamplingParams, team
from headrace.config import EngineConfig
from headrace.errors import CheckpointError, ConfigError, EngineDeadError, InvariantError
from headrace.ranks import Ranks
from headrace.start import Settings, gather
from headrace.team import Lead

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
SOON_S = 8.0
PARAMS = SamplingParams(temperature=0.8, max_tokens=60, ignore_eos=True)
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    reference("llama", directory, **EVEN)
    return directory


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(ended: Callable[[], bool]) -> bool:
    until = time.monotonic() + SOON_S
    while time.monotonic() < until:
        if ended():
            return True
        time.sleep(0.05)
    return False


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()]


def test_a_rank_that_is_killed_ends_the_engine(model: Path) -> None:
    llm = LLM(str(model), **(TINY | {"tensor_parallel_size": 2}))
    assert isinstance(llm._ranks, Lead)
    (process,) = llm._ranks._crew.processes
    pid = process.pid
    assert pid in children(os.getpid())
    assert torch.get_num_threads() == max(1, llm._ranks._crew.threads // 2)
    expected = [o.outputs[0].token_ids for o in llm.generate([PROMPTS[0]], PARAMS)]
    assert len(expected[0]) == 60
    killed = 0.0

    def kill(*_: object) -> None:
        nonlocal killed
        if not killed and llm.engine.stats.output_tokens > 70:
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()

    honest = llm.engine.on_token
    llm.engine.on_token = lambda request, tokens: kill() or (honest(request, tokens) if honest else None)
    with pytest.raises(EngineDeadError, match="rank 1 was ended by signal 9") as death:
        llm.generate(PROMPTS, PARAMS)
    assert killed
    assert time.monotonic() - killed < SOON_S
    assert death.value.__cause__ is not None
    assert process.poll() is not None
    with pytest.raises(EngineDeadError, match="make a new LLM"):
        llm.generate(PROMPTS, PARAMS)
    began = time.monotonic()
    llm.shutdown()
    llm.shutdown()
    assert time.monotonic() - began < 1.0
    assert not Path(llm._ranks._crew.folder).exists()


def test_a_rank_that_dies_while_nobody_asks(model: Path) -> None:
    """The next reader of an AsyncLLM is told, and so is everybody behind."""

    async def read(llm: AsyncLLM) -> list[int]:
        return (
            [output async for output in llm.generate({"prompt_token_ids": PROMPTS[0]}, PARAMS)][-1].outputs[0].token_ids
        )

    async def serve() -> None:
        async with AsyncLLM(str(model), **(TINY | {"tensor_parallel_size": 2})) as llm:
            assert len(await read(llm)) == 60
            ranks = llm._front.engine.ranks
            assert isinstance(ranks, Lead)
            pid = ranks._crew.processes[0].pid
            os.kill(pid, signal.SIGKILL)
            assert soon(lambda: not alive(pid))
            for _ in range(2):
                with pytest.raises(EngineDeadError, match="rank"):
                    await read(llm)
            assert llm.n_unfinished == 0

    asyncio.run(serve())


def ask_for_ever(llm: LLM, steps: bool) -> None:
    for number in itertools.count():
        llm.engine.add(PROMPTS[0], PARAMS, request_id=str(number))
        if steps:
            llm.engine.step()


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, and where it takes no more messages."""
    monkeypatch.setattr(team, "ANSWER_S", 2.0)
    for fill in (False, True):
        llm = LLM(str(model), **(TINY | {"tensor_parallel_size": 2}))
        assert isinstance(llm._ranks, Lead)
        (process,) = llm._ranks._crew.processes
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="has not"):
            ask_for_ever(llm, steps=not fill)
        assert time.monotonic() - began < 3 * SOON_S
        assert process.poll() is not None


def steps_until_found_out(lead: Lead, model: Path, change: Callable[[Settings], Settings], **options: bool) -> int:
    """Output tokens of an engine until rank 0 notices that the other one is not made as it should be."""
    try:
        with both(lead, model, change, **options) as front:
            front.engine.add(PROMPTS[0], PARAMS, request_id="0")
            with pytest.raises(InvariantError, match="rank 1 has gone another way"):
                run_all(front.engine)
            with pytest.raises(EngineDeadError, match="gone another way"):
                front.engine.step()
            return front.engine.stats.output_tokens
    finally:
        assert soon(lambda: not any(alive(process.pid) for process in lead._crew.processes))
        lead.shutdown()


def test_a_rank_that_goes_another_way_is_found_out(model: Path) -> None:
    """It draws with another seed: the first token differs."""

    def change(settings: Settings) -> Settings:
        return settings._replace(config=dataclasses.replace(settings.config, seed=1))

    assert steps_until_found_out(Lead(2, "cpu"), model, change, check_invariants=False) < 6


@pytest.mark.slow
def test_logits_are_compared_bit_by_bit(model: Path, tmp_path: Path) -> None:
    """With check_invariants: here the other rank's head is off by a hair that changes no token."""
    reference("llama", tmp_path, **EVEN)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"][5, 7] *= 1 + 1e-6
    save_file(tensors, tmp_path / "model.safetensors")
    lead = Lead(2, "cpu")
    assert steps_until_found_out(lead, model, lambda settings: settings._replace(path=tmp_path)) < 6


@pytest.mark.slow
def test_a_rank_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    """Rank 0 gets the other one's own error, and the process ends."""
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    lead = Lead(2, "cpu")
    with pytest.raises(CheckpointError, match="neither") as error:  # noqa: PT012
        try:
            with both(lead, model, lambda s: s._replace(path=tmp_path)):
                pass
        except BaseException as met:
            raise lead.failed(met) from None
    assert str(tmp_path) in str(error.value)
    assert soon(lambda: not any(alive(p.pid) for p in lead._crew.processes))
    lead.shutdown()


SCRIPT = """
import sys
from headrace import LLM, AsyncLLM, team, SamplingParams
options = {"skip_tokenizer_init": True, "device": "cpu", "num_pages": 512, "max_num_batched_tokens": 64}
llm = LLM(sys.argv[1], tensor_parallel_size=2, **options)
params = SamplingParams(max_tokens=200, ignore_eos=True)
print("ready", flush=True)
while True:
    llm.generate([[1, 2, 3], [4, 5]], params)
"""


@pytest.mark.parametrize(
    "how",
    [pytest.param(signal.SIGKILL, id="kill"), pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow)],
)
def test_ranks_end_with_rank_0(how: signal.Signals, model: Path, tmp_path: Path) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    (other,) = children(script.pid)
    assert list(tmp_path.glob("headrace-*"))
    time.sleep(0.3)
    # As from a terminal, where all processes of the group get it.
    os.killpg(script.pid, how) if how is signal.SIGINT else os.kill(script.pid, how)
    _, errors = script.communicate(timeout=30)
    assert soon(lambda: not alive(other))
    assert not list(tmp_path.glob("headrace-*"))
    if how is signal.SIGINT:
        assert script.returncode in (130, -signal.SIGINT)
        assert errors.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"tensor_parallel_size": 3}, "num_attention_heads = 4, which cannot be divided"),
        ({"intermediate_size": 97}, {"tensor_parallel_size": 2}, "feed-forward width = 97"),
        ({}, {"tensor_parallel_size": 2, "device": "cuda"}, "GPU"),
        ({}, {"tensor_parallel_size": 2, "selector": "quest", "selector_budget": 8}, "no rank has all of them"),
        ({}, {"tensor_parallel_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_work_starts_no_process(
    changes: dict[str, int], options: dict[str, object], words: str, model: Path, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    before = children(os.getpid())
    with pytest.raises(ConfigError, match=words):
        LLM(str(tmp_path), **(TINY | {"load_format": "random"} | options))
    assert children(os.getpid()) == before


def test_more_ranks_than_gpus_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = EngineConfig(model=str(model), **(TINY | {"tensor_parallel_size": 2}))
    with pytest.raises(ConfigError, match="torch finds 1 GPUs here"):
        gather(Settings(config, model, "cuda"))


def test_layers_that_are_not_divided_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that knows nothing of ranks would be right, and whole on each of them."""
    from headrace.layers import mlp
    from headrace.ranks import ONE

    honest = mlp.GatedMLP.__init__
    monkeypatch.setattr(
        mlp.GatedMLP,
        "__init__",
        lambda self, *args, place, **kw: honest(self, *args, place=place._replace(ranks=ONE), **kw),
    )
    config = EngineConfig(model=str(model), **(TINY | {"tensor_parallel_size": 2}))
    with pytest.raises(ConfigError, match="are not divided among ranks yet"):
        gather(Settings(config, model, "cpu"))


def test_layers_with_fixed_states_are_refused() -> None:
    with pytest.raises(ConfigError, match="fixed states, which are not divided"):
        make_engine(model=toy("RA"), tensor_parallel_size=2, ranks=Ranks(0, 2))
