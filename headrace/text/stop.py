"""Stop strings over streamed text: text that could still become a stop string is held back, all other text goes out.

One automaton over all stop strings (Aho and Corasick, "Efficient string matching", CACM 18(6), 1975) costs one step a
character, however many stop strings there are. Its state is the longest suffix of the text that begins some stop
string, which is also exactly the text to hold back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from headrace.errors import RequestError


class _Automaton(NamedTuple):
    """Node 0 is the empty prefix. All lists are indexed by node."""

    children: list[dict[str, int]]
    fallback: list[int]  # the longest proper suffix of this node that is also a node
    depth: list[int]  # characters of the prefix this node stands for
    ends: list[str | None]  # the longest stop string that ends here


@lru_cache(maxsize=256)
def _build(stops: tuple[str, ...]) -> _Automaton:
    children: list[dict[str, int]] = [{}]
    depth = [0]
    ends: list[str | None] = [None]
    for stop in stops:
        node = 0
        for char in stop:
            if char not in children[node]:
                children[node][char] = len(children)
                children.append({})
                depth.append(depth[node] + 1)
                ends.append(None)
            node = children[node][char]
        ends[node] = stop
    fallback = [0] * len(children)
    queue = deque(children[0].values())
    while queue:  # breadth first: a fallback is always shallower, so it is finished before it is needed
        node = queue.popleft()
        ends[node] = ends[node] or ends[fallback[node]]
        for char, child in children[node].items():
            fallback[child] = _step(children, fallback, fallback[node], char)
            queue.append(child)
    return _Automaton(children, fallback, depth, ends)


def _step(children: list[dict[str, int]], fallback: list[int], node: int, char: str) -> int:
    while node and char not in children[node]:
        node = fallback[node]
    return children[node].get(char, 0)


class StopMatcher:
    """Watches one output for stop strings.

    The stop string that is completed first wins; of several completed by the same character, the one that starts
    first. How the text was cut into pushes never matters.

    Parameters
    ----------
    stops: the stop strings. An empty one raises RequestError: it would end every output before it begins.
    include: whether the matched stop string stays in the output.
    """

    def __init__(self, stops: str | Sequence[str], include: bool = False) -> None:
        wanted = (stops,) if isinstance(stops, str) else tuple(stops)
        for index, stop in enumerate(wanted):
            if not isinstance(stop, str):
                raise RequestError(f"stop[{index}] is a {type(stop).__name__}; stop strings are text: pass a str")
            if not stop:
                raise RequestError(f"stop[{index}] is empty and would match at once: remove it, or pass max_tokens=1")
        self._automaton = _build(wanted)
        self._include = include
        self._node = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take new text; return the text that is now certain to be output, and the stop string if one matched.

        After a match the output is closed: later text is dropped and the same stop string is returned again.
        """
        if self.matched is not None:
            return "", self.matched
        children, fallback, depth, ends = self._automaton
        buffer = self._held + text
        node = self._node
        for end, char in enumerate(text, start=len(self._held) + 1):
            node = _step(children, fallback, node, char)
            stop = ends[node]
            if stop is not None:
                self.matched, self._held, self._node = stop, "", 0
                return buffer[: end if self._include else end - len(stop)], stop
        self._node = node
        settled = len(buffer) - depth[node]
        self._held = buffer[settled:]
        return buffer[:settled], None

    def flush(self) -> str:
        """Give out what was held back. To be called once, when the output ended for another reason than a match."""
        held, self._held, self._node = self._held, "", 0
        return held
