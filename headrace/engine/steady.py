"""A batch in which everybody decodes and nobody can join: each step is the one before, one token further on.

Composing such a step anew would bring the same grants. So until something changes the batch only counts its steps, and
looks at a request where it needs its next page; what a step costs the host is then what its tokens cost. It is over
where the first request reaches its limit or its trigger, or where a page is lacking: then the scheduler decides again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from headrace.cache.manager import CacheManager
from headrace.decoding.base import Clocks
from headrace.engine.runner import Granted
from headrace.request import Request


class SteadyBatch:
    """Grants of one row each to the requests of a step that has been composed, and of the steps behind it.

    Args:
        granted: that step: everybody who runs, one row each, that of the only pending token.
        version: see `Engine.step`; the batch holds while nobody comes or goes.
    """

    def __init__(self, granted: Sequence[Granted], cache: CacheManager, version: int) -> None:
        self.version = version
        self._cache = cache
        self._members = {g.request.arrival: g.request for g in granted}
        # A list is one object for all steps: the runner knows by it that nothing has changed.
        self._granted = [[Granted(g.request, 1, ahead, 1) for g in granted] for ahead in (0, 1)]
        # By request the slots in front of the first step, by pool.
        self._slots = {g.request.arrival: cache.pool_slots(g.request, g.ahead) for g in granted}
        self._steps = 0
        """Steps behind the composed one."""
        self._end = min(_steps_left(g) for g in granted)
        self._due: defaultdict[int, list[Request]] = defaultdict(list)
        """Requests by the step that needs another page for them."""
        for g in granted:
            self._due[self._page_step(g.request)].append(g.request)

    def get(self, arrival: int) -> Clocks | None:
        """Clocks of a request behind a running step of this batch, of which nothing is known yet."""
        request = self._members.get(arrival)
        return None if request is None else Clocks(request.n_tok + 1, request.n_done + 1, 0, request.limit)

    def next_step(self, ahead: int) -> Sequence[Granted] | None:
        """The grants of the next step, `ahead` steps behind what is known of the requests; None: it must be composed.

        Takes the pages that the step needs.
        """
        self._steps += 1
        if self._steps >= self._end:
            return None
        for request in self._due.pop(self._steps, ()):
            if not all(self._cache.available):
                return None
            self._cache.reserve(request, ahead + 1)
            self._due[self._page_step(request)].append(request)
        return self._granted[ahead]

    def _page_step(self, request: Request) -> int:
        """The first step whose row has no room in the pages that the request holds."""
        size = self._cache.page_size
        slots = self._slots[request.arrival]
        return min([len(pages) * size - n for pages, n in zip(request.pages, slots, strict=True)], default=-1)


def _steps_left(granted: Granted) -> int:
    """Steps, the composed one included, in which a request surely has a row and is not compacted behind it."""
    request, ahead = granted.request, granted.ahead
    return min(request.limit - request.n_tok, request.trigger - 1 - request.n_done) - ahead
