"""One OpenTelemetry span a request, with the attributes of the conventions for generative models.

Nothing is imported unless an endpoint is named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from headrace.errors import ConfigError


class Span(Protocol):
    """A request as a span."""

    def end(self, attributes: Mapping[str, Any], error: BaseException | None = None) -> None:
        """The request has ended."""


class _NoSpan:
    def end(self, attributes: Mapping[str, Any], error: BaseException | None = None) -> None:
        """Nothing."""


_NONE = _NoSpan()


class Tracer:
    """Begins spans. `endpoint`: the address of a collector for OTLP over HTTP; None and no variable: no spans.

    Raises ConfigError if OpenTelemetry is not installed.
    """

    def __init__(self, endpoint: str | None, *, exporter: Any = None) -> None:
        endpoint = endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry import propagate
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"spans for {endpoint} need OpenTelemetry ({error.name} is missing): pip install 'headrace[tracing]', "
                "or leave out otel_endpoint"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "headrace"}))
        if exporter is None:
            address = str(endpoint).rstrip("/")
            address += "" if address.endswith("/v1/traces") else "/v1/traces"
            self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
        else:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headrace")
        self._extract = propagate.extract

    def begin(self, name: str, headers: Mapping[str, str]) -> Span:
        """A request has come; a `traceparent` header makes the span a part of the caller's trace."""
        if self._tracer is None:
            return _NONE
        from opentelemetry.trace import SpanKind

        context = self._extract(dict(headers))
        return _OneSpan(self._tracer.start_span(name, context=context, kind=SpanKind.SERVER))

    def shutdown(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


class _OneSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, attributes: Mapping[str, Any], error: BaseException | None = None) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if error is not None:
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()
