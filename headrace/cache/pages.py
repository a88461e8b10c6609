"""Pages of one cache group: free, held (references > 0), or idle (cached, nobody holds it).

Page 0 is trash: ghost rows write there and nobody reads it. Idle pages keep their contents until they are
needed, oldest first, so that a prefix can be hit again; they count as available.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from headrace.errors import InvariantError

TRASH = 0


class PagePool:
    """Reference counts and the free list of one group's pages."""

    def __init__(self, n_pages: int, on_reclaim: Callable[[int], object] | None = None) -> None:
        """`on_reclaim(page)` is called when an idle page is about to be given to somebody else."""
        self.n_pages = n_pages
        self._free = list(range(n_pages - 1, TRASH, -1))
        self._refs = [0] * n_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._on_reclaim = on_reclaim
        self.reclaimed = 0

    @property
    def available(self) -> int:
        """Pages that `take` can return now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages somebody holds."""
        return self.n_pages - 1 - self.available

    def take(self) -> int:
        """A page with one reference. Raises InvariantError if none is available."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self.reclaimed += 1
            if self._on_reclaim:
                self._on_reclaim(page)
        else:
            raise InvariantError("no page is available: the step was composed with more pages than there are")
        self._refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a held or idle page."""
        if self._refs[page] == 0:
            if page not in self._idle:
                raise InvariantError(f"page {page} is free and cannot be shared")
            del self._idle[page]
        self._refs[page] += 1

    def drop(self, page: int, keep: bool) -> None:
        """One reference less; at zero the page becomes idle if `keep`, else free."""
        if page == TRASH or self._refs[page] < 1:
            raise InvariantError(f"page {page} has no reference to give back")
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if keep:
                self._idle[page] = None
            else:
                self._free.append(page)

    def free_idle(self) -> None:
        """Make every idle page free."""
        self._free.extend(self._idle)
        self._idle.clear()

    def is_idle(self, page: int) -> bool:
        """Whether the page is cached and nobody holds it."""
        return page in self._idle

    def is_alone(self, page: int) -> bool:
        """Whether the page has exactly one reference."""
        return self._refs[page] == 1

    def references(self) -> list[int]:
        """Reference count of every page, for audits."""
        return list(self._refs)

    def check(self) -> None:
        """Raise InvariantError unless every page is in exactly one place."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page, refs in enumerate(self._refs) if refs > 0}
        if len(free) != len(self._free) or free & idle or free & held or idle & held or TRASH in free | idle | held:
            raise InvariantError("a page is in two places at once")
        if len(free) + len(idle) + len(held) != self.n_pages - 1:
            raise InvariantError(f"{self.n_pages - 1 - len(free) - len(idle) - len(held)} pages are lost")
