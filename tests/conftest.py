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
_SAMPLED = {
    "test_every_decoder_emits_what_plain_decoding_emits": 4,
    "test_tokens_equal_plain_decoding": 8,
    "test_a_coded_cache_is_dense_attention_over_what_it_decodes_to": 12,
    "test_selected_reads_are_dense_attention_under_a_mask": 8,
    "test_drafts_across_a_trigger_keep_the_same_slots": 6,
    "test_every_part_runs_beside_adapters": 8,
    "test_every_decoder": 6,
    "test_every_evictor": 4,
    "test_codec_law_one.py::test_tokens_are_those_of_the_request_alone": 2,
    "test_selectors.py::test_tokens_are_those_of_the_request_alone": 2,
    "test_swap.py::test_tokens_are_those_of_the_request_alone": 2,
    "test_eviction_law_one.py::test_tokens_are_those_of_the_request_alone": 2,
}
"""Of these, which cross every part with every other on the CPU, as many run on the GPU, in five minutes with all else:
the first, the last, and others evenly between."""


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
    suites = [item for item in items if any(item.path.is_relative_to(suite) for suite in _SUITES)]
    groups: dict[str, list[pytest.Item]] = {}
    for item in suites:
        if not item.get_closest_marker("slow"):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, group in groups.items():
        wanted = next((n for end, n in _SAMPLED.items() if name.endswith((f"/{end}", f"::{end}"))), 0)
        count = min(wanted, len(group)) or len(group)
        for i in range(count):
            group[i * (len(group) - 1) // max(count - 1, 1)].add_marker(pytest.mark.gpu)
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
