"""What Prometheus scrapes: the names that dashboards for vLLM know, and `headrace:` for what others do not have.

Everything about the engine is read from its newest stats when somebody scrapes. Histograms are plain lists, because
they are fed for every chunk of every stream.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, model: str) -> Metric:
        """As Prometheus reads it."""
        made = HistogramMetricFamily(name, text, labels=["model_name"])
        buckets, below = [], 0
        for bound, count in zip([*map(float, self._bounds), float("inf")], self._counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
        made.add_metric([model], buckets, self._sum)
        return made


class Metrics:
    """What the HTTP process counts. `model`: the label of everything."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        """Answers without a result, by status."""
        self.disconnects = 0
        self.stalls = 0
        self.ttft_s = Histogram(SECONDS)
        self.token_s = Histogram(SECONDS)
        self.itl_s = Histogram(SECONDS)
        self.e2e_s = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.output_tokens = Histogram(TOKENS)
        self.began_s = time.monotonic()

    def saw_first(self, seconds: float) -> None:
        """A request's first token came."""
        self.ttft_s.observe(seconds)

    def saw_end(self, reasons: Iterable[str | None], prompt_tokens: int, output_tokens: int, seconds: float) -> None:
        """A request has ended."""
        for reason in reasons:
            self.finished[reason or "abort"] += 1
        self.prompt_tokens.observe(prompt_tokens)
        self.output_tokens.observe(output_tokens)
        self.e2e_s.observe(seconds)


COUNTERS = {
    "vllm:prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "vllm:generation_tokens": ("output_tokens", "Tokens that were generated"),
    "vllm:num_preemptions": ("preemptions", "Requests that gave their cache away"),
    "vllm:prefix_cache_queries": ("prefix_queries", "Tokens of prompts that were looked up in the prefix cache"),
    "vllm:prefix_cache_hits": ("prefix_hits", "Tokens of prompts that were found there"),
    "headrace:steps": ("steps", "Steps of the engine"),
    "headrace:swaps": ("swaps", "Requests whose cache was copied to host memory"),
    "headrace:timeouts": ("timeouts", "Samples that met their deadline"),
    "headrace:aborts": ("aborts", "Samples that were aborted"),
}
"""Name to the entry of the stats."""


class Collector:
    """Makes the families of one scrape. `read` gives the numbers of the engine by name, see `Service.numbers`."""

    def __init__(self, metrics: Metrics, read: Any) -> None:
        self._metrics = metrics
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names must not be asked for before there is an engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families."""
        numbers: dict[str, Any] = self._read()
        model = str(numbers["model"])

        def gauge(name: str, text: str, value: float) -> Metric:
            made = GaugeMetricFamily(name, text, labels=["model_name"])
            made.add_metric([model], float(value))
            return made

        def counter(name: str, text: str, values: Mapping[str, float], label: str | None = None) -> Metric:
            made = CounterMetricFamily(name, text, labels=["model_name", *([label] if label else [])])
            for key, value in values.items():
                made.add_metric([model, *([key] if label else [])], float(value))
            return made

        used, total = numbers["pages_in_use"], numbers["pages_total"]
        share = used / total if total else 0.0
        yield gauge("vllm:num_requests_running", "Requests that hold cache", numbers["running"])
        yield gauge("vllm:num_requests_waiting", "Requests that wait", numbers["waiting"])
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages in use, 1 for all", share)
        yield gauge("vllm:gpu_cache_usage_perc", "The same under its older name", share)
        yield gauge("headrace:pages_in_use", "Pages of the cache that requests hold", used)
        yield gauge("headrace:pages", "Pages of the cache", total)
        yield gauge("headrace:pages_leaked", "Pages held while nothing runs; always 0", numbers["leaked"])
        yield gauge("headrace:ready", "1 if requests are served", numbers["ready"])
        yield gauge("headrace:uptime_seconds", "Since the server began", time.monotonic() - self._metrics.began_s)
        for name, (entry, text) in COUNTERS.items():
            if entry in numbers:
                yield counter(name, text, {"": numbers[entry]})
        yield counter("headrace:engine_restarts", "Engines that had to be replaced", {"": numbers["restarts"]})
        metrics = self._metrics
        reasons = {"stop": 0, "length": 0, "abort": 0, "timeout": 0, "error": 0} | metrics.finished
        yield counter("vllm:request_success", "Samples that ended, by reason", reasons, "finished_reason")
        yield counter("headrace:requests_refused", "Answers with an error, by status", dict(metrics.refused), "status")
        yield counter("headrace:disconnects", "Clients that left before the end", {"": metrics.disconnects})
        yield counter("headrace:stalls", "Streams cut because nobody read them", {"": metrics.stalls})
        yield metrics.ttft_s.family("vllm:time_to_first_token_seconds", "Until the first token", model)
        yield metrics.token_s.family(
            "vllm:request_time_per_output_token_seconds", "Mean of a request, behind its first token", model
        )
        yield metrics.token_s.family("vllm:time_per_output_token_seconds", "The same under its older name", model)
        yield metrics.itl_s.family("vllm:inter_token_latency_seconds", "Between tokens of a stream", model)
        yield metrics.e2e_s.family("vllm:e2e_request_latency_seconds", "From arrival to end", model)
        yield metrics.prompt_tokens.family("vllm:request_prompt_tokens", "Tokens of a prompt", model)
        yield metrics.output_tokens.family("vllm:request_generation_tokens", "Tokens of an output", model)
