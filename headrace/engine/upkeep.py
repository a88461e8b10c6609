"""Upkeep of the cache, right after a commit: pages behind a window go back, and caches due for it are compacted or
sealed.

A compaction that has to copy shared pages may lack room for that. Then the request waits, in its place and without
rows, until others have given pages back; what it keeps is settled already, so the wait changes no result. The first
in rank never waits for ever: in need, everybody behind it gives way, and a request that shares with nobody lacks
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headrace.cache.manager import CacheManager
from headrace.codecs.base import Codec
from headrace.errors import InvariantError
from headrace.eviction.base import Cells, Evictor, select
from headrace.request import Request
from headrace.selection.base import Selector
from headrace.tables import RequestTable


@dataclass
class UpkeepStats:
    """Counters since the start."""

    compactions: int = 0
    copies: int = 0
    """Compactions that took fresh pages, because others see the old ones."""
    waits: int = 0
    """Compactions that had to wait for pages."""
    seals: int = 0
    """Times that whole pages of a request were sealed."""


class Upkeep:
    """Asks the evictors and lets the cache manager act.

    Args:
        evictors: by name.
        codec, selector: of the model that decodes.
        groups: cache groups of the model that decodes; those of decoders' own models keep everything.
    """

    def __init__(
        self,
        cache: CacheManager,
        table: RequestTable,
        evictors: Mapping[str, Evictor],
        codec: Codec,
        selector: Selector,
        groups: range,
    ) -> None:
        self.cache, self.table, self.groups = cache, table, groups
        self.evictors, self.codec, self.selector = evictors, codec, selector
        self.stats = UpkeepStats()
        self._has_windows = any(cache.groups[g].state.window for g in groups)
        self._due: dict[int, tuple[Request, dict[int, Tensor]]] = {}

    def most_pages(self, rows: int) -> tuple[int, ...]:
        """Pages by pool that a request holds at most in steps of so many rows; empty: no pool bounds them."""
        if not self._has_windows and not self.codec.open_pages:
            return ()
        size = self.cache.page_size
        most = [self.cache.n_pages] * len(self.cache.pools)
        for g in self.groups:
            window = self.cache.groups[g].state.window
            if window:
                most[g] = -(-(window - 1 + rows) // size) + 1
            elif self.codec.open_pages:
                most[g] = self.codec.open_pages
        return tuple(most)

    def first_trigger(self, request: Request, n_done: int) -> int:
        """The token index at which the request first sees less, or sees it otherwise, than at `n_done` cached tokens.

        Hits end before the first eviction, so that is always ahead.
        """
        evictor = self.evictors[request.evictor]
        eviction = evictor.next_trigger(request.prompt_len, 0, request.cache_budget)
        return min(eviction, self.codec.next_seal(n_done), self.selector.next_base(n_done))

    def after_commit(self, request: Request) -> None:
        """The request goes on behind this commit."""
        if self._has_windows:
            self.cache.free_behind(request, self.groups)
        if request.n_done < request.trigger:
            return
        if not self.evictors[request.evictor].evicts:
            self._seal(request)
        else:
            keep = {g: self._choose(request, g) for g in self.groups}
            self._due[request.arrival] = request, keep
            self._compact(request, keep)
            self.stats.waits += request.arrival in self._due

    def _seal(self, request: Request) -> None:
        """At the triggers of codec and selector, which have no evictor beside them."""
        if request.n_done == self.codec.next_seal(request.n_done - 1):
            with torch.inference_mode():
                self.cache.seal(request)
            self.stats.seals += 1
        request.trigger = self.first_trigger(request, request.n_done)
        self.table.set_trigger(request.index, request.trigger)

    def retry(self) -> None:
        """Compact what has waited for pages, the first in rank first."""
        for request, keep in sorted(self._due.values(), key=lambda entry: entry[0].rank):
            self._compact(request, keep)

    def waits(self, request: Request) -> bool:
        """Whether the request can have no rows until others give pages back."""
        return request.arrival in self._due

    def forget(self, request: Request) -> None:
        """The request gives its cache back."""
        self._due.pop(request.arrival, None)

    def _choose(self, request: Request, g: int) -> Tensor:
        """The slots that each cell keeps, int64 [L, K, m]."""
        group, evictor = self.cache.groups[g], self.evictors[request.evictor]
        n = request.slots(g)
        keys = partial(self.cache.keys, request, g)
        cells = Cells(group.layers, group.state.kv_heads, n, request.cache_budget, keys, self.table.device)
        m = evictor.keep_len(group.layers, n, request.cache_budget)
        if not 0 < m <= n:
            raise InvariantError(f"evictor {request.evictor} keeps {m} of {n} slots in layers {group.layers}")
        with torch.inference_mode():
            return select(evictor.score(cells), cells, m)

    def _compact(self, request: Request, keep: Mapping[int, Tensor]) -> None:
        with torch.inference_mode():
            moves = self.cache.compact(request, keep)
            if moves is None:
                return
            for g, move in moves.items():
                published = min(request.published * self.cache.page_size, move.first)
                self.table.set_lengths(request.index, g, request.slots(g), published)
        del self._due[request.arrival]
        evictor = self.evictors[request.evictor]
        trigger = evictor.next_trigger(request.prompt_len, request.n_done, request.cache_budget)
        if trigger <= request.n_done:
            raise InvariantError(f"evictor {request.evictor} asks for token {trigger} at token {request.n_done}")
        request.trigger = trigger
        self.table.set_trigger(request.index, trigger)
        self.stats.compactions += 1
        self.stats.copies += any(move.fresh for move in moves.values())
