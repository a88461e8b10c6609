"""Everything that a caller can do wrong: the error's type and words, what it leaves behind, and who else notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from headrace import AsyncLLM, SamplingParams
from headrace.errors import HeadraceError, NumericalError, RequestError
from headrace.request import Request
from tools.bad_input import (
    ALLOWED,
    CHAT,
    COMMANDS,
    GROUPS,
    NAN_TOKEN,
    PARAMETERS,
    PROMPTS,
    RECORDS,
    Allowed,
    Bench,
    Case,
    Command,
    line_of,
    refusal,
)

CASES = [pytest.param(case, id=f"{title}-{case.name}") for title, cases in GROUPS.items() for case in cases]
GOOD: list[tuple[list[int], dict[str, Any]]] = [
    ([5, 6, 7, 8, 9], {"temperature": 0.0}),
    ([10, 11, 12] * 4, {"temperature": 1.0, "seed": 3, "top_p": 0.9}),
    ([13], {"temperature": 0.7, "seed": 4, "repetition_penalty": 1.2, "logprobs": 1}),
]


@contextlib.contextmanager
def nothing_left(bench: Bench) -> Iterator[None]:
    """Books balance, and there are no more threads, open files and files than before."""
    files, threads, handles = bench.files(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert not bench.llm.engine.has_work
    bench.llm.engine.check_idle()
    assert bench.llm.front.on_text is None
    assert (bench.files(), threading.active_count()) == (files, threads)
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_by_type_and_sentence(bench: Bench, case: Case) -> None:
    assert bench.llm.engine.max_model_len == 64  # made before anything is counted
    with nothing_left(bench):
        said = [bench.sentence(refusal(bench, case)) for _ in range(2)]
    assert said[0] == said[1]
    assert len(said[0]) > 15
    assert str(bench.root) not in said[0]
    assert not re.search(r"0x[0-9a-f]{6,}|Error\(", said[0])


@pytest.mark.parametrize("command", [pytest.param(command, id=command.name) for command in COMMANDS])
def test_commands_end_with_a_status_and_one_line(bench: Bench, command: Command) -> None:
    with nothing_left(bench):
        line = line_of(bench, command)
    assert "Traceback" not in line


@pytest.mark.parametrize("allowed", [pytest.param(allowed, id=allowed.name) for allowed in ALLOWED])
def test_what_is_allowed_works(bench: Bench, allowed: Allowed) -> None:
    with nothing_left(bench):
        assert allowed.act(bench)


def add_good(bench: Bench, number: int) -> Request:
    prompt, params = GOOD[number % len(GOOD)]
    wanted = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
    (request,) = bench.llm.engine.add(prompt, wanted, request_id=f"good-{number}")
    return request


def run_all(bench: Bench) -> None:
    while bench.llm.engine.has_work:
        bench.llm.engine.step()


@pytest.fixture(scope="module")
def alone(bench: Bench) -> list[list[int]]:
    """The tokens of the good requests, each by itself in an engine that has seen nothing else."""
    found = []
    for prompt, params in GOOD:
        wanted = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
        llm = bench.start(dtype="float64", enable_prefix_caching=False)
        found.append(llm.generate({"prompt_token_ids": prompt}, wanted)[0].outputs[0].token_ids)
    assert len({tuple(tokens) for tokens in found}) == len(GOOD)
    return found


def test_requests_in_flight_do_not_notice(bench: Bench, alone: list[list[int]], events: Counter[str]) -> None:
    """Each bad request comes while good ones run, at another point of their lives, and their tokens stay the same."""
    events.update({"refused": 0, "failed while running": 0, "ran beside": 0})
    apart = ("a call from inside a call",)  # starts its own engine work first
    for number, case in enumerate(case for group in (PROMPTS, PARAMETERS, CHAT, RECORDS) for case in group):
        if case.name in apart:
            continue
        good = [add_good(bench, 3 * number + i) for i in range(3)]
        for _ in range(number % 5):
            bench.llm.engine.step()
        in_flight = not all(request.finish for request in good)
        error = refusal(bench, case)
        events["ran beside"] += in_flight
        events["failed while running" if isinstance(error, NumericalError) else "refused"] += 1
        run_all(bench)
        assert [request.output_ids for request in good] == alone, case.name
        bench.llm.engine.check_idle()


def test_readers_of_an_async_llm_do_not_notice(bench: Bench, alone: list[list[int]]) -> None:
    bad: list[tuple[Any, dict[str, Any]]] = [
        ([5, -1], {}),
        ([5, NAN_TOKEN], {}),
        ("", {}),
        ([5] * 100, {}),
        (5, {}),
        ("a", {"sampling_params": {"n": 1}}),
        ("a", {"sampling_params": SamplingParams(logprobs=1000)}),
        ("a", {"request_id": "good-0"}),
        ("a", {"deadline_s": "1"}),
    ]

    async def read(llm: AsyncLLM, number: int) -> list[int]:
        prompt, params = GOOD[number]
        wanted = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params})
        outputs = [one async for one in llm.generate({"prompt_token_ids": prompt}, wanted, f"good-{number}")]
        return outputs[-1].outputs[0].token_ids

    async def fail(llm: AsyncLLM, prompt: Any, given: dict[str, Any]) -> str:
        try:
            async for output in llm.generate(prompt, **given):
                for sample in output.outputs:
                    if sample.error:
                        raise sample.error
        except HeadraceError as error:
            return type(error).__name__
        return "nothing"

    async def run() -> tuple[list[list[int]], list[str]]:
        async with AsyncLLM(front=bench.llm.front) as llm:
            good = [asyncio.create_task(read(llm, number)) for number in range(len(GOOD))]
            await asyncio.sleep(0)
            said = await asyncio.gather(*(fail(llm, *one) for one in bad))
            with pytest.raises(RequestError):
                await llm.abort([])  # type: ignore[arg-type]
            return [await task for task in good], list(said)

    with nothing_left(bench):
        tokens, said = asyncio.run(run())
    assert tokens == alone
    assert said.count("nothing") == 0
    assert said.count("NumericalError") == 1


def test_a_refused_call_of_many_prompts_runs_none(bench: Bench) -> None:
    steps = bench.llm.engine.runner.times.steps
    with pytest.raises(RequestError, match=r"prompts\[2\]: the prompt has token id 999"):
        bench.llm.generate(["a", "b", [999], [998]])
    assert bench.llm.engine.runner.times.steps == steps


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    params = SamplingParams(
        n=numpy.int64(2),
        temperature=numpy.float32(0.5),
        top_k=torch.tensor(3),
        stop_token_ids=numpy.array([1, 2]),
        logit_bias={numpy.int32(4): numpy.float64(1.0)},
        ignore_eos=numpy.bool_(True),
        allowed_token_ids=range(3),
        stop=("a",),  # type: ignore[arg-type]
    )
    plain = SamplingParams(
        n=2,
        temperature=0.5,
        top_k=3,
        stop_token_ids=[1, 2],
        logit_bias={4: 1.0},
        ignore_eos=True,
        allowed_token_ids=[0, 1, 2],
        stop=["a"],
    )
    assert params == plain
    assert {name: type(value) for name, value in params.to_dict().items()} == {
        name: type(value) for name, value in plain.to_dict().items()
    }


def test_a_callers_list_is_copied() -> None:
    stops = [1, 2]
    params = SamplingParams(stop_token_ids=stops)
    stops.append(-1)
    assert params.stop_token_ids == [1, 2]
