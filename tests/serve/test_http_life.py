"""Load and failure over HTTP: who leaves, who waits, who has no key, and what happens when engine or server end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from live import Live, serve

from headrace import LLM, SamplingParams

MODEL = "headrace-py-16m"
LONG = {"prompt": "def a():\n", "max_tokens": 1800, "ignore_eos": True, "seed": 1}
KEY, OTHER_KEY = "first-key", "second-key"
AUTH = {"authorization": f"Bearer {KEY}"}
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """With keys, CORS and a short queue."""
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{OTHER_KEY}\n")
    options = ("--api-key-file", str(keys), "--cors-origin", "https://a.example", "--max-queue", "4")
    names = ("--served-model-name", "small,tiny")
    with serve(*options, *names, environment={"HEADRACE_API_KEY": KEY}) as live:
        yield live


def play(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


def session(live: Live) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(live.url, headers=AUTH)


async def stats(http: aiohttp.ClientSession) -> dict[str, Any]:
    async with http.get("/stats") as answer:
        return await answer.json()


async def wait_until(http: aiohttp.ClientSession, what: Any) -> dict[str, Any]:
    """Poll the stats until they are so."""
    for _ in range(400):
        found = await stats(http)
        if what(found):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(found)


def idle(found: dict[str, Any]) -> bool:
    engine = found["engine"]
    return found["in_flight"] == 0 and engine["running"] == 0 and engine["waiting"] == 0


def test_keys(guarded: Live) -> None:
    async def play_it() -> None:
        async with aiohttp.ClientSession(guarded.url) as http:
            for path in ("/health", "/ready", "/metrics"):
                async with http.get(path) as answer:
                    assert answer.status == 200, path
            for path in ("/v1/models", "/stats", "/openapi.json"):
                for sent in ({}, {"authorization": "Bearer no"}, {"authorization": f"Basic {KEY}"}):
                    async with http.get(path, headers=sent) as answer:
                        assert answer.status == 401, path
                        assert (await answer.json())["error"]["code"] == "invalid_api_key"
                for key in (KEY, OTHER_KEY):
                    async with http.get(path, headers={"authorization": f"Bearer {key}"}) as answer:
                        assert answer.status == 200, path

    play(play_it())
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0).models.list()
    names = [one.id for one in openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY).models.list()]
    assert names == ["small", "tiny"]


def test_cors_is_for_the_named_origin(guarded: Live) -> None:
    async def play_it() -> None:
        async with session(guarded) as http:
            for origin, expected in (("https://a.example", "https://a.example"), ("https://b.example", None)):
                sent = {"origin": origin, "access-control-request-method": "POST"}
                async with http.options("/v1/completions", headers=sent) as answer:
                    assert answer.headers.get("access-control-allow-origin") == expected
                async with http.get("/v1/models", headers={"origin": origin}) as answer:
                    assert answer.headers.get("access-control-allow-origin") == expected

    play(play_it())


def test_cors_is_off_by_default(server: Live) -> None:
    async def play_it() -> None:
        sent = {"origin": "https://a.example"}
        async with aiohttp.ClientSession(server.url) as http, http.get("/v1/models", headers=sent) as answer:
            assert "access-control-allow-origin" not in answer.headers

    play(play_it())


def test_a_full_queue_says_when_to_come_again(guarded: Live) -> None:
    async def play_it() -> None:
        async with session(guarded) as http:
            streams = []
            for _ in range(4):
                answer = await http.post("/v1/completions", json={**LONG, "stream": True})
                assert answer.status == 200
                await answer.content.readline()
                streams.append(answer)
            for asked in ({**LONG}, {**LONG, "stream": True}, {**LONG, "prompt": ["a", "b"]}):
                async with http.post("/v1/completions", json=asked) as refused:
                    assert refused.status == 429
                    assert 1 <= int(refused.headers["retry-after"]) <= 60
                    assert (await refused.json())["error"]["type"] == "rate_limit_error"
            for answer in streams:
                answer.close()
            found = await wait_until(http, idle)
            assert found["engine"]["leaked"] == 0
            async with http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}) as answer:
                assert answer.status == 200, "there is room again"

    play(play_it())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_is_aborted(server: Live, stream: bool) -> None:
    async def play_it() -> None:
        async with aiohttp.ClientSession(server.url) as http:
            before = await wait_until(http, idle)
            asking = asyncio.ensure_future(http.post("/v1/completions", json={**LONG, "stream": stream}))
            await wait_until(http, lambda found: found["engine"]["running"] == 1)
            if stream:
                (await asking).close()
            else:
                asking.cancel()
            found = await wait_until(http, idle)
            assert found["engine"]["aborts"] == before["engine"]["aborts"] + 1
            assert found["disconnects"] == before["disconnects"] + 1
            assert found["engine"]["output_tokens"] - before["engine"]["output_tokens"] < LONG["max_tokens"]
            assert found["engine"]["leaked"] == 0

    play(play_it())


def test_a_slow_reader_holds_nobody(server: Live) -> None:
    """It takes nothing while others are served, and then gets everything."""
    fast = {"prompt": "def b():\n", "max_tokens": 20, "seed": 3}
    asked = json.dumps({**LONG, "stream": True, "logprobs": 20, "max_tokens": 700}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {len(asked)}\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((server.host, server.port))
        slow.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + asked)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
        texts = {client.completions.create(model=MODEL, **fast).choices[0].text for _ in range(5)}  # type: ignore[call-overload]
        assert len(texts) == 1
        slow.settimeout(PATIENCE_S)
        data = b""
        while part := slow.recv(65536):
            data += part
    assert b"data: [DONE]" in data
    assert b'"finish_reason":"length"' in data


def test_who_never_reads_is_cut() -> None:
    """Its tokens fill the buffers; then it has half a second."""
    asked = json.dumps({**LONG, "stream": True, "n": 24, "logprobs": 50, "max_tokens": 600}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(asked)}\r\n"

    async def play_it(live: Live) -> None:
        async with aiohttp.ClientSession(live.url) as http:
            with socket.socket() as stuck:
                stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                stuck.connect((live.host, live.port))
                stuck.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + asked)
                await wait_until(http, lambda found: found["engine"]["running"] > 0)
                found = await wait_until(http, idle)
                assert found["engine"]["aborts"] > 0
                assert found["engine"]["leaked"] == 0
            async with http.get("/metrics") as answer:
                assert 'headrace:stalls_total{model_name="headrace-py-16m"} 1.0' in await answer.text()

    with serve("--stall-timeout-s", "0.5") as live:
        play(play_it(live))


def test_abort_by_id(server: Live) -> None:
    async def play_it() -> None:
        async with aiohttp.ClientSession(server.url) as http:
            sent = {"x-request-id": "mine"}
            asking = asyncio.ensure_future(http.post("/v1/completions", json=LONG, headers=sent))
            await wait_until(http, lambda found: found["engine"]["running"] == 1)
            async with http.post("/abort", json={"request_id": "mine"}) as answer:
                assert (await answer.json())["aborted"] == 1
            body = await (await asking).json()
            assert body["choices"][0]["finish_reason"] == "abort"
            assert 0 < body["usage"]["completion_tokens"] < LONG["max_tokens"]
            async with http.post("/abort", json={"request_id": "mine"}) as answer:
                assert (await answer.json())["aborted"] == 0

    play(play_it())


def test_native_routes(server: Live, offline: LLM) -> None:
    params = SamplingParams(max_tokens=6, seed=8, logprobs=1, prompt_logprobs=0, n=2)
    ids = offline.front.encode("def fib(n):")[0]
    expected = offline.generate([ids], params)[0]
    asked = {"prompt_token_ids": ids, "max_tokens": 6, "seed": 8, "logprobs": 1, "n": 2}

    async def play_it() -> None:
        async with aiohttp.ClientSession(server.url) as http:
            async with http.post("/generate", json={**asked, "prompt_logprobs": 0}) as answer:
                body = await answer.json()
            assert [one["token_ids"] for one in body["outputs"]] == [one.token_ids for one in expected.outputs]
            assert [one["text"] for one in body["outputs"]] == [one.text for one in expected.outputs]
            assert body["seed"] == 8
            assert body["prompt_logprobs"][0] is None
            assert len(body["prompt_logprobs"]) == len(ids)
            async with http.post("/generate", json={**asked, "stream": True}) as answer:
                events = [json.loads(line[6:]) for line in (await answer.text()).split("\n\n") if "{" in line]
            for one in expected.outputs:
                mine = [event for event in events if event.get("index") == one.index]
                assert [token for event in mine for token in event["token_ids"]] == one.token_ids
            sent = {"accept": "application/x-ndjson"}
            async with http.post("/generate", json={**asked, "stream": True}, headers=sent) as answer:
                lines = [json.loads(line) for line in (await answer.text()).splitlines()]
            assert [line for line in lines if "index" in line][-1]["finish_reason"] == "length"
            score = offline.score(["def fib"], ["(n):"])[0]
            async with http.post("/score", json={"prompt": "def fib", "continuation": "(n):"}) as answer:
                body = await answer.json()
            assert body["token_ids"] == score.token_ids
            assert body["total"] == pytest.approx(score.total, abs=1e-3)
            async with http.post("/tokenize", json={"prompt": "def fib(n):"}) as answer:
                assert (await answer.json())["tokens"] == ids
            async with http.post("/tokenize", json={"prompt": "a", "model": "other"}) as answer:
                assert answer.status == 404
            async with http.post("/detokenize", json={"tokens": ids}) as answer:
                assert (await answer.json())["prompt"] == "def fib(n):"

    play(play_it())


def test_metrics_that_dashboards_know(server: Live) -> None:
    from prometheus_client.parser import text_string_to_metric_families as read

    async def play_it() -> None:
        async with aiohttp.ClientSession(server.url) as http:
            async with http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5, "stream": True}) as answer:
                await answer.read()
            found = await wait_until(http, idle)
            async with http.get("/metrics") as answer:
                text = await answer.text()
        families = {family.name: family for family in read(text)}
        for name in (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:prompt_tokens",
            "vllm:generation_tokens",
            "vllm:request_success",
            "vllm:time_to_first_token_seconds",
            "vllm:inter_token_latency_seconds",
            "vllm:e2e_request_latency_seconds",
            "vllm:request_prompt_tokens",
            "vllm:request_generation_tokens",
            "vllm:num_preemptions",
            "vllm:prefix_cache_queries",
            "vllm:prefix_cache_hits",
            "headrace:pages_in_use",
            "headrace:engine_restarts",
        ):
            assert name in families, name
            assert all(sample.labels["model_name"] == MODEL for sample in families[name].samples)
        assert families["headrace:pages_leaked"].samples[0].value == 0
        tokens = {sample.name: sample.value for sample in families["vllm:generation_tokens"].samples}
        assert tokens["vllm:generation_tokens_total"] == found["engine"]["output_tokens"] > 0

    play(play_it())


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def test_the_engine_is_killed(offline: LLM) -> None:
    """What had streamed nothing gets its answer from the next engine; a stream ends with an error; health tells."""
    asked = {"prompt": "def c():\n", "max_tokens": 300, "seed": 11, "ignore_eos": True}
    expected = offline.generate(["def c():\n"], SamplingParams(max_tokens=300, seed=11, ignore_eos=True))[0]

    async def play_it(live: Live) -> None:
        async with aiohttp.ClientSession(live.url) as http:
            whole = asyncio.ensure_future(http.post("/v1/completions", json=asked))
            stream = await http.post("/v1/completions", json={**asked, "stream": True})
            await stream.content.readline()
            os.kill(child_of(live.process.pid), signal.SIGKILL)
            rest = await stream.text()
            assert "the engine failed" in rest
            assert "service_unavailable_error" in rest
            async with http.get("/ready") as answer:
                assert answer.status == 503
            async with http.get("/health") as answer:
                assert answer.status == 503
            body = await (await whole).json()
            assert body["choices"][0]["text"] == expected.outputs[0].text
            found = await wait_until(http, idle)
            assert found["engine"]["restarts"] == 1
            assert found["engine"]["leaked"] == 0
            async with http.get("/health") as answer:
                assert answer.status == 200

    with serve() as live:
        play(play_it(live))


def test_a_drain_lets_the_last_ones_end() -> None:
    with serve("--drain-s", "30") as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60)
        texts: list[str] = []
        reasons: list[str | None] = []
        begun = threading.Event()

        def read() -> None:
            asked: dict[str, Any] = {"prompt": "def d():\n", "max_tokens": 200, "extra_body": {"ignore_eos": True}}
            for chunk in client.completions.create(model=MODEL, stream=True, **asked):
                texts.append(chunk.choices[0].text)
                reasons.append(chunk.choices[0].finish_reason)
                begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(PATIENCE_S)
        live.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="a")
        assert caught.value.status_code == 503
        assert "retry-after" in caught.value.response.headers
        reader.join(PATIENCE_S)
        assert reasons[-1] == "length"
        assert live.process.wait(PATIENCE_S) == 0


def test_a_drain_has_an_end() -> None:
    """What is not done by then is aborted, and a second signal does not wait at all."""
    for options, second, expected in ((("--drain-s", "0.3"), False, 0), (("--drain-s", "60"), True, 1)):
        with serve(*options) as live:
            answers: list[bytes] = []
            asked = json.dumps({**LONG, "stream": True, "n": 64}).encode()
            data = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            data += b"content-length: %d\r\n\r\n" % len(asked) + asked
            with socket.create_connection((live.host, live.port), timeout=PATIENCE_S) as connection:
                connection.sendall(data)
                answers.append(connection.recv(100))
                began_s = time.monotonic()
                live.process.send_signal(signal.SIGTERM)
                if second:
                    time.sleep(0.5)
                    live.process.send_signal(signal.SIGINT)
                assert live.process.wait(PATIENCE_S) == expected
                assert time.monotonic() - began_s < 20
