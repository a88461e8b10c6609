"""Many clients of all kinds on one server: good ones get what the model gives offline, books balance, memory stays."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from live import Live, serve

from headrace import LLM, SamplingParams

WORDS = ["def ", "class ", "import ", "return ", "x = ", "for i in ", "n", "(a, b):\n", "    ", "0", " + "]
CLIENTS = 48
GROWTH = 1.15
"""Memory at the end against that after a third of the requests."""


def memory_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def soak(offline: LLM, count: int, seed: int) -> Counter[str]:
    """`count` requests: 10 % leave, 5 % are bad, 5 % have deadlines, the rest is read whole or as a stream."""
    rng = random.Random(seed)
    fates = rng.choices(["good", "leaves", "bad", "late"], [80, 10, 5, 5], k=count)
    prompts = ["".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]
    params = [SamplingParams(max_tokens=rng.randint(1, 12), seed=place) for place in range(count)]
    good = [place for place in range(count) if fates[place] == "good"]
    outputs = offline.generate([prompts[place] for place in good], [params[place] for place in good])
    expected = {place: output.outputs[0].text for place, output in zip(good, outputs, strict=True)}
    seen: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []

    async def one(http: aiohttp.ClientSession, place: int) -> None:
        fate, stream = fates[place], place % 2 == 0
        asked: dict[str, Any] = {"prompt": prompts[place], "max_tokens": params[place].max_tokens, "seed": place}
        if fate == "bad":
            asked |= rng.choice([{"temperature": -1}, {"nonsense": 1}, {"prompt": [10**7]}, {"n": 0}])
        if fate in ("leaves", "late"):
            asked |= {"max_tokens": 400, "ignore_eos": True}
        if fate == "late":
            asked |= {"deadline_s": rng.random() * 0.05}
        try:
            async with http.post("/v1/completions", json={**asked, "stream": stream}) as answer:
                if fate == "leaves":
                    if stream:
                        await asyncio.wait_for(answer.content.readline(), rng.random() * 0.3)
                    answer.close()
                    seen["left"] += 1
                    return
                if fate == "bad":
                    seen["refused" if answer.status == 400 else f"odd: {answer.status}"] += 1
                    await answer.read()
                    return
                body = await answer.text()
        except TimeoutError:
            seen["left"] += 1
            return
        text, reason = read_stream(body) if stream else read_whole(body)
        if fate == "late":
            seen["timeout" if reason == "timeout" else f"odd: {reason}"] += 1
        else:
            seen["good" if text == expected[place] else "wrong"] += 1

    async def play(live: Live) -> None:
        places = iter(range(count))
        child = int(Path(f"/proc/{live.process.pid}/task/{live.process.pid}/children").read_text().split()[0])

        async def client(http: aiohttp.ClientSession) -> None:
            for place in places:
                leaving = fates[place] == "leaves" and place % 2
                if leaving:  # leaves before there is any answer
                    task = asyncio.ensure_future(one(http, place))
                    await asyncio.wait([task], timeout=rng.random() * 0.1)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    seen["left"] += 1
                else:
                    await one(http, place)
                if place in (count // 3, count - 1):
                    sizes.append((memory_kib(live.process.pid), memory_kib(child)))

        connector = aiohttp.TCPConnector(limit=0)
        limit = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(live.url, connector=connector, timeout=limit) as http:
            await asyncio.gather(*(client(http) for _ in range(CLIENTS)))
            for _ in range(200):
                async with http.get("/stats") as answer:
                    found = await answer.json()
                if not (found["in_flight"] or found["engine"]["running"] or found["engine"]["pages_in_use"]):
                    break
                await asyncio.sleep(0.05)
            engine = found["engine"]
            assert (found["in_flight"], engine["running"], engine["waiting"]) == (0, 0, 0)
            assert (engine["pages_in_use"], engine["leaked"], engine["restarts"]) == (0, 0, 0)
            async with http.get("/health") as answer:  # audits the books of an idle engine
                assert answer.status == 200

    with serve() as live:
        asyncio.run(asyncio.wait_for(play(live), 1200))
    print(dict(seen), sizes)
    assert not seen["wrong"], seen
    assert not [name for name in seen if name.startswith("odd")], seen
    assert seen["good"] == len(good)
    assert seen["left"] >= fates.count("leaves")
    assert seen["refused"] == fates.count("bad")
    assert all(seen[name] for name in ("good", "left", "refused", "timeout"))
    if count > 5000:
        (http_before, engine_before), (http_after, engine_after) = sizes[0], sizes[-1]
        assert http_after < GROWTH * http_before, sizes
        assert engine_after < GROWTH * engine_before, sizes
    return seen


def read_whole(body: str) -> tuple[str, str | None]:
    choice = json.loads(body)["choices"][0]
    return choice["text"], choice["finish_reason"]


def read_stream(body: str) -> tuple[str, str | None]:
    text, reason = "", None
    for event in body.split("\n\n"):
        if event.startswith("data: {"):
            choice = json.loads(event[6:])["choices"][0]
            text, reason = text + choice["text"], choice["finish_reason"]
    return text, reason


def test_clients_of_all_kinds(offline: LLM) -> None:
    soak(offline, 400, seed=1)


@pytest.mark.slow
def test_twenty_thousand_clients(offline: LLM) -> None:
    soak(offline, 20_000, seed=2)
