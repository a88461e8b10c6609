"""Registries of parts: a technique is one file plus one registration.

Each seam owns one `Registry`. A part brings its label, one sentence and its source, from which the
table in docs/systems.md is generated; conformance suites are parametrised over the same registries,
so that a new part is tested by existing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from headrace.checks import did_you_mean, show
from headrace.errors import ConfigError

Label = Literal["exact", "in_law", "lossy", "contextual"]
"""`exact`: same tokens as plain decoding; `in_law`: same distribution; `lossy`: other tokens, a function of the
request alone; `contextual`: depends on cache contents, neighbours or load."""

T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """One registered part of a seam."""

    name: str
    make: Callable[..., T]
    label: Label
    option: str
    """How a user asks for it, as in `LLM(scheduler="splitfuse")`."""
    summary: str
    source: str = ""
    """Paper (arXiv id) or other origin."""
    composes: str = "everything"
    """What it combines with, or the exceptions that are refused at start."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig` or `SamplingParams` that turn the part on, as the tests of pairs do."""


class Registry(Generic[T]):
    """The parts of one seam by name."""

    def __init__(self, seam: str, option: str) -> None:
        self.seam = seam
        self.option = option
        self._parts: dict[str, Part[T]] = {}

    def register(
        self,
        name: str,
        *,
        label: Label,
        summary: str,
        source: str = "",
        option: str = "",
        composes: str = "everything",
        example: Mapping[str, Any] | None = None,
    ) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Decorator for a class or factory. Raises ConfigError when the name is taken."""

        def add(make: Callable[..., T]) -> Callable[..., T]:
            if name in self._parts:
                raise ConfigError(f"{self.seam} {name!r} is registered twice: choose another name")
            how = option or f'{self.option}="{name}"'
            settings = {self.option: name} if example is None else example
            self._parts[name] = Part(name, make, label, how, summary, source, composes, settings)
            return make

        return add

    def __getitem__(self, name: str) -> Part[T]:
        if name not in self._parts:
            hint = did_you_mean(name, self._parts) or ";"
            raise ConfigError(
                f"{self.option}={show(name)} is not a known {self.seam}{hint} known: {', '.join(self._parts)}"
            )
        return self._parts[name]

    def __iter__(self) -> Iterator[Part[T]]:
        return iter(self._parts.values())

    def names(self) -> list[str]:
        """Names in the order of registration."""
        return list(self._parts)

    def remove(self, name: str) -> None:
        """Take a part out again (tests register parts of their own)."""
        del self._parts[name]
