"""Shared set-up: counts of what property tests met, GPU tests that must not skip, and suites that run on a GPU too."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by its own merits and counts of events do not depend on
# luck; the long runs look for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("searching", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_PROPERTY = "events"
_HERE = Path(__file__).parent
_SUITES = [
    _HERE / name
    for name in (
        "engine/test_law_one.py",
        "engine/test_parity_mode.py",
        "engine/test_pieces.py",
        "engine/test_fork.py",
        "engine/test_urgency.py",
        "engine/test_swap.py",
        "decoding/test_causal.py",
        "decoding/test_chains.py",
        "decoding/test_everything.py",
        "decoding/test_walk.py",
        "eviction",
        "state",
        "codecs",
        "selection",
        "lora/test_lora_law_one.py",
    )
]
"""Tests over the tiny model that `make test-gpu` runs on the GPU: with HEADRACE_TEST_DEVICE=cuda they are marked."""


@pytest.fixture
def events(request: pytest.FixtureRequest) -> Iterator[Counter[str]]:
    """Counts shown at the end of the run. A test fails if one of its counts stayed at zero."""
    counts: Counter[str] = Counter()
    request.node.user_properties.append((_PROPERTY, counts))
    yield counts
    missing = [name for name, count in counts.items() if not count]
    assert not missing, f"these events never happened, so nothing about them was tested: {missing}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the suites are tests of the GPU, and the long ones begin first: several processes share the rest."""
    if os.environ.get("HEADRACE_TEST_DEVICE", "cpu") == "cpu":
        return
    for item in items:
        if not item.get_closest_marker("slow") and any(item.path.is_relative_to(suite) for suite in _SUITES):
            item.add_marker(pytest.mark.gpu)
    items.sort(key=lambda item: _PROPERTY not in getattr(item, "fixturenames", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, counts in report.user_properties:
            if name == _PROPERTY:
                shown = ", ".join(f"{event} {count:,}" for event, count in sorted(counts.items()))
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {shown}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Where a GPU is required, a GPU test that skips has failed: it would hide that nothing was tested."""
    outcome = yield
    report = outcome.get_result()
    # Plain numbers, so that reports can travel between processes.
    plain = [(name, dict(value)) if name == _PROPERTY else (name, value) for name, value in report.user_properties]
    report.user_properties = plain
    if report.skipped and item.get_closest_marker("gpu") and os.environ.get("HEADRACE_REQUIRE_GPU") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped although a GPU is required: {report.longrepr}"
