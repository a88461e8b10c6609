"""Options of `headrace serve` beside those of the engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from headrace.checks import names_checked, settle_types, show
from headrace.config import option
from headrace.errors import ConfigError
from headrace.text.tools import TOOL_FORMATS

KEY_VARIABLE = "HEADRACE_API_KEY"


@names_checked("option", ConfigError)
@dataclass(frozen=True)
class ServeConfig:
    """Options of the HTTP server. Raises ConfigError for values that can never work."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of IPv4, and then choose an API key")
    port: int = option(8000, "port; 0: one that is free, which the line at the start tells")
    api_key: str | None = option(
        None,
        "keys that clients may send as bearer token, separated by commas; the list of processes shows them, so rather "
        f"better set {KEY_VARIABLE} or use api_key_file",
    )
    api_key_file: str | None = option(None, "file with such keys, one a line")
    cors_origin: str | None = option(
        None, "origins of web pages that may send requests, separated by commas; *: any; if not given, none"
    )
    served_model_name: str | None = option(
        None,
        "names under which requests may ask for the model, separated by commas; if not given, that of its directory",
    )
    max_queue: int = option(1024, "most unfinished prompts, waiting and running; more are answered with 429")
    max_body_mib: float = option(16.0, "largest body of a request in MiB; larger ones are answered with 413")
    max_header_kib: int = option(64, "largest head of a request (address and headers) in KiB")
    body_timeout_s: float = option(30.0, "seconds in which a request has to arrive, its head and then its body")
    stall_timeout_s: float = option(
        120.0, "seconds that a stream waits for a reader that takes nothing; then it is cut"
    )
    health_timeout_s: float = option(10.0, "seconds that the engine has to answer /health in, between two steps")
    drain_s: float = option(30.0, "seconds that requests in flight have to end in after SIGTERM or Ctrl-C")
    stream_chunks_per_s: float = option(
        2000.0, "chunks that all streams together send in a second at most, by joining some; 0: one a step and stream"
    )
    tool_format: str | None = option(
        None, "how the model writes tool calls, a name from docs/systems.md; if not given, known by the chat template"
    )
    chat_template: str | None = option(None, "file with a chat template in Jinja, instead of the model's own")
    otel_endpoint: str | None = option(
        None, "where OpenTelemetry spans go by OTLP over HTTP; if not given, OTEL_EXPORTER_OTLP_ENDPOINT; else none"
    )
    access_log: bool = option(False, "log a line a request")

    def __post_init__(self) -> None:
        settle_types(self, ConfigError)
        for name, low, high in (
            ("port", 0, 65535),
            ("max_queue", 1, 10**6),
            ("max_body_mib", 0.001, 4096),
            ("max_header_kib", 1, 1024),
            ("body_timeout_s", 0.1, 3600),
            ("stall_timeout_s", 0.1, 86400),
            ("health_timeout_s", 0.1, 600),
            ("drain_s", 0, 86400),
            ("stream_chunks_per_s", 0, 10**7),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {show(value)}; it must be between {low} and {high}")
        if not self.host:
            raise ConfigError("host is an empty text: name an address, such as 127.0.0.1")
        if self.tool_format is not None and self.tool_format not in TOOL_FORMATS.names():
            raise ConfigError(f"tool_format is {self.tool_format!r}; known: {', '.join(TOOL_FORMATS.names())}")
        for origin in self.cors_origins:
            parts = urlsplit(origin)
            if origin != "*" and not (parts.scheme in ("http", "https") and parts.netloc and not parts.path):
                raise ConfigError(f"cors_origin has {origin!r}; write origins like https://example.org, or *")
        if self.served_model_name is not None and not _words(self.served_model_name):
            raise ConfigError("served_model_name is empty: give a name, or leave it out")

    @property
    def cors_origins(self) -> list[str]:
        """The origins one by one."""
        return _words(self.cors_origin)

    @property
    def served_names(self) -> list[str]:
        """The names one by one."""
        return _words(self.served_model_name)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def keys(self, environment: Mapping[str, str] = os.environ) -> list[bytes]:
        """All keys; none: everybody may ask. Raises ConfigError for a file that cannot be read or holds no key."""
        keys = _words(self.api_key) + _words(environment.get(KEY_VARIABLE))
        if self.api_key is not None and not _words(self.api_key):
            raise ConfigError("api_key is empty: give a key, or leave it out")
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).read_text(encoding="utf-8").split()
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"api_key_file {self.api_key_file} cannot be read ({error}): name a text file"
                ) from error
            if not lines:
                raise ConfigError(f"api_key_file {self.api_key_file} has no key: write one a line")
            keys += lines
        return [key.encode() for key in keys]


def _words(text: str | None) -> list[str]:
    return [word for part in (text or "").split(",") if (word := part.strip())]
