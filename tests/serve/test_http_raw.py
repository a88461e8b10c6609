"""Raw bytes against a live server: whatever comes, a 4xx goes back, and the server is healthy behind it."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
from live import Live, read_all

OK = b'{"prompt": "a", "max_tokens": 1}'


def post(
    body: bytes, path: str = "/v1/completions", *headers: bytes, length: int | None = None, keep: bool = False
) -> bytes:
    lines = [
        b"POST " + path.encode() + b" HTTP/1.1",
        b"host: here",
        b"content-type: application/json",
        b"content-length: %d" % (len(body) if length is None else length),
        *headers,
        *([] if keep else [b"connection: close"]),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return int(answer.split(b" ", 2)[1])


def body(answer: bytes) -> dict[str, dict[str, object]]:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


@pytest.fixture(autouse=True)
def healthy_after(server: Live) -> Iterator[None]:
    yield
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
        assert answer.status == 200
    assert server.process.poll() is None


BODIES = {
    "empty": b"",
    "no json": b"hello",
    "cut": b'{"prompt": "a"',
    "no object": b"[1, 2]",
    "a number": b"7",
    "wrong types": b'{"prompt": {"a": 1}}',
    "mixed prompt": b'{"prompt": [1, "a"]}',
    "bool tokens": b'{"prompt": [true]}',
    "negative tokens": b'{"prompt": [-5]}',
    "huge tokens": b'{"prompt": [' + b"9" * 40 + b"]}",
    "huge number": b'{"prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}",
    "huge seed": b'{"prompt": "a", "seed": ' + b"9" * 30 + b"}",
    "huge float": b'{"prompt": "a", "temperature": 1e400}',
    "huge priority": b'{"prompt": "a", "priority": 1' + b"0" * 300 + b"}",
    "huge deadline": b'{"prompt": "a", "deadline_s": -1e308}',
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "top_p": -Infinity}',
    "duplicate keys": b'{"prompt": "a", "prompt": "b"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "invalid utf-8": b'{"prompt": "\xc3\x28"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "deep lists": b"[" * 50_000,
    "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "deep schema": b'{"prompt": "a", "json_schema": ' + b'{"items":' * 500 + b"{}" + b"}" * 501,
    "null byte": b'{"prompt": "a", "stop": "\x00"}',
    "unknown field": b'{"prompt": "a", "temprature": 1}',
    "huge n": b'{"prompt": "a", "n": 1000000}',
    "bad regex": b'{"prompt": "a", "regex": "(((("}',
    "bad grammar": b'{"prompt": "a", "grammar": "root ::= nothing"}',
    "bad bias": b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
    "empty stop": b'{"prompt": "a", "stop": ""}',
    "unknown adapter": b'{"prompt": "a", "adapter": "x"}',
    "unknown decoder": b'{"prompt": "a", "decoder": "x"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_mean_nothing(server: Live, name: str) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/generate"):
        answer = server.raw(post(BODIES[name], path))
        assert status(answer) == 400, (path, answer[:300])
        assert body(answer)["error"]["message"]


@pytest.mark.parametrize("path", ["/score", "/tokenize", "/detokenize", "/abort"])
@pytest.mark.parametrize("name", ["empty", "no json", "no object", "deep lists", "lone surrogate", "unknown field"])
def test_the_other_routes_too(server: Live, path: str, name: str) -> None:
    assert status(server.raw(post(BODIES[name], path))) == 400


def test_what_is_no_http(server: Live) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00" * 100):
        assert status(server.raw(data)) == 400


def test_headers_that_are_too_long(server: Live) -> None:
    one = b"GET /ready HTTP/1.1\r\nhost: here\r\nx: " + b"a" * 100_000 + b"\r\n\r\n"
    many = b"GET /ready HTTP/1.1\r\nhost: here\r\n" + b"".join(b"x-%d: aaaaaaaa\r\n" % i for i in range(20_000))
    address = b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: here\r\n\r\n"
    for data in (one, many, address):
        answer = server.raw(data)
        assert status(answer) in (400, 414, 431), answer[:100]


def test_bodies_that_are_too_large(server: Live) -> None:
    large = b'{"prompt": "' + b"a" * 2**21 + b'"}'
    assert status(server.raw(post(large))) == 413
    head = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = [b"10000\r\n" + b"a" * 0x10000 + b"\r\n"] * 40
    assert status(server.raw(head, *chunks)) == 413, "a body without a length is counted too"


def test_senders_that_are_too_slow(server: Live) -> None:
    """The server has 0.6 s of patience for heads and for bodies."""
    began_s = time.monotonic()
    assert status(server.raw(post(b'{"prompt"', length=500))) == 408
    assert status(server.raw(b"POST /v1/completions HTTP/1.1\r\nhost: he")) == 408
    assert status(server.raw(b"")) == 408
    assert time.monotonic() - began_s < 8
    trickle = [b"POST /v1/completions HTTP/1.1\r\n", *[b"x-%d: a\r\n" % i for i in range(5)]]
    assert status(server.raw(*trickle, pause_s=0.25)) == 408


def test_pipelined_requests_and_garbage(server: Live) -> None:
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(post(OK, keep=True) + post(OK))
        assert read_all(connection, 10).count(b"HTTP/1.1 200") == 2
    answer = server.raw(post(OK, keep=True) + b"garbage that is no request\r\n\r\n" + b"\xff" * 1000)
    assert b"HTTP/1.1 400" in answer
    assert b" 500 " not in answer


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"GET /nothing HTTP/1.1\r\nhost: here\r\n\r\n", 404),
        (b"GET /v1/completions HTTP/1.1\r\nhost: here\r\n\r\n", 405),
        (b"DELETE /health HTTP/1.1\r\nhost: here\r\n\r\n", 405),
        (b"GET /v1/models/%ff%00 HTTP/1.1\r\nhost: here\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\nhost: here\r\n\r\n", 404),
        (
            b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\n{}",
            415,
        ),
        (b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: here\r\nx-request-id: a\x00b\r\n\r\n", 400),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else None,
)
def test_requests_that_fit_no_route(server: Live, head: bytes, expected: int) -> None:
    assert status(server.raw(head)) == expected


def test_an_idle_connection_is_left_alone(server: Live) -> None:
    """Patience for heads is for heads that have begun."""
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(post(OK, keep=True))
            answer = read_all(connection, 10)
            assert status(answer) == 200
            assert answer.count(b"HTTP/1.1") == 1
            time.sleep(0.8)


def test_a_good_request_as_raw_bytes(server: Live) -> None:
    answer = server.raw(post(OK, "/v1/completions", b"x-request-id: mine"))
    assert status(answer) == 200
    assert b"x-request-id: mine" in answer
    assert status(server.raw(post(OK, "/v1/completions", b"x-request-id: " + b"a" * 200))) == 400
