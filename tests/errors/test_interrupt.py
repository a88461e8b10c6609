"""Ctrl-C at any moment: nothing is half done, and what was finished is kept."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import AsyncLLM, SamplingParams
from headrace.llm import interrupts_between_steps
from headrace.outputs import RequestOutput
from tools.bad_input import Bench

LONG = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
PROMPTS = [[5 + i, 6, 7 + i] for i in range(8)]


def interrupted_call(bench: Bench, after_s: float) -> bool:
    """A call with Ctrl-C after so many seconds. Returns whether the call had returned by then."""
    returned = False
    try:
        threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()
        bench.llm.generate(PROMPTS, LONG)
        returned = True
        time.sleep(30)
    except KeyboardInterrupt:
        return returned
    raise AssertionError("no signal came")


def test_a_call_that_is_interrupted_anywhere_leaves_an_idle_engine(bench: Bench, events: Counter[str]) -> None:
    """Signals at random moments; the audit after each step would find half of a step."""
    events.update({"in the middle": 0, "before the first step": 0, "after the last": 0})
    whole = [output.outputs[0].token_ids for output in bench.llm.generate(PROMPTS, LONG)]
    began = time.perf_counter()
    bench.llm.generate(PROMPTS, LONG)
    usual_s = time.perf_counter() - began
    rng = random.Random(0)
    for i in range(30):
        steps = bench.llm.engine.runner.times.steps
        returned = interrupted_call(bench, 2 * usual_s if i == 9 else i % 5 and rng.uniform(0.0, 1.1) * usual_s)
        ran = bench.llm.engine.runner.times.steps > steps
        events["after the last" if returned else "in the middle" if ran else "before the first step"] += 1
        assert not bench.llm.engine.has_work
        bench.llm.engine.check_idle()
    assert [output.outputs[0].token_ids for output in bench.llm.generate(PROMPTS, LONG)] == whole


@pytest.fixture(autouse=True)
def handler_comes_back() -> Iterator[None]:
    """Python's own handler, which a process of pytest-xdist may lack."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def interrupt() -> None:
    """Ctrl-C, and time for the handler."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def test_an_interrupt_waits_for_the_end_of_a_step_and_a_second_does_not() -> None:
    reached: list[str] = []

    def asked() -> None:
        with interrupts_between_steps() as let_through:
            let_through()
            interrupt()
            reached.append("waited")
            let_through()
            reached.append("never")

    def at_the_end() -> None:
        with interrupts_between_steps():
            interrupt()
            reached.append("waited")

    def twice() -> None:
        with interrupts_between_steps():
            interrupt()
            reached.append("waited")
            interrupt()
            reached.append("never")

    for way in (asked, at_the_end, twice):
        with pytest.raises(KeyboardInterrupt):
            way()
    assert reached == ["waited"] * 3


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    seen: list[Any] = []

    def elsewhere() -> None:
        with interrupts_between_steps() as let_through:
            let_through()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_between_steps():
            seen.append(signal.getsignal(signal.SIGINT))
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]


def test_what_a_listener_raises_ends_the_call(bench: Bench) -> None:
    done: list[int] = []

    def listen(place: int, output: RequestOutput) -> None:
        assert output.finished
        done.append(place)
        if len(done) == 3:
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        bench.llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True), on_output=listen)
    bench.llm.engine.check_idle()
    assert not bench.llm.engine.has_work


# The command line


def start(bench: Bench, *words: str, **options: Any) -> subprocess.Popen[str]:
    """`headrace generate` over the tiny model, in a process of its own."""
    small = "--device cpu --num-pages 96 --page-size 4 --max-num-seqs 2 --max-num-batched-tokens 16".split()
    command = [sys.executable, "-m", "headrace.cli", "generate", *words, "--model", str(bench.model), *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def write_prompts(path: Path, count: int) -> Path:
    lines = [{"id": i, "prompt_token_ids": [5 + i % 200, 6], "params": {"ignore_eos": True}} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"no {count} lines came: {process.communicate()[1]}")


def test_generate_keeps_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    """Status 130, one line, whole lines in the order of the prompts, and no half of a file beside."""
    source, target = write_prompts(tmp_path / "in.jsonl", 1500), tmp_path / "out.jsonl"
    target.write_text("an older run\n")
    process = start(bench, str(source), "-o", str(target), "--max-tokens", "20")
    wait_for_lines(tmp_path / "out.jsonl.partial", 5, process)
    assert target.read_text() == "an older run\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert said.splitlines()[-1] == f"headrace: interrupted; {len(lines)} of 1500 completions are in {target}"
    assert 5 <= len(lines) < 1500
    assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)
    assert all(line["output_tokens"] == 20 for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_an_interrupt_before_anything_is_finished_keeps_the_older_file(bench: Bench, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    target.write_text("an older run\n")
    process = start(bench, "-p", "ab", "-o", str(target))
    deadline_s = time.monotonic() + 60
    while not (tmp_path / "out.jsonl.partial").exists() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # while torch is imported
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "headrace: interrupted; none was kept")
    assert "Traceback" not in said
    assert target.read_text() == "an older run\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_an_async_llm_is_idle_after_an_interrupt(bench: Bench) -> None:
    outputs: list[RequestOutput] = []

    async def read(driver: AsyncLLM, number: int) -> None:
        while True:
            async for output in driver.generate([5 + number, 6], LONG):
                outputs.append(output)
                if len(outputs) == 50:
                    os.kill(os.getpid(), signal.SIGINT)

    async def run() -> None:
        async with AsyncLLM(front=bench.llm.front) as driver:
            await asyncio.gather(*(read(driver, number) for number in range(6)))

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())
    assert [thread.name for thread in threading.enumerate() if thread.name == "headrace-engine"] == []
    assert not bench.llm.engine.has_work
    bench.llm.engine.check_idle()
    assert bench.llm.generate([5, 6], SamplingParams(max_tokens=2, ignore_eos=True))[0].finished
