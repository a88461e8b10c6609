"""Parts of the server without a server: options, keys, pace, spans, histograms."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as read_families

from headrace.errors import ConfigError
from headrace.serve.metrics import Collector, Histogram, Metrics
from headrace.serve.pace import Pace
from headrace.serve.settings import ServeConfig
from headrace.serve.tracing import Tracer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"host": ""}, "host"),
        ({"tool_format": "x"}, "known: hermes"),
        ({"cors_origin": "a.example"}, "https://"),
        ({"cors_origin": "https://a.example/path"}, "origins"),
        ({"drain_s": -1}, "drain_s"),
        ({"prot": 1}, "did you mean 'port'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_options_that_cannot_work(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("c\n\nd\n")
    settings = ServeConfig(api_key="a,b", api_key_file=str(file))
    assert settings.keys({"HEADRACE_API_KEY": "e"}) == [b"a", b"b", b"e", b"c", b"d"]
    assert ServeConfig().keys({}) == []
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no key"):
        settings.keys({})
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeConfig(api_key_file=str(tmp_path / "none")).keys({})
    with pytest.raises(ConfigError, match="api_key is empty"):
        ServeConfig(api_key="").keys({})


def test_loopback_is_known() -> None:
    assert ServeConfig().is_local
    assert ServeConfig(host="127.1.2.3").is_local
    assert not ServeConfig(host="0.0.0.0").is_local


def test_streams_send_together() -> None:
    """Ten streams at 100 chunks a second: each sends ten times a second, all at the same moments."""

    async def play() -> tuple[float, int]:
        pace = Pace(100.0)
        pace.n_streams = 10
        moments: set[float] = set()

        async def stream() -> None:
            for _ in range(3):
                await pace.pause()
                moments.add(pace._last_s)

        began_s = time.monotonic()
        await asyncio.gather(*(stream() for _ in range(10)))
        return time.monotonic() - began_s, len(moments)

    seconds, moments = asyncio.run(play())
    assert moments == 3
    assert 0.19 < seconds < 1.0


def test_no_pace_waits_for_nobody() -> None:
    pace = Pace(0.0)
    pace.n_streams = 100
    asyncio.run(asyncio.wait_for(pace.pause(), 1.0))


def test_a_stream_that_leaves_while_it_waits() -> None:
    async def play() -> None:
        pace = Pace(100.0)
        pace.n_streams = 10
        left = asyncio.ensure_future(pace.pause())
        stays = asyncio.ensure_future(pace.pause())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait_for(stays, 2.0)

    asyncio.run(play())


def test_histograms_add_up() -> None:
    histogram = Histogram((1, 10))
    histogram.observe(1)
    histogram.observe(5, 3)
    histogram.observe(50)
    samples = {s.labels.get("le", s.name): s.value for s in histogram.family("a", "b", "m").samples}
    assert (samples["1.0"], samples["10.0"], samples["+Inf"]) == (1, 4, 5)
    assert samples["a_sum"] == 66


def test_a_scrape_before_there_is_an_engine() -> None:
    numbers = {"model": "", "running": 0, "waiting": 0, "pages_in_use": 0, "pages_total": 0, "leaked": 0}
    text = Collector(Metrics(), lambda: {**numbers, "restarts": 0, "ready": False}).text().decode()
    families = {family.name: family for family in read_families(text)}
    assert families["headrace:ready"].samples[0].value == 0
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == 0


def test_spans_have_the_attributes_of_the_conventions() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracer = Tracer(None, exporter=exporter)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    tracer.begin("chat", {"traceparent": parent}).end({"gen_ai.request.model": "m", "gen_ai.request.top_k": None})
    tracer.begin("chat", {}).end({}, ValueError("bad"))
    tracer.shutdown()
    good, bad = exporter.get_finished_spans()
    assert good.attributes is not None
    assert dict(good.attributes) == {"gen_ai.request.model": "m"}
    assert good.context is not None
    assert f"{good.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert not bad.status.is_ok


def test_nothing_is_imported_for_spans_that_are_off() -> None:
    code = (
        "import sys; from headrace.serve.tracing import Tracer; Tracer(None).begin('a', {}).end({}); "
        "assert not any(name.startswith('opentelemetry') for name in sys.modules); "
        "import headrace.serve.app, headrace.commands.serve; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).resolve().parents[2])


def test_a_missing_library_is_named() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from headrace.cli import main; sys.exit(main(['serve']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "headrace: headrace serve needs uvicorn: pip install 'headrace[serve]'"


def test_a_signal_while_it_loads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.cli", "serve", "--port", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stderr is not None
    assert "loading" in process.stderr.readline()
    process.terminate()
    assert process.wait(30) == 0
    out, errors = process.communicate()
    assert not out
    assert "Traceback" not in errors


def test_the_command_refuses_in_a_sentence() -> None:
    def said(*options: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "headrace.cli", "serve", *options],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert done.returncode == 2, done.stderr
        return done.stderr.splitlines()[-1]

    assert "port is 99999" in said("--port", "99999")
    assert "cannot be read" in said("--api-key-file", "/nowhere/keys")
    assert "/nowhere" in said("/nowhere")
    assert "choose another host or port" in said("--host", "192.0.2.1")
    assert "cannot be read" in said("--chat-template", "/nowhere/t")
