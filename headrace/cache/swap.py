"""The cache of a preempted request in host memory: whole pages are copied out, and back into whatever pages are free.

What is kept is everything that a request is beside its tokens: committed keys and values of all groups (those of
decoders' own models too), fixed states and clocks. Drafts are not, so a request goes on as behind an admission, with
the same tokens. A page that was published and still is, is shared again instead of copied; all pages are kept in any
case, because nothing holds a published page for somebody who waits.

Letters: L layers of a group, K key/value heads, P pages of the pool, p pages of the request, S slots in a page, D head
size, x pages copied back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.cache.manager import CacheManager
from headrace.cache.pages import TRASH
from headrace.cache.states import StateBlob, StateStore
from headrace.errors import InvariantError
from headrace.request import Request
from headrace.tables import RequestTable, RowClocks

TRIAL_PAGES = 64
TRIAL_BYTES = 2**26
"""The trial copy has so many pages, as long as they are not more bytes: a single page would time the call."""


@dataclass
class Spilled:
    """What a request had when it was preempted. The lists are by pool, but for `dropped`, which is by group."""

    n_done: int
    trigger: int
    published: int
    dropped: list[int]
    freed: list[int]
    clocks: RowClocks
    slots: list[int]
    """Slots that the copied pages hold."""
    count: list[int]
    """Pages of those slots, with the ones behind a window."""
    offered: list[dict[int, int]]
    """The published pages among them, by place."""
    planes: list[list[Tensor]]
    """Copies of the pages from `freed` on, in each plane of a pool: [L, K, p, S, *] or [L, K, p, *]."""
    states: StateBlob
    nbytes: int
    claimed: list[dict[int, int]] = field(default_factory=list)
    """Pages by place that `claim` has shared again."""


class SwapSpace:
    """Host memory for the caches of preempted requests, bounded, taken when it is needed.

    Args:
        limit_bytes: bytes that all copies may take together; 0: none are made.
    """

    def __init__(self, cache: CacheManager, table: RequestTable, states: StateStore, *, limit_bytes: int) -> None:
        self.cache, self.table, self.states, self.limit_bytes = cache, table, states, limit_bytes
        self.held_bytes = 0
        self._spilled: dict[int, Spilled] = {}

    def __len__(self) -> int:
        return len(self._spilled)

    def get(self, request: Request) -> Spilled | None:
        """What is kept of a request; None: nothing."""
        return self._spilled.get(request.arrival)

    def bytes_of(self, request: Request) -> int:
        """Bytes that a running request would take here."""
        return self._plan(request)[2]

    def _plan(self, request: Request) -> tuple[RowClocks, list[int], int]:
        """Its clocks, the slots by pool that are worth a copy, and the bytes of their pages and the states."""
        clocks = self.table.clocks(request.index)
        # Of a decoder's own groups only the device knows the length.
        slots = [max(request.slots(g), clocks.kv_len[g] + clocks.hold) for g in self.cache.pool_groups]
        pages = [
            min(len(held), -(-n // self.cache.page_size)) - freed
            for held, n, freed in zip(request.pages, slots, request.freed, strict=True)
        ]
        return clocks, slots, self.cache.bytes_of_pages(pages) + self.states.bytes_per_request

    def spill(self, request: Request) -> Spilled:
        """Copy the cache of a running request, which still has to be released. Raises InvariantError if there is no
        room."""
        clocks, slots, nbytes = self._plan(request)
        if request.arrival in self._spilled or self.held_bytes + nbytes > self.limit_bytes:
            raise InvariantError(f"request {request.request_id} is in host memory already, or does not fit")
        pages = [held[: -(-n // self.cache.page_size)] for held, n in zip(request.pages, slots, strict=True)]
        planes = [
            [_to_host(plane, mine[freed:]) for plane in self.cache.planes[p]]
            for p, (mine, freed) in enumerate(zip(pages, request.freed, strict=True))
        ]
        spilled = Spilled(
            n_done=request.n_done,
            trigger=request.trigger,
            published=request.published,
            dropped=list(request.dropped),
            freed=list(request.freed),
            clocks=clocks,
            slots=slots,
            count=[len(mine) for mine in pages],
            offered=self._still_published(request, request.published, [dict(enumerate(mine)) for mine in pages]),
            planes=planes,
            states=self.states.spill(request.index),
            nbytes=nbytes,
        )
        self._wait()
        self.held_bytes += nbytes
        self._spilled[request.arrival] = spilled
        return spilled

    def shareable(self, request: Request, spilled: Spilled) -> list[dict[int, int]]:
        """Pages by pool and place that were published and still are, so that nothing has to be copied."""
        return self._still_published(request, spilled.published, spilled.offered)

    def _still_published(
        self, request: Request, units: int, pages: Sequence[Mapping[int, int]]
    ) -> list[dict[int, int]]:
        """Those of some pages, by pool and place, that are the published ones of the request's first `units` units."""
        found: list[dict[int, int]] = [{} for _ in pages]
        for k, node in enumerate(self.cache.index.match(request.unit_keys, request.tokens, units)):
            for mine, held, page in zip(found, pages, node.pages, strict=True):
                if page != TRASH and held.get(k) == page:
                    mine[k] = page
        return found

    def view(self, request: Request, spilled: Spilled) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a restored request has without taking any page, by pool, and how many of those nobody holds now."""
        shared = self.shareable(request, spilled)
        idle = tuple(sum(map(pool.is_idle, mine.values())) for pool, mine in zip(self.cache.pools, shared, strict=True))
        pages = tuple(freed + len(mine) for freed, mine in zip(spilled.freed, shared, strict=True))
        return pages, idle

    def claim(self, requests: Iterable[Request]) -> None:
        """Hold what requests that are about to be restored share again, before anybody takes a page."""
        for request in requests:
            spilled = self.get(request)
            if spilled is None:
                continue
            spilled.claimed = self.shareable(request, spilled)
            for pool, mine in zip(self.cache.pools, spilled.claimed, strict=True):
                for page in mine.values():
                    pool.share(page)

    def restore(self, request: Request, index: int) -> Spilled:
        """Give a claimed request its cache and its clocks back at the request index that it takes.

        Its row of the request table is still to be written.
        """
        spilled = self._take(request)
        pages: list[list[int]] = []
        for p, claimed in enumerate(spilled.claimed):
            fresh = [k for k in range(spilled.freed[p], spilled.count[p]) if k not in claimed]
            mine = dict(zip(fresh, (self.cache.pools[p].take() for _ in fresh), strict=True))
            for plane, kept in zip(self.cache.planes[p], spilled.planes[p], strict=True):
                _from_host(plane, list(mine.values()), kept, [k - spilled.freed[p] for k in fresh])
            mine.update(claimed)
            pages.append([mine.get(k, TRASH) for k in range(spilled.count[p])])
        request.freed, request.dropped = list(spilled.freed), list(spilled.dropped)
        self.cache.settle(request, index, pages)
        request.n_done, request.trigger = spilled.n_done, spilled.trigger
        request.published = spilled.published
        if not any(request.dropped):
            # Units that were forgotten meanwhile are offered again.
            known = self.cache.index.match(request.unit_keys, request.tokens, spilled.published)
            request.published = sum(1 for _ in known)
        self.states.restore(index, spilled.states)
        self._wait()
        return spilled

    def drop(self, request: Request) -> None:
        """Forget what is kept of a request, if anything is."""
        if request.arrival in self._spilled:
            self._take(request)

    def _take(self, request: Request) -> Spilled:
        spilled = self._spilled.pop(request.arrival)
        self.held_bytes -= spilled.nbytes
        return spilled

    def audit(self, waiting: Sequence[Request]) -> None:
        """Raise InvariantError unless copies are kept of waiting requests only, and their bytes are what is counted."""
        if strangers := self._spilled.keys() - {request.arrival for request in waiting}:
            raise InvariantError(f"host memory holds the caches of requests that do not wait: arrivals {strangers}")
        counted = sum(spilled.nbytes for spilled in self._spilled.values())
        tensors = [t for s in self._spilled.values() for planes in (*s.planes, s.states.states) for t in planes]
        real = sum(t.numel() * t.element_size() for t in tensors)
        if not counted == real == self.held_bytes <= self.limit_bytes:
            raise InvariantError(
                f"host memory for caches: {real} bytes of {self.limit_bytes} are held, {counted} are in the books of "
                f"requests, {self.held_bytes} are counted"
            )

    def time_copy(self) -> float:
        """Seconds a byte of a copy in one direction, by copying the trash page to and fro; 0 without pages."""
        nbytes = self.cache.bytes_of_pages([1] * len(self.cache.pools))
        if not nbytes:
            return 0.0
        count = max(1, min(TRIAL_PAGES, TRIAL_BYTES // nbytes))
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            for planes in self.cache.planes:
                for plane in planes:
                    kept = _to_host(plane, [TRASH] * count)
                    _from_host(plane, [TRASH] * count, kept, list(range(count)))
            self._wait()
            best = min(best, time.perf_counter() - began)
        return best / (2 * count * nbytes)

    def _wait(self) -> None:
        if self.table.device.type == "cuda":
            torch.cuda.synchronize(self.table.device)


def _to_host(plane_LKPSD: Tensor, pages: Sequence[int]) -> Tensor:
    """A copy [L, K, p, *] of pages; on a GPU under way until the device is waited for."""
    layers, heads, _, *slot = plane_LKPSD.shape
    pinned = plane_LKPSD.device.type == "cuda"
    host_LKpSD = torch.empty(layers, heads, len(pages), *slot, dtype=plane_LKPSD.dtype, pin_memory=pinned)
    page_p = torch.tensor(pages, dtype=torch.int64, device=plane_LKPSD.device)
    for host_KpSD, plane_KPSD in zip(host_LKpSD, plane_LKPSD, strict=True):  # on a GPU one layer at a time needs room
        host_KpSD.copy_(plane_KPSD.index_select(1, page_p), non_blocking=True)
    return host_LKpSD


def _from_host(plane_LKPSD: Tensor, pages: Sequence[int], host_LKpSD: Tensor, places: Sequence[int]) -> None:
    """Write the copies at `places` into pages."""
    if not pages:
        return
    page_x = torch.tensor(pages, dtype=torch.int64, device=plane_LKPSD.device)
    whole = list(places) == list(range(host_LKpSD.shape[2]))
    place_x = torch.tensor(places, dtype=torch.int64)
    for host_KpSD, plane_KPSD in zip(host_LKpSD, plane_LKPSD, strict=True):
        kept_KxSD = host_KpSD if whole else host_KpSD.index_select(1, place_x)
        plane_KPSD.index_copy_(1, page_x, kept_KxSD.to(plane_KPSD.device, non_blocking=True))
