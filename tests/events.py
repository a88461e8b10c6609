"""Counts of what a property test is about: printed after the run, and a failure for an event that never happened."""

from __future__ import annotations

from collections import Counter


class Events:
    """How often each event of a property test happened."""

    def __init__(self, *names: str) -> None:
        self.examples = 0
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))

    def add(self, name: str, count: int = 1) -> None:
        """Count an event. A name that was not announced is a mistake of the test."""
        if name not in self.counts:
            raise KeyError(name)
        self.counts[name] += count

    def check(self, title: str) -> None:
        """Print the counts; fail if an announced event never happened."""
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items())
        print(f"\n{title}: {self.examples} examples; {counts}")
        missing = [name for name, count in self.counts.items() if not count]
        assert not missing, f"{title}: never happened: {missing}"
        assert self.examples, f"{title}: no example ran"
