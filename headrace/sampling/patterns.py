"""Which regular expressions the grammar library keeps to: what it would pass over is refused."""

from __future__ import annotations

import re
from typing import Any

from headrace.errors import RequestError

ASSERTIONS = {"(?=": "a look-ahead", "(?!": "a look-ahead", "(?<=": "a look-behind", "(?<!": "a look-behind"}
KNOWN = "dDwWsSbBnrtfvxucpP"
"""Letters behind a backslash that mean what they do in JavaScript, or that the library refuses itself."""
_CONTROL = dict(zip("0btnvfr", (0, 8, 9, 10, 11, 12, 13), strict=True))
_CODE = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\u\{([0-9a-fA-F]+)\}")


def check_pattern(pattern: Any, what: str, *, in_json: bool = False) -> None:
    """Raises RequestError for a pattern that is no text, and for assertions anywhere but '^' in front and '$' behind.

    what: how an error names the pattern.
    in_json: it stands for the inside of a JSON string, where the library writes characters as they are; those that JSON
        would escape are refused, but within [...], where they never match.
    """
    if not isinstance(pattern, str):
        raise RequestError(f"{what} is {pattern!r}; it must be a text")
    in_class = False
    at = 0
    while at < len(pattern):
        letter = pattern[at]
        code = _code(pattern, at)
        if in_json and not in_class and (code < 0x20 or chr(code) in '"\\'):
            raise RequestError(
                f"{what} {pattern!r} has {chr(code)!r}, which JSON writes as an escape, so that it is not kept: "
                "leave it out"
            )
        if letter == "\\":
            if pattern[at + 1 : at + 2] in ("b", "B") and not in_class:
                raise RequestError(f"{what} {pattern!r} has a word boundary, which is not supported: leave it out")
            if (name := pattern[at + 1 : at + 2]).isalpha() and name not in KNOWN:
                raise RequestError(f"{what} {pattern!r} has '\\{name}', which is not kept: leave it out")
            at += 2
            continue
        if in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
            at += 1 if pattern[at + 1 : at + 2] == "^" else 0
        elif (letter == "^" and at) or (letter == "$" and at + 1 < len(pattern)):
            raise RequestError(
                f"{what} {pattern!r} has {letter!r} in the middle, which is not kept: use it at the "
                f"{'beginning' if letter == '^' else 'end'} only"
            )
        else:
            for opening, name in ASSERTIONS.items():
                if pattern.startswith(opening, at):
                    raise RequestError(f"{what} {pattern!r} has {name}, which is not supported: leave it out")
        at += 1


def _code(pattern: str, at: int) -> int:
    """The character that stands at a place of a pattern; a space for an escape that names no single one."""
    if pattern[at] != "\\":
        return ord(pattern[at])
    letter = pattern[at + 1 : at + 2]
    found = _CODE.match(pattern, at)
    if found:
        return int(next(filter(None, found.groups())), 16)
    if letter == "c":
        return 0
    return _CONTROL.get(letter, ord(letter) if letter and not letter.isalnum() else 0x20)
