"""The engine behind its process: outputs equal those of `LLM.generate`, whatever is asked, and deaths are survived."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.errors import CheckpointError, ConfigError, EngineDeadError, QueueFullError, RequestError
from headrace.outputs import RequestOutput
from headrace.serve.client import EngineClient, EngineState
from headrace.serve.generation import Generation

SMALL: dict[str, Any] = {"device": "cpu", "kv_cache_gib": 0.1, "max_num_batched_tokens": 256}
PROMPTS = ["def fibonacci(n):\n", "import os\n\n\ndef walk(path):\n    ", 'x = "é ü 漢字 🙂"\n', "class Stack:\n"]
PATIENCE_S = 120.0


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[EngineClient]:
    os.environ["OMP_NUM_THREADS"] = "1"
    client = EngineClient(EngineConfig(**SMALL), **options)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown()


def play(test: Callable[[EngineClient], Awaitable[None]], **options: Any) -> None:
    async def limited() -> None:
        async with running(**options) as client:
            await test(client)

    asyncio.run(asyncio.wait_for(limited(), PATIENCE_S))


async def idle(client: EngineClient) -> None:
    for _ in range(400):
        await client.check(10.0)
        await asyncio.sleep(0.05)
        if not client.stats.running and not client.stats.waiting and not client.stats.pages_in_use:
            assert client.stats.leaked == 0
            return
    raise AssertionError(client.stats)


def plain(output: RequestOutput) -> Any:
    """What must be equal: all but times and ids."""
    return (
        output.prompt_token_ids,
        output.seed,
        [
            (s.index, s.text, s.token_ids, s.finish_reason, s.stop_reason, s.logprobs, s.cumulative_logprob)
            for s in output.outputs
        ],
        output.prompt_logprobs,
    )


def tokens(output: RequestOutput) -> Any:
    """What must be equal in any batch, where log-probs differ by rounding."""
    return output.seed, [(s.text, s.token_ids, s.finish_reason, s.stop_reason) for s in output.outputs]


VARIED = [
    SamplingParams(max_tokens=12, seed=1),
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=20, n=3, temperature=0.8, seed=2, logprobs=2),
    SamplingParams(max_tokens=30, seed=3, stop=["\n", "return"]),
    SamplingParams(max_tokens=30, seed=4, stop=["e"], include_stop_str_in_output=True, min_tokens=5),
    SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1),
    SamplingParams(max_tokens=10, temperature=0.0, repetition_penalty=1.3, logit_bias={5: 2.0}),
    SamplingParams(max_tokens=8, seed=5, detokenize=False),
    SamplingParams(max_tokens=40, seed=6, regex="[a-z]{3,6}=[0-9]+"),
    SamplingParams(max_tokens=10, seed=7, truncate_prompt_tokens=3),
    SamplingParams(max_tokens=15, seed=8, skip_special_tokens=False, stop_token_ids=[13]),
]


async def drained(generation: Generation) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Texts and tokens of a stream, joined."""
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    async for update in generation:
        for sample in update.samples:
            texts[sample.index] = texts.get(sample.index, "") + sample.text
            ids.setdefault(sample.index, []).extend(sample.token_ids)
    return texts, ids


def test_outputs_equal_offline(offline: LLM) -> None:
    """As streams and whole, with the numbers that key unseeded requests."""
    asked = [(PROMPTS[i % len(PROMPTS)], VARIED[i % len(VARIED)]) for i in range(2 * len(VARIED))]
    expected = offline.generate([prompt for prompt, _ in asked], [params for _, params in asked])

    async def test(client: EngineClient) -> None:
        made = [await client.generate(prompt, params) for prompt, params in asked]
        joined: dict[int, Any] = {}

        async def read(place: int) -> RequestOutput:
            if place % 2:
                joined[place] = await drained(made[place])
            return await made[place].result()

        outputs = await asyncio.gather(*(read(place) for place in range(len(made))))
        assert [tokens(one) for one in outputs] == [tokens(one) for one in expected]
        for place, (texts, ids) in joined.items():
            for sample in expected[place].outputs:
                assert texts.get(sample.index, "") == sample.text
                assert ids.get(sample.index, []) == sample.token_ids
        for one, other in zip(outputs, expected, strict=True):
            assert one.prompt_token_ids == other.prompt_token_ids
            assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
            for sample, same in zip(one.outputs, other.outputs, strict=True):
                assert (sample.logprobs is None) == (same.logprobs is None)
                for mine, theirs in zip(sample.logprobs or [], same.logprobs or [], strict=True):
                    shared = set(mine) & set(theirs)
                    assert shared
                    assert all(mine[t].logprob == pytest.approx(theirs[t].logprob, abs=1e-3) for t in shared)
                    assert all(mine[t].decoded_token == theirs[t].decoded_token for t in shared)
        await idle(client)

    play(test)


def test_texts_with_stop_strings_equal_offline(offline: LLM) -> None:
    """Random stop strings, cut out of what the model would write; streamed and whole."""
    rng = random.Random(5)
    bare = [SamplingParams(max_tokens=40, seed=seed) for seed in range(12)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(bare))]
    asked = []
    for seed, output in enumerate(offline.generate(prompts, bare)):
        text = output.outputs[0].text or "a"
        stops = []
        for _ in range(3):
            at = rng.randrange(len(text))
            stops.append(text[at : at + rng.randint(1, 4)] or "x")
        keep, least = rng.random() < 0.5, rng.choice([0, 0, 7])
        asked.append(
            SamplingParams(max_tokens=40, seed=seed, stop=stops, include_stop_str_in_output=keep, min_tokens=least)
        )
    expected = offline.generate(prompts, asked)
    seen = Counter(str(output.outputs[0].finish_reason) for output in expected)
    print(dict(seen))
    assert seen["stop"], "no stop string was met"

    async def test(client: EngineClient) -> None:
        made = [await client.generate(prompt, params) for prompt, params in zip(prompts, asked, strict=True)]
        joined = await asyncio.gather(*map(drained, made))
        for (texts, ids), output, generation in zip(joined, expected, made, strict=True):
            sample = output.outputs[0]
            assert (texts[0], ids[0]) == (sample.text, sample.token_ids)
            assert tokens(await generation.result()) == tokens(output)

    play(test)


def test_refusals_and_the_queue() -> None:
    async def test(client: EngineClient) -> None:
        for prompt in ([-1], ["a", 1], 3, {"prompt": 3}, {"text": "a"}, [2**40]):
            with pytest.raises(RequestError):
                await client.generate(prompt, SamplingParams())
        for ids in ([10**6], [], [5] * 5000):
            with pytest.raises(RequestError):
                await (await client.generate(ids, SamplingParams())).accepted()
        long = SamplingParams(max_tokens=1500, ignore_eos=True)
        held = [await client.generate("a", long) for _ in range(3)]
        with pytest.raises(QueueFullError, match="max_queue is 3"):
            await client.generate("a", long)
        await held[0].accepted()
        steps = client.stats.steps
        await held[0].aclose()
        await client.generate("a", SamplingParams(max_tokens=1))
        await client.abort(held[1].request_id)
        assert (await held[1].result()).outputs[0].finish_reason == "abort"
        await held[2].aclose()
        await idle(client)
        assert client.stats.steps - steps < 1000
        assert client.stats.aborts == 3

    play(test, max_queue=3)


def test_who_leaves_is_gone_within_a_step() -> None:
    async def test(client: EngineClient) -> None:
        generation = await client.generate("a", SamplingParams(max_tokens=1900, ignore_eos=True))
        async for _ in generation:
            break
        before = await client._ask("check")
        await generation.aclose()
        behind = await client._ask("check")
        await asyncio.sleep(0.2)
        assert await client._ask("check") == behind, "the engine still steps"
        assert behind - before <= 2

    play(test)


def test_what_keeps_an_engine_from_starting_is_raised(tmp_path: Path) -> None:
    async def start(**options: Any) -> None:
        client = EngineClient(EngineConfig(**(SMALL | options)))
        try:
            await client.start()
        finally:
            await client.shutdown()

    with pytest.raises(CheckpointError):
        asyncio.run(start(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="splitfuze"):
        asyncio.run(start(scheduler="splitfuze"))


def killed_under_load(offline: LLM, kills: int, seed: int) -> None:
    """Kill the engine at random moments: each request equals offline, or fails because something was handed out."""
    rng = random.Random(seed)
    count = 24 * kills
    asked = [SamplingParams(max_tokens=rng.randint(1, 60), seed=i, ignore_eos=True) for i in range(count)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    expected = offline.generate(prompts, asked)
    seen: Counter[str] = Counter()

    async def test(client: EngineClient) -> None:
        room = asyncio.Semaphore(16)
        done = 0

        async def one(place: int) -> None:
            nonlocal done
            async with room:
                generation = await client.generate(prompts[place], asked[place])
                try:
                    if place % 2:
                        assert tokens(await generation.result()) == tokens(expected[place])
                        seen["whole"] += 1
                    else:
                        texts, _ = await drained(generation)
                        assert texts[0] == expected[place].outputs[0].text
                        seen["streamed"] += 1
                except EngineDeadError as error:
                    said = "tokens were sent" in str(error)
                    seen["lost" if said and not place % 2 and generation.handed_out else f"odd: {error}"] += 1
                done += 1

        async def kill() -> None:
            for number in range(kills):
                while done < count * number // (kills + 1) or client.state is not EngineState.READY:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(rng.random() * 0.2)
                if client.pid is not None and client.state is EngineState.READY:
                    os.kill(client.pid, signal.SIGKILL)
                    seen["killed"] += 1
                    while client.state is EngineState.READY:
                        await asyncio.sleep(0.001)

        await asyncio.gather(kill(), *(one(place) for place in range(count)))
        assert client.restarts == seen["killed"]
        await idle(client)

    play(test, max_attempts=100)
    print(dict(seen))
    assert not [name for name in seen if name.startswith("odd")]
    assert seen["whole"] == count // 2
    assert seen["streamed"]
    assert seen["killed"]


def test_kills_under_load(offline: LLM) -> None:
    killed_under_load(offline, 2, seed=1)


@pytest.mark.slow
def test_twenty_kills_under_load(offline: LLM) -> None:
    killed_under_load(offline, 20, seed=2)


def test_a_request_that_kills_is_given_up(offline: LLM) -> None:
    async def test(client: EngineClient) -> None:
        generation = await client.generate("a", SamplingParams(max_tokens=1900, ignore_eos=True))
        result = asyncio.ensure_future(generation.result())
        for _ in range(2):
            while client.state is not EngineState.READY or not client.stats.running:
                await asyncio.sleep(0.01)
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            while client.state is EngineState.READY:
                await asyncio.sleep(0.001)
            client.stats.running = 0
        with pytest.raises(EngineDeadError, match="2 engines died with this request"):
            await result

    play(test, max_attempts=2)


def test_the_child_ends_with_its_parent() -> None:
    async def start() -> int:
        client = EngineClient(EngineConfig(**SMALL))
        await client.start()
        pid = client.pid
        assert pid is not None
        await client.generate("a", SamplingParams(max_tokens=1900, ignore_eos=True))
        assert client._writer is not None
        client._supervisor and client._supervisor.cancel()  # as if this process were gone: its socket closes
        client._writer.transport.abort()
        ends_s = time.monotonic() + 10
        child = client._child
        assert child is not None
        while child.poll() is None and time.monotonic() < ends_s:
            await asyncio.sleep(0.02)
        assert child.poll() is not None, "an orphan"
        return pid

    assert asyncio.run(start())


def test_a_hung_engine_is_replaced() -> None:
    async def test(client: EngineClient) -> None:
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="did not answer"):
            await client.check(0.2)
        output = await (await client.generate("a", SamplingParams(max_tokens=3))).result()
        assert len(output.outputs[0].token_ids) == 3
        assert client.pid != pid

    play(test, step_timeout_s=0.8)
