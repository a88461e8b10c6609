"""Trained tokenizers, and counts of what the tests met: an event that never happened was not tested."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import KINDS

from headrace.text import Tokenizer

_PROPERTY = "events"


@pytest.fixture(scope="session", params=sorted(KINDS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved tokenizer of each kind."""
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="session")
def make_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A fresh model directory of one kind, to be changed at will."""
    return lambda kind: KINDS[kind](tmp_path_factory.mktemp("tokenizer") / kind)


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts shown at the end of the run. A test fails if one of its counts stayed at zero."""
    counts: Counter[str] = Counter()
    request.node.user_properties.append((_PROPERTY, counts))
    yield counts
    missing = [name for name, count in counts.items() if not count]
    assert not missing, f"these events never happened, so nothing about them was tested: {missing}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, counts in report.user_properties:
            if name == _PROPERTY:
                shown = ", ".join(f"{event} {count:,}" for event, count in sorted(counts.items()))
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {shown}")
