"""Stop strings: any split of the text gives what searching the whole text gives, and nothing is held without need."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import RequestError
from headrace.text import StopMatcher

SETTINGS = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Two letters make overlaps, shared beginnings and stop strings inside stop strings the rule and not the exception.
STOPS = st.lists(st.text("ab", min_size=1, max_size=5) | st.sampled_from(["😀b", "\n\n"]), min_size=1, max_size=4)
PIECES = st.lists(st.text("aab\n😀", max_size=5), max_size=10)


def oracle(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The rule word for word: the first to be completed; of several, the one that starts first."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@SETTINGS
@given(stops=STOPS, pieces=PIECES, include=st.booleans())
def test_any_split_equals_the_oracle(events: Counter[str], stops: list[str], pieces: list[str], include: bool) -> None:
    text = "".join(pieces)
    matcher = StopMatcher(stops, include)
    given_out, matched, seen = "", None, ""
    for piece in pieces:
        new, matched = matcher.push(piece)
        given_out, seen = given_out + new, seen + piece
        if matched is not None:
            break
        held = seen[len(given_out) :]
        assert seen == given_out + held
        beginnings = [seen[i:] for i in range(len(seen)) if any(stop.startswith(seen[i:]) for stop in stops)]
        assert held == max(beginnings, key=len, default=""), "held back more, or less, than what could begin a stop"
        events["pushes that held back"] += bool(held)
    if matched is None:
        given_out += matcher.flush()
    assert (given_out, matched) == oracle(text, stops, include)
    events["examples"] += 1
    events["matches"] += matched is not None
    events["no match"] += matched is None
    events["match across pushes"] += matched is not None and not any(matched in piece for piece in pieces)
    events["stop inside a stop"] += matched is not None and any(matched in stop and matched != stop for stop in stops)


@SETTINGS
@given(stops=STOPS, text=st.text("ab\n😀", max_size=8), include=st.booleans())
def test_every_split_of_a_text_in_two_or_letters(stops: list[str], text: str, include: bool) -> None:
    expected = oracle(text, stops, include)
    for pieces in ([text[:cut], text[cut:]] for cut in range(len(text) + 1)):
        assert _run(stops, pieces, include) == expected
    assert _run(stops, list(text), include) == expected


def test_output_is_closed_after_a_match() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("work EN") == ("work ", None)
    assert matcher.push("D and more") == ("", "END")
    assert matcher.push("still more") == ("", "END")
    assert matcher.flush() == ""
    assert matcher.matched == "END"


def test_one_stop_string_may_be_a_plain_str() -> None:
    assert StopMatcher("ab").push("xab") == ("x", "ab")


def test_no_stop_strings_hold_nothing() -> None:
    assert StopMatcher([]).push("text") == ("text", None)


def test_useless_stop_strings_are_refused() -> None:
    with pytest.raises(RequestError, match=r"stop\[1\] is empty.*remove it"):
        StopMatcher(["a", ""])
    with pytest.raises(RequestError, match=r"stop\[0\] is a int"):
        StopMatcher([7])  # type: ignore[list-item]


def _run(stops: list[str], pieces: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    text = "".join(matcher.push(piece)[0] for piece in pieces)
    return text + matcher.flush(), matcher.matched
