"""The asyncio interface: the tokens of `LLM.generate`, and what happens to those who leave, wait, or come too late."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, alone, make_engine, run_all

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, EngineDeadError, QueueFullError, RequestError
from headrace.front import TextFront
from headrace.outputs import RequestOutput

PROMPT = [5, 9, 2, 44, 17, 8, 30, 21, 13]
TEXTS = ["def fibonacci(n):\n", "import os\n\n\ndef walk(path):\n    ", "class Stack:\n    def __init__(self):\n"]
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
PATIENCE_S = 20.0


def play(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; one that hangs fails."""

    async def limited() -> None:
        await asyncio.wait_for(coroutine, PATIENCE_S)

    asyncio.run(limited())


class Gate:
    """Lets the engine step only as often as the test says."""

    def __init__(self, engine: Engine) -> None:
        self.steps = 0
        self.running: list[set[str]] = []
        """Ids in the engine at the start of each step."""
        self._permits = threading.Semaphore(0)
        self._free = False
        self._engine = engine
        self._step = engine.step
        engine.step = self._gated  # type: ignore[method-assign]

    def _gated(self) -> Any:
        if not self._free and not self._permits.acquire(timeout=PATIENCE_S):
            raise TimeoutError("the test has forgotten its gate")
        self.running.append(set(self._engine._by_id))
        changed = self._step()
        self.steps += 1
        return changed

    async def run(self, steps: int) -> None:
        """Let so many steps happen, and wait until they have."""
        target = self.steps + steps
        for _ in range(steps):
            self._permits.release()
        while self.steps < target:
            await asyncio.sleep(0.001)

    def open(self) -> None:
        """From now on the engine steps freely."""
        self._free = True
        self._permits.release()


def tiny_llm(max_queue: int = 100, **options: Any) -> tuple[AsyncLLM, Engine]:
    engine = make_engine(**options)
    return AsyncLLM(front=TextFront(engine, None), max_queue=max_queue), engine


async def read(outputs: AsyncGenerator[RequestOutput, None]) -> list[RequestOutput]:
    return [output async for output in outputs]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def settle() -> None:
    """Let every task that can move do so."""
    for _ in range(10):
        await asyncio.sleep(0)


# The same tokens


@pytest.fixture(scope="module")
def precise_llm() -> LLM:
    """The bundled model in float64, where other batches give the same tokens without exception."""
    return LLM(device="cpu", dtype="float64", kv_cache_gib=0.25, max_num_batched_tokens=64, max_model_len=512)


def test_streams_end_with_the_outputs_of_generate(precise_llm: LLM, events: Counter[str]) -> None:
    """Concurrent streams over the bundled model, with samples, stop strings, log-probs, with and without seeds."""
    params = [
        SamplingParams(max_tokens=24, n=2, ignore_eos=True),
        SamplingParams(max_tokens=30, temperature=0.0, stop=["\n\n", "self"]),
        SamplingParams(max_tokens=12, seed=3, logprobs=2, prompt_logprobs=1),
        SamplingParams(max_tokens=20, seed=7, n=3, top_p=0.9, stop=")"),
        SamplingParams(max_tokens=16, detokenize=False),
    ]
    prompts = [TEXTS[i % 3] for i in range(len(params))]
    expected = precise_llm.generate(prompts, params)
    events.update(dict.fromkeys(["partial", "stop string", "samples", "log-probs"], 0))

    async def main() -> None:
        async with AsyncLLM(front=precise_llm.front) as llm:
            with pytest.raises(RequestError, match="an AsyncLLM drives this model's engine"):
                precise_llm.generate(prompts, params)
            read_all = await asyncio.gather(*(read(llm.generate(*pair)) for pair in zip(prompts, params, strict=True)))
        for outputs, whole in zip(read_all, expected, strict=True):
            assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
            last = outputs[-1]
            assert last.outputs == whole.outputs
            assert (last.prompt, last.seed, last.prompt_logprobs) == (whole.prompt, whole.seed, whole.prompt_logprobs)
            for output in outputs:
                assert len(output.outputs) == len(last.outputs)
                for part, sample in zip(output.outputs, last.outputs, strict=True):
                    assert sample.token_ids[: len(part.token_ids)] == part.token_ids
                    assert sample.text.startswith(part.text)
                    assert part.logprobs == (sample.logprobs and sample.logprobs[: len(part.token_ids)])
            events["partial"] += len(outputs) - 1
            events["samples"] += len(last.outputs) > 1
            events["stop string"] += sum(isinstance(s.stop_reason, str) for s in last.outputs)
            events["log-probs"] += last.outputs[0].logprobs is not None

    play(main())
    precise_llm.engine.check_idle()
    assert precise_llm.generate(prompts, params)[3].outputs == expected[3].outputs  # it can be used again


def expect(prompt: list[int], params: SamplingParams, number: int) -> list[tuple[int, ...]]:
    """Tokens of each sample in an engine that serves nobody else."""
    if params.n == 1 and params.seed is not None:
        return [alone(tuple(prompt), json.dumps(params.to_dict()))[0]]  # remembers
    engine = make_engine()
    samples = engine.add(prompt, params, request_id="alone", number=number)
    run_all(engine)
    return [tuple(sample.output_ids) for sample in samples]


def test_random_readers_disturb_nobody(events: Counter[str]) -> None:
    """Readers that come at any time, read slowly, break, or are cancelled; famine, priorities, a bounded queue."""
    counted = ["whole", "break", "cancel", "abort by name", "famine", "merged", "waited for room", "samples"]
    events.update(dict.fromkeys(counted, 0))

    async def reader(llm: AsyncLLM, rng: random.Random, name: int) -> None:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
        seed = rng.choice([None, 0, 1])
        params = SamplingParams(max_tokens=rng.randint(1, 25), seed=seed, n=rng.choice([1, 1, 3]), ignore_eos=True)
        fate = rng.choice(["whole", "whole", "break", "abort by name"])
        events["samples"] += params.n > 1
        await asyncio.sleep(rng.choice([0, 0, 0.002, 0.01]))
        events["waited for room"] += llm.n_unfinished >= 4
        outputs = llm.generate(prompt, params, str(name), priority=rng.choice([0, 0, 1]), wait=True)
        seen: RequestOutput | None = None
        async for output in outputs:
            if seen is not None:
                gained = [
                    len(b.token_ids) - len(a.token_ids) for a, b in zip(seen.outputs, output.outputs, strict=True)
                ]
                assert min(gained) >= 0
                events["merged"] += max(gained) > 1
            seen = output
            if len(seen.outputs[0].token_ids) > 3 and fate == "break" and not seen.finished:
                await outputs.aclose()
                break
            if len(seen.outputs[0].token_ids) > 3 and fate == "abort by name":
                await llm.abort(str(name))
                fate = "whole"
            await asyncio.sleep(rng.choice([0, 0, 0.003]))
        assert seen is not None
        events["abort by name"] += seen.outputs[0].finish_reason == "abort"
        events["whole" if seen.finished else "break"] += 1
        if seed is None:  # the seed that was used is the request's number in the order of arrival
            params = SamplingParams(**{**params.to_dict(), "seed": seen.seed})
        for sample, tokens in zip(seen.outputs, expect(prompt, params, 0), strict=True):
            cut = len(sample.token_ids) if sample.finish_reason in (None, "abort") else len(tokens)
            assert tuple(sample.token_ids) == tokens[:cut]

    async def main(seed: int) -> None:
        rng = random.Random(seed)
        llm, engine = tiny_llm(max_queue=4, num_pages=24, max_model_len=60, max_num_batched_tokens=16, max_num_seqs=4)
        async with llm:
            readers = [asyncio.create_task(reader(llm, random.Random(rng.random()), i)) for i in range(10)]
            for task in rng.sample(readers, 2):
                await asyncio.sleep(0.004)
                events["cancel"] += task.cancel()
            results = await asyncio.gather(*readers, return_exceptions=True)
            for result in results:
                if result is not None and not isinstance(result, asyncio.CancelledError):
                    raise result
            await until(lambda: llm.n_unfinished == 0)
        engine.check_idle()
        assert not engine.has_work
        events["famine"] += engine.stats.preemptions
        events["examples"] += 1

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 10**6))
    def run(seed: int) -> None:
        play(main(seed))

    run()


def test_seedless_requests_are_keyed_by_their_order_of_arrival() -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    async def main() -> None:
        llm, _ = tiny_llm()
        async with llm:
            for number in range(3):
                with pytest.raises(RequestError):  # what was refused is not counted
                    await read(llm.generate([VOCAB], params))
                output = (await read(llm.generate(PROMPT, params)))[-1]
                assert [tuple(s.token_ids) for s in output.outputs] == expect(PROMPT, params, number)

    play(main())


# Leaving


def test_a_break_ends_the_request_within_a_step() -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        gate = Gate(engine)
        async with llm:
            other = asyncio.create_task(read(llm.generate(PROMPT, LONG, "other")))
            leaver = asyncio.create_task(leave_after(llm, 3))
            await until(lambda: llm.n_unfinished == 2)
            while not leaver.done():
                await gate.run(1)
                await settle()
            await settle()
            left = gate.steps
            await gate.run(6)
            # The engine's thread may have been at the door of one more step when the reader left.
            assert any("leaver" in ids for ids in gate.running[:left])
            assert not any("leaver" in ids for ids in gate.running[left + 1 :])
            assert all("other" in ids for ids in gate.running)
            assert llm.n_unfinished == 1
            engine.audit()
            gate.open()
            assert len((await other)[-1].outputs[0].token_ids) == 60
        engine.check_idle()
        assert engine.stats.aborts == 1

    async def leave_after(llm: AsyncLLM, outputs: int) -> None:
        seen = 0
        async for _ in llm.generate(PROMPT, LONG, "leaver"):
            seen += 1
            if seen == outputs:
                break

    play(main())


def test_cancelling_the_task_ends_the_request() -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        gate = Gate(engine)
        async with llm:
            task = asyncio.create_task(read(llm.generate(PROMPT, SamplingParams(max_tokens=60, n=3, ignore_eos=True))))
            await until(lambda: llm.n_unfinished == 1)
            await gate.run(4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            await until(lambda: llm.n_unfinished == 0)
        engine.check_idle()
        assert engine.stats.aborts == 3
        assert gate.steps <= 5  # four, and the one whose door the engine's thread may have reached

    play(main())


def test_abort_by_name_gives_the_reader_a_last_output() -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        gate = Gate(engine)
        async with llm:
            task = asyncio.create_task(read(llm.generate(PROMPT, LONG, "r")))
            await until(lambda: llm.n_unfinished == 1)
            await gate.run(4)
            gate.open()
            await llm.abort("r")
            assert llm.n_unfinished == 0
            last = (await task)[-1]
            assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
            assert len(last.outputs[0].token_ids) >= 4
            await llm.abort("r")
            await llm.abort("never heard of")
        engine.check_idle()

    play(main())


def test_a_name_is_free_again_once_its_request_has_ended() -> None:
    """A reader who leaves late does not end the next request of that name."""

    async def main() -> None:
        llm, _ = tiny_llm()
        async with llm:
            first = llm.generate(PROMPT, SHORT, "r")
            await anext(first)
            await until(lambda: llm.n_unfinished == 0)  # ended, and not read to the end
            second = llm.generate(PROMPT, LONG, "r")
            await anext(second)
            with pytest.raises(RequestError, match="request_id 'r' is in use"):
                await read(llm.generate(PROMPT, SHORT, "r"))
            await first.aclose()
            assert (await read(second))[-1].outputs[0].finish_reason == "length"

    play(main())


def test_readers_whose_event_loop_is_gone_hold_nothing() -> None:
    llm, engine = tiny_llm()
    gate = Gate(engine)
    loop = asyncio.new_event_loop()
    outputs = llm.generate(PROMPT, LONG)

    async def first() -> None:
        reading = asyncio.ensure_future(anext(outputs))
        await until(lambda: llm.n_unfinished == 1)
        await gate.run(1)
        await reading

    loop.run_until_complete(first())
    loop.close()
    gate.open()
    end_s = time.monotonic() + PATIENCE_S
    while llm.n_unfinished and time.monotonic() < end_s:
        time.sleep(0.001)
    assert llm.n_unfinished == 0
    play(llm.shutdown())
    engine.check_idle()
    assert engine.stats.aborts == 1


# Back-pressure


def test_a_full_queue_refuses_and_says_what_to_do() -> None:
    async def main() -> None:
        llm, engine = tiny_llm(max_queue=2)
        gate = Gate(engine)
        async with llm:
            tasks = [asyncio.create_task(read(llm.generate(PROMPT, SHORT))) for _ in range(2)]
            await settle()
            message = (
                "2 requests are unfinished and max_queue is 2: come again later, pass wait=True, or raise max_queue"
            )
            with pytest.raises(QueueFullError, match=message):
                await read(llm.generate(PROMPT, SHORT))
            gate.open()
            await asyncio.gather(*tasks)
            assert (await read(llm.generate(PROMPT, SHORT)))[-1].finished
        engine.check_idle()

    play(main())


def test_waiting_for_room_is_first_come_first_served() -> None:
    async def main() -> None:
        llm, engine = tiny_llm(max_queue=2)
        arrived: list[str] = []  # two that run together may end in any order
        add = engine.add

        def note_arrival(*arguments: Any, **named: Any) -> Any:
            arrived.append(named["request_id"])
            return add(*arguments, **named)

        engine.add = note_arrival  # type: ignore[method-assign]
        ended: set[str] = set()
        most = 0

        async def one(name: str) -> None:
            nonlocal most
            async for _ in llm.generate(PROMPT, SHORT, name, wait=True):
                most = max(most, llm.n_unfinished)
            ended.add(name)

        async with llm:
            tasks = [asyncio.create_task(one(str(i))) for i in range(12)]
            await settle()
            assert llm.n_unfinished == 2
            with pytest.raises(QueueFullError):  # who does not wait overtakes nobody
                await read(llm.generate(PROMPT, SHORT))
            await asyncio.gather(*tasks)
        assert arrived == [str(i) for i in range(12)]
        assert ended == set(arrived)
        assert most == 2
        assert llm.n_unfinished == 0
        engine.check_idle()

    play(main())


def test_those_who_stop_waiting_lose_no_seat() -> None:
    """One is cancelled in line, one in the moment a seat is given to it; the ones behind them get their turn."""

    async def main() -> None:
        llm, engine = tiny_llm(max_queue=1)
        gate = Gate(engine)
        async with llm:
            first = asyncio.create_task(read(llm.generate(PROMPT, SHORT)))
            await settle()
            waiting = [asyncio.create_task(read(llm.generate(PROMPT, SHORT, wait=True))) for _ in range(4)]
            await settle()
            waiting[0].cancel()
            await settle()
            room = llm._room
            waiter = room._line[0]
            await gate.run(2)
            gate._permits.release()  # the last step: the seat goes to waiting[1] while this task holds the loop
            while waiter in room._line:
                time.sleep(0.001)
            waiting[1].cancel()
            gate.open()
            await asyncio.gather(first, waiting[2], waiting[3])
            assert waiting[0].cancelled()
            assert waiting[1].cancelled()
            await until(lambda: llm.n_unfinished == 0)
        engine.check_idle()

    play(main())


def test_a_wait_for_room_ends_with_deadline_abort_or_shutdown() -> None:
    async def main() -> None:
        llm, engine = tiny_llm(max_queue=1)
        gate = Gate(engine)
        async with llm:
            first = asyncio.create_task(read(llm.generate(PROMPT, LONG, "first")))
            await settle()
            late = asyncio.create_task(read(llm.generate(PROMPT, LONG, wait=True, deadline_s=0.02)))
            named = asyncio.create_task(read(llm.generate(PROMPT, LONG, "named", wait=True)))
            patient = asyncio.create_task(read(llm.generate(PROMPT, LONG, wait=True)))
            await settle()
            await gate.run(1)
            abort = asyncio.create_task(llm.abort("named"))
            await asyncio.sleep(0.03)
            await gate.run(2)
            for task, reason in ((late, "timeout"), (named, "abort")):
                (output,) = await task
                assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == (reason, [])
            await abort
            assert not patient.done()
            assert llm.n_unfinished == 1
            stop = asyncio.create_task(llm.shutdown())
            await settle()
            gate.open()
            await stop
            assert (await first)[-1].outputs[0].finish_reason == "abort"
            with pytest.raises(EngineDeadError, match="was shut down"):
                await patient
        assert llm.n_unfinished == 0
        engine.check_idle()

    play(main())


def test_a_slow_reader_gets_the_newest_output_and_holds_up_nobody() -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        gate = Gate(engine)
        async with llm:
            slow = llm.generate(PROMPT, LONG)
            first = asyncio.create_task(anext(slow))
            fast = asyncio.create_task(read(llm.generate(PROMPT, LONG)))
            await until(lambda: llm.n_unfinished == 2)
            for _ in range(20):
                await gate.run(1)
                await settle()
            assert len((await first).outputs[0].token_ids) == 1
            gate.open()
            lengths = [len(output.outputs[0].token_ids) for output in await fast]
            assert lengths[:18] == list(range(1, 19))
            await until(lambda: llm.n_unfinished == 0)
            rest = await read(slow)
            assert [(len(o.outputs[0].token_ids), o.finished) for o in rest] == [(60, True)]

    play(main())


# Ends


def test_a_failure_of_the_engine_reaches_every_reader() -> None:
    async def main() -> None:
        llm, engine = tiny_llm(max_queue=3)
        step = engine.step
        steps = 0

        def fail() -> Any:
            nonlocal steps
            steps += 1
            if steps == 6:
                raise RuntimeError("the memory of the machine is on fire")
            return step()

        engine.step = fail  # type: ignore[method-assign]
        tasks = [asyncio.create_task(read(llm.generate(PROMPT, LONG))) for _ in range(3)]
        tasks += [asyncio.create_task(read(llm.generate(PROMPT, LONG, wait=True))) for _ in range(2)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert len({id(result) for result in results}) == 5
        for result in results:
            assert isinstance(result, EngineDeadError)
            assert "failed (RuntimeError: the memory of the machine is on fire)" in str(result)
            assert isinstance(result.__cause__, RuntimeError)
        for call in (read(llm.generate(PROMPT, SHORT)), read(llm.generate(PROMPT, SHORT, wait=True)), llm.abort("x")):
            with pytest.raises(EngineDeadError, match="on fire"):
                await call
        assert steps == 6
        assert llm.n_unfinished == 0
        await llm.shutdown()

    play(main())


def test_a_deadline_ends_a_stream() -> None:
    now_s = 0.0

    async def main() -> None:
        nonlocal now_s
        llm, engine = tiny_llm(clock=lambda: now_s)
        gate = Gate(engine)
        async with llm:
            timed = asyncio.create_task(read(llm.generate(PROMPT, LONG, deadline_s=5.0)))
            other = asyncio.create_task(read(llm.generate(PROMPT, LONG)))
            await until(lambda: llm.n_unfinished == 2)
            await gate.run(4)
            now_s = 5.0
            gate.open()
            last = (await timed)[-1]
            assert last.outputs[0].finish_reason == "timeout"
            tokens = last.outputs[0].token_ids
            assert 3 <= len(tokens) <= 5
            whole = (await other)[-1].outputs[0]
            assert (whole.token_ids[: len(tokens)], whole.finish_reason) == (tokens, "length")
        engine.check_idle()

    play(main())


def test_priorities_order_the_line() -> None:
    async def main() -> None:
        llm, engine = tiny_llm(max_num_seqs=1)
        gate = Gate(engine)
        ended: list[int] = []

        async def one(name: int, priority: int) -> None:
            await read(llm.generate(PROMPT, SHORT, priority=priority))
            ended.append(name)

        async with llm:
            tasks = [asyncio.create_task(one(i, p)) for i, p in enumerate([0, 5, 0, -1, 5])]
            await until(lambda: llm.n_unfinished == 5)
            gate.open()
            await asyncio.gather(*tasks)
        # The first may be ahead by a step or two; it is preempted, and its place is before all but the urgent one.
        assert ended == [3, 0, 2, 1, 4]

    play(main())


def test_shutdown_ends_what_is_in_flight_and_can_be_called_again() -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        gate = Gate(engine)
        tasks = [asyncio.create_task(read(llm.generate(PROMPT, LONG))) for _ in range(12)]
        await until(lambda: llm.n_unfinished == 12)
        await gate.run(5)
        stop = asyncio.create_task(llm.shutdown())
        await settle()
        gate.open()
        await stop
        reasons = [(await task)[-1].outputs[0].finish_reason for task in tasks]
        assert reasons == ["abort"] * 12
        engine.check_idle()
        assert not engine.has_work
        await llm.shutdown()
        for call in (read(llm.generate(PROMPT, SHORT)), llm.abort("x")):
            with pytest.raises(EngineDeadError, match="was shut down: make a new AsyncLLM"):
                await call

    play(main())


def test_one_that_is_forgotten_stops_its_thread() -> None:
    llm, _ = tiny_llm()
    thread = llm._worker.thread
    assert thread.is_alive()
    del llm
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("prompt", "urgency", "message"),
    [
        ("text", {}, "a text prompt needs the tokenizer"),
        (["a", "b"], {}, "a prompt is list"),
        ([], {}, "the prompt is empty"),
        ([VOCAB], {}, f"the prompt has token id {VOCAB}"),
        (PROMPT, {"priority": "high"}, "priority is 'high'"),
        (PROMPT, {"deadline_s": 0}, "deadline_s is 0;"),
    ],
)
def test_bad_requests_are_refused_alone(prompt: Any, urgency: dict[str, Any], message: str) -> None:
    async def main() -> None:
        llm, engine = tiny_llm()
        async with llm:
            other = asyncio.create_task(read(llm.generate(PROMPT, LONG)))
            with pytest.raises(RequestError, match=message):
                await read(llm.generate(prompt, SHORT, **urgency))
            assert (await other)[-1].outputs[0].finish_reason == "length"
            assert llm.n_unfinished == 0
        engine.check_idle()

    play(main())


def test_what_cannot_work_is_refused_at_the_start() -> None:
    for bound in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="max_queue is"):
            tiny_llm(max_queue=bound)  # type: ignore[arg-type]
    front = TextFront(make_engine(), None)
    with pytest.raises(ConfigError, match="a front is given, and so is model, seed"):
        AsyncLLM("somewhere", front=front, seed=1)
    with pytest.raises(ConfigError, match="unknown option 'max_num_sequences'"):
        AsyncLLM(max_num_sequences=3)
    llm = AsyncLLM(front=front)
    with pytest.raises(ConfigError, match="the front is in use"):
        AsyncLLM(front=front)
    play(llm.shutdown())
    front.engine.add(PROMPT, SHORT, request_id="r")
    with pytest.raises(ConfigError, match="the front is in use"):
        AsyncLLM(front=front)
