"""The cache manager: the only one who writes page tables, reference counts and the prefix index.

Layers that keep the same thing form a group; a group has one page table and one pool of pages. The manager
decides nothing: the scheduler says who gets rows, the manager makes room for them. Invariants (checked by
`audit`): every page is free, idle or held; references equal the holders; no shared page is ever written,
because a request writes only behind its committed slots and shared pages are whole, and a compaction that would write
to one takes a fresh page instead.

Two clocks: a request has committed `n_done` tokens, which fill `request.slots(g)` slots of group g. In layers with a
window a slot's place is its token's index, and pages wholly behind the window are given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.cache.compact import Move, gather, plan_move, scatter
from headrace.cache.pages import TRASH, PagePool
from headrace.cache.prefix import PrefixIndex, PrefixNode
from headrace.errors import ConfigError, InvariantError
from headrace.request import Request
from headrace.step import LayerState, Mirror


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share one length and one page table."""

    layers: tuple[int, ...]
    state: LayerState


class Hit(NamedTuple):
    """What the prefix index holds for a request."""

    tokens: int
    idle_pages: int
    """Pages of the hit that nobody holds; they count as available until the hit is taken."""


def group_layers(states: Sequence[LayerState], first: int = 0, split: bool = False) -> list[CacheGroup]:
    """One group for each distinct kind of layer, in order of appearance; layers are counted from `first`.

    Layers with fixed states have no pages and are passed over. `split`: one group for each layer, so that their lengths
    may differ. Raises ConfigError for a kind of layer that no cache exists for.
    """
    layers: dict[tuple[LayerState, int], list[int]] = {}
    for layer, state in enumerate(states, first):
        if state.kind == "fixed":
            continue  # headrace/cache/states.py
        if state.kind not in ("paged", "window"):
            raise ConfigError(
                f"layer {layer} keeps {state.kind!r}, for which there is no cache; known: paged, window, fixed"
            )
        layers.setdefault((state, layer if split else 0), []).append(layer)
    return [CacheGroup(tuple(members), state) for (state, _), members in layers.items()]


def bytes_per_page(groups: Sequence[CacheGroup], page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in every group together."""
    slot = sum(len(g.layers) * g.state.kv_heads * (g.state.head_dim + g.state.v_head_dim) for g in groups)
    return slot * page_size * dtype.itemsize


class CacheManager:
    """Pools, page tables and prefix index of all groups."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        n_pages: int,
        page_size: int,
        max_reqs: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix_caching: bool,
        namespace: str,
    ) -> None:
        self.groups = list(groups)
        self.page_size = page_size
        self.n_pages = n_pages
        self.prefix_caching = prefix_caching
        self.index = PrefixIndex(page_size, namespace, [group.state.window for group in self.groups])
        self._page_bytes = [bytes_per_page([group], page_size, dtype) for group in self.groups]
        self.pools = [PagePool(n_pages, partial(self.index.forget, g)) for g in range(len(self.groups))]
        self._k_LKPSD: list[Tensor] = []
        self._v_LKPSD: list[Tensor] = []
        for group in self.groups:
            shape = (len(group.layers), group.state.kv_heads, n_pages, page_size)
            self._k_LKPSD.append(torch.empty(*shape, group.state.head_dim, dtype=dtype, device=device))
            self._v_LKPSD.append(torch.empty(*shape, group.state.v_head_dim, dtype=dtype, device=device))
        self._group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        # One view a layer, made once: slicing the pools in every layer of every step would cost more than the look-up.
        self._views = {
            layer: (self._k_LKPSD[g][i], self._v_LKPSD[g][i])
            for g, group in enumerate(self.groups)
            for i, layer in enumerate(group.layers)
        }
        most = -(-max_len // page_size)
        self._table = Mirror((len(self.groups), max_reqs + 1, most), torch.int32, device, TRASH, axis=1)
        self.hit_tokens = 0
        self.queried_tokens = 0

    @property
    def page_table_GBP(self) -> Tensor:
        """Page ids, int32 [G, Bmax+1, Pmax]."""
        return self._table.device_table

    def group_of(self, layer: int) -> int:
        """Group of a layer."""
        return self._group_of[layer]

    def layer_pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [K, P, S, D] and values [K, P, S, Dv] of one layer."""
        return self._views[layer]

    def planes(self, group: int) -> tuple[Tensor, ...]:
        """All that a group keeps of its pages: keys and values, [L, K, P, S, D] each."""
        return self._k_LKPSD[group], self._v_LKPSD[group]

    def place(self, group: int, req_X: Tensor, slot_X: Tensor) -> Tensor:
        """Physical slots of a group, int64 [X], of slots by request index; slots outside the table are trash."""
        table_BP = self.page_table_GBP[group]
        page_X = table_BP[req_X, torch.div(slot_X, self.page_size, rounding_mode="floor").long()].long()
        return page_X * self.page_size + slot_X % self.page_size

    def move(self, groups: range, kv_len_GB: Tensor, req_X: Tensor, from_X: Tensor, to_X: Tensor) -> None:
        """Copy slots within requests, all sources read before anything is written.

        Sources and targets are counted from the end of the committed slots, `kv_len_GB` [G, Bmax+1].
        """
        for g in groups:
            n_X = kv_len_GB[g][req_X].long()
            source_X = self.place(g, req_X, (n_X + from_X).clamp_(min=0))
            target_X = self.place(g, req_X, (n_X + to_X).clamp_(min=0))
            for pool in (self._k_LKPSD[g], self._v_LKPSD[g]):
                slots_LKXD = pool.flatten(2, 3)
                slots_LKXD[:, :, target_X] = slots_LKXD[:, :, source_X]

    @property
    def available(self) -> tuple[int, ...]:
        """Pages by group that can be taken now."""
        return tuple(pool.available for pool in self.pools)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(t.numel() * t.element_size() for t in (*self._k_LKPSD, *self._v_LKPSD))

    def capacity_tokens(self) -> int:
        """Longest request that fits when it is alone."""
        return (self.n_pages - 1) * self.page_size

    def look_up(self, request: Request) -> Hit:
        """The longest published prefix; the last known token is always left to recompute. Changes nothing.

        A hit ends before the first eviction: later tokens have seen less than those of the entry.
        """
        if not self.prefix_caching or request.scores_prompt:
            return Hit(0, 0)
        nodes = self._chain(request)
        tokens = len(nodes) * self.page_size
        idle = max(
            (
                sum(pool.is_idle(node.pages[g]) for node in nodes[self.index.first_seen(g, tokens) :])
                for g, pool in enumerate(self.pools)
            ),
            default=0,
        )
        return Hit(tokens, idle)

    def _chain(self, request: Request) -> list[PrefixNode]:
        """The units of the longest hit."""
        self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
        units = (min(request.n_tok, request.exact_len) - 1) // self.page_size
        nodes = list(self.index.match(request.unit_keys, request.tokens, units))
        return nodes[: self.index.usable(nodes)]

    def admit(self, request: Request, index: int) -> None:
        """Take the hit: share its pages and set the request's clocks to its end. Writes the page-table row."""
        nodes = self._chain(request) if self.look_up(request).tokens else []
        tokens = len(nodes) * self.page_size
        self._share(request, index, [[node.pages[g] for node in nodes] for g in range(len(self.groups))], tokens)
        request.published = len(nodes)

    def _share(self, request: Request, index: int, pages: Sequence[Sequence[int]], tokens: int) -> None:
        """Begin with `tokens` slots whose whole pages are those of somebody else, but for what is behind a window."""
        request.freed = [min(self.index.first_seen(g, tokens), len(mine)) for g, mine in enumerate(pages)]
        request.dropped = [0] * len(pages)
        request.pages = [[TRASH] * freed + list(mine[freed:]) for freed, mine in zip(request.freed, pages, strict=True)]
        for g, mine in enumerate(request.pages):
            for page in mine[request.freed[g] :]:
                self.pools[g].share(page)
            self._table.host[g, index, : len(mine)] = mine
        self._table.touch(index)
        request.n_done = request.hit_tokens = tokens
        self.hit_tokens += tokens
        self.queried_tokens += request.n_tok

    def settle(self, request: Request, index: int, pages: list[list[int]]) -> None:
        """Begin with these pages by group, to which the request has references already, but for trash behind a
        window."""
        request.pages = pages
        for g, mine in enumerate(pages):
            self._table.host[g, index, : len(mine)] = mine
        self._table.touch(index)

    def can_fork(self, parent: Request, slots: int) -> bool:
        """Whether the parent still has all that a request sees that begins with its first `slots` tokens."""
        return not any(parent.dropped) and all(
            freed <= self.index.first_seen(g, slots) for g, freed in enumerate(parent.freed)
        )

    def fork(self, parent: Request, child: Request, index: int, slots: int) -> None:
        """Give `child` the first `slots` slots of `parent`: whole pages are shared, the rest of the last is copied."""
        whole, rest = divmod(slots, self.page_size)
        self._share(child, index, [pages[:whole] for pages in parent.pages], slots)
        for g, pages in enumerate(child.pages):
            if rest:
                fresh = self.pools[g].take()
                for pool_LKPSD in (self._k_LKPSD[g], self._v_LKPSD[g]):
                    pool_LKPSD[:, :, fresh] = pool_LKPSD[:, :, parent.pages[g][whole]]
                self._table.host[g, index, len(pages)] = fresh
                pages.append(fresh)
        child.published = whole

    def reserve(self, request: Request, rows: int) -> None:
        """Pages for `rows` slots behind the committed ones."""
        for g, pages in enumerate(request.pages):
            wanted = -(-(request.slots(g) + rows) // self.page_size)
            while len(pages) < wanted:
                page = self.pools[g].take()
                self._table.host[g, request.index, len(pages)] = page
                self._table.touch(request.index)
                pages.append(page)
        held = [len(pages) - freed for pages, freed in zip(request.pages, request.freed, strict=True)]
        request.peak_cache_slots = max(request.peak_cache_slots, max(held, default=0) * self.page_size)
        request.peak_cache_bytes = max(request.peak_cache_bytes, self.bytes_of_pages(held))

    def held_bytes(self, request: Request) -> int:
        """Bytes of the pages that a request holds now, shared ones included."""
        return self.bytes_of_pages(
            [len(pages) - freed for pages, freed in zip(request.pages, request.freed, strict=True)]
        )

    def bytes_of_pages(self, pages: Sequence[int]) -> int:
        """Bytes of so many pages by group."""
        return sum(n * size for n, size in zip(pages, self._page_bytes, strict=False))

    def publish(self, request: Request) -> int:
        """Offer the request's newly whole units to others. Returns the slots that are read-only now, 0 if no more.

        Tokens from the first eviction on are never published: their cache is not that of a whole prefill.
        """
        if not self.prefix_caching or any(request.dropped):
            return 0
        whole = min(request.n_done, request.exact_len) // self.page_size
        if whole <= request.published:
            return 0
        self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
        for k in range(request.published, whole):
            unit = request.tokens[k * self.page_size : (k + 1) * self.page_size]
            self.index.publish(request.unit_keys[k], unit, [pages[k] for pages in request.pages])
        request.published = whole
        return request.published * self.page_size

    def free_behind(self, request: Request, groups: range) -> None:
        """Give back the pages of `groups` that lie wholly behind the window of the next token."""
        for g in groups:
            pages = request.pages[g]
            end = min(self.index.first_seen(g, request.n_done), len(pages))
            for k in range(request.freed[g], end):
                self.pools[g].drop(pages[k], keep=self.index.holds(g, pages[k]))
                pages[k] = TRASH
                self._table.host[g, request.index, k] = TRASH
                self._table.touch(request.index)
            request.freed[g] = max(request.freed[g], end)

    def keys(self, request: Request, group: int) -> Tensor:
        """The committed keys of a group, a copy [L, K, n, D] in the order of slots."""
        slots_n = torch.arange(request.slots(group), device=self._k_LKPSD[group].device)
        return gather(self._k_LKPSD[group], request.pages[group], slots_n.expand(*self._cells(group), -1))

    def values(self, request: Request, group: int) -> Tensor:
        """The committed values of a group, a copy [L, K, n, Dv] in the order of slots."""
        slots_n = torch.arange(request.slots(group), device=self._v_LKPSD[group].device)
        return gather(self._v_LKPSD[group], request.pages[group], slots_n.expand(*self._cells(group), -1))

    def _cells(self, group: int) -> tuple[int, int]:
        return len(self.groups[group].layers), self.groups[group].state.kv_heads

    def compact(self, request: Request, keep: Mapping[int, Tensor]) -> dict[int, Move] | None:
        """Keep only some slots of a request and release the pages behind them: the one mover.

        keep: by group int64 [L, K, m], for each cell the slots that stay, ascending. Slots keep their order. Pages
        that others see too are never written: where slots of such a page move, a fresh page takes its place, and the
        published entry survives.

        Returns what was done by group, or None, with nothing changed, if pages lack for that: call again when others
        have given some back. A request that shares with nobody never lacks any.
        """
        moves = {g: plan_move(keep_LKm, request.slots(g), self.page_size) for g, keep_LKm in keep.items()}
        for g, move in moves.items():
            pages, pool = request.pages[g], self.pools[g]
            lost = [k for k in move.rewritten if not self._owned(g, pages[k])]
            back = [*lost, *range(move.pages, len(pages))]
            if len(lost) > pool.available + sum(pool.is_alone(pages[k]) for k in back):
                return None
        for g, move in moves.items():
            pages, pool, row = request.pages[g], self.pools[g], self._table.host[g, request.index]
            kept = [(x, gather(x, pages, move.source_LKx)) for x in (self._k_LKPSD[g], self._v_LKPSD[g])]
            move.fresh.extend(k for k in move.rewritten if not self._owned(g, pages[k]))
            # Later pages first, so that of a published prefix the end is reclaimed before the beginning.
            for k in [*reversed(range(move.pages, len(pages))), *reversed(move.fresh)]:
                pool.drop(pages[k], keep=self.index.holds(g, pages[k]))
            row[move.pages : len(pages)] = TRASH
            del pages[move.pages :]
            for k in move.fresh:
                pages[k] = row[k] = pool.take()
            for pool_LKPSD, kept_LKxD in kept:
                scatter(pool_LKPSD, pages, move.first, kept_LKxD)
            request.dropped[g] += move.dropped
        self._table.touch(request.index)
        return moves

    def _owned(self, group: int, page: int) -> bool:
        """Whether one request holds the page and nobody else can come to see it."""
        return self.pools[group].is_alone(page) and not self.index.holds(group, page)

    def release(self, request: Request) -> None:
        """Give back every page. Later units go first, so that they are reclaimed before their parents."""
        for g, pages in enumerate(request.pages):
            self._table.host[g, request.index, : len(pages)] = TRASH
            for page in reversed(pages[request.freed[g] :]):
                self.pools[g].drop(page, keep=self.index.holds(g, page))
        self._table.touch(request.index)
        request.pages, request.freed, request.dropped = [], [], []
        request.n_done = request.published = 0

    def drop_idle(self) -> None:
        """Forget all cached prefixes that nobody holds (new weights, benchmarks)."""
        for pool in self.pools:
            pool.free_idle()
        self.index.clear()

    def flush(self) -> None:
        """Upload changed page-table rows."""
        self._table.flush()

    def audit(self, holders: Sequence[Request]) -> None:
        """Raise InvariantError unless the books balance against the requests that hold pages."""
        for g, pool in enumerate(self.pools):
            pool.check()
            expected = Counter(page for request in holders for page in request.pages[g][request.freed[g] :])
            for page, refs in enumerate(pool.references()):
                if refs != expected.get(page, 0):
                    raise InvariantError(
                        f"page {page} of group {g} has {refs} references; {expected.get(page, 0)} requests hold it"
                    )
        for request in holders:
            for g, pages in enumerate(request.pages):
                row = self._table.host[g, request.index].tolist()
                if row != pages + [TRASH] * (len(row) - len(pages)):
                    raise InvariantError(f"the page table of request {request.request_id} differs from its books")
                if len(pages) * self.page_size < request.slots(g):
                    raise InvariantError(f"request {request.request_id} has fewer pages than slots in group {g}")
