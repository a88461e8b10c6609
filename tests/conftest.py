"""Shared set-up: counts of what property tests met, and GPU tests that must not skip."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by its own merits and counts of events do not depend on
# luck; the long runs look for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("searching", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

_PROPERTY = "events"


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
