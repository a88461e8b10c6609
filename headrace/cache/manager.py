"""The cache manager: the only one who writes page tables, reference counts and the prefix index.

Layers that keep the same thing form a group; a group has one page table and one pool of pages, and what a page holds
is its codec's business. Under a codec that seals pages it has two of each: rows are written to pages of the open pool,
and whole pages behind them move into the sealed one. Pool g is the open one of group g, the sealed ones follow. The
manager decides nothing: the scheduler says who gets rows, the manager makes room for them. Invariants (checked by
`audit`): every page is free, idle or held; references equal the holders; no shared page is ever written,
because a request writes only behind its committed slots and shared pages are whole, and a compaction that would write
to one takes a fresh page instead.

Two clocks: a request has committed `n_done` tokens, which fill `request.slots(g)` slots of group g. In layers with a
window a slot's place is its token's index, and pages wholly behind the window are given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.cache.compact import Move, gather, plan_move, scatter
from headrace.cache.pages import TRASH, PagePool
from headrace.cache.prefix import PrefixIndex, PrefixNode
from headrace.errors import ConfigError, InvariantError
from headrace.kernels.place import place
from headrace.ranks import ONE, Ranks
from headrace.request import Request
from headrace.step import LayerState, Mirror, PageCodec, flush


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share one length and one page table."""

    layers: tuple[int, ...]
    state: LayerState
    codec: PageCodec


class Hit(NamedTuple):
    """What the prefix index holds for a request."""

    tokens: int
    idle_pages: tuple[int, ...]
    """Pages of the hit by pool that nobody holds; they count as available until the hit is taken."""


def group_layers(
    states: Sequence[LayerState], codec: PageCodec, first: int = 0, split: bool = False
) -> list[CacheGroup]:
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
    return [CacheGroup(tuple(members), state, codec) for (state, _), members in layers.items()]


class Pool(NamedTuple):
    """What the pages of one pool hold, and how many there are."""

    group: int
    number: int
    """Which of its codec's classes."""
    page_bytes: int
    pages: int


def plan_pools(groups: Sequence[CacheGroup], n_pages: int, page_size: int, max_reqs: int) -> list[Pool]:
    """The pools of a cache: the open ones of all groups, then the sealed ones.

    Open pages that are sealed later are not needed for all tokens: of them there are no more than `max_reqs` requests
    hold at once.
    """
    pools: list[Pool] = []
    classes = [group.codec.classes(group.state) for group in groups]
    for number in range(max(map(len, classes), default=0)):
        for g, (group, mine) in enumerate(zip(groups, classes, strict=True)):
            if number < len(mine):
                size = len(group.layers) * mine[number].bytes_per_page(group.state.kv_heads, page_size)
                some = number == 0 and len(mine) > 1
                pages = min(n_pages, 1 + max_reqs * group.codec.open_pages) if some else n_pages
                pools.append(Pool(g, number, size, pages))
    return pools


def cache_bytes(groups: Sequence[CacheGroup], n_pages: int, page_size: int, max_reqs: int) -> int:
    """Bytes of all pools."""
    return sum(pool.pages * pool.page_bytes for pool in plan_pools(groups, n_pages, page_size, max_reqs))


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
        device: torch.device,
        prefix_caching: bool,
        namespace: str,
        ranks: Ranks = ONE,
    ) -> None:
        self._ranks = ranks
        self.groups = list(groups)
        self.page_size = page_size
        self.n_pages = n_pages
        self.prefix_caching = prefix_caching
        self._plan = plan_pools(self.groups, n_pages, page_size, max_reqs)
        self.index = PrefixIndex(page_size, namespace, [self._seen_rule(pool) for pool in self._plan])
        self.pools = [PagePool(pool.pages, partial(self.index.forget, p)) for p, pool in enumerate(self._plan)]
        self.planes: list[list[Tensor]] = []
        """By pool, one tensor a plane with memory of its own: [L, K, P, S, *shape] or [L, K, P, *shape]."""
        self._all_planes: list[list[Tensor]] = []
        """By pool, one tensor a plane of its class, those that are parts of others among them."""
        for pool in self._plan:
            group = self.groups[pool.group]
            axes = (len(group.layers), group.state.kv_heads, pool.pages)
            planes = group.codec.classes(group.state)[pool.number].planes
            own = {
                x.name: torch.empty(*axes, *(() if x.by_page else (page_size,)), *x.shape, dtype=x.dtype, device=device)
                for x in planes
                if not x.within
            }
            self.planes.append(list(own.values()))
            self._all_planes.append([own[x.within][..., : x.shape[0]] if x.within else own[x.name] for x in planes])
        self._group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        self._pools_of = [[p for p, pool in enumerate(self._plan) if pool.group == g] for g in range(len(self.groups))]
        # One view a layer, made once: slicing the pools in every layer of every step would cost more than the look-up.
        self._views = {
            layer: tuple(tuple(x[i] for x in self._all_planes[p]) for p in self._pools_of[g])
            for g, group in enumerate(self.groups)
            for i, layer in enumerate(group.layers)
        }
        most = -(-max_len // page_size)
        self._table = Mirror((len(self.pools), max_reqs + 1, most), torch.int32, device, TRASH, axis=1)
        self.hit_tokens = 0
        self.queried_tokens = 0

    def _seen_rule(self, pool: Pool) -> Callable[[int], range] | None:
        """Which whole pages of a pool rows from a token index on see; None: all."""
        group, size = self.groups[pool.group], self.page_size
        window, codec = group.state.window, group.codec
        if window:
            return lambda tokens: range(max(0, tokens - window + 1) // size, tokens // size)
        if pool.number:
            return lambda tokens: range(codec.sealed(tokens) // size)
        if codec.open_pages:
            return lambda tokens: range(codec.sealed(tokens) // size, tokens // size)
        return None

    @property
    def page_table_GBP(self) -> Tensor:
        """Page ids of the pools that rows are written to, int32 [G, Bmax+1, Pmax]."""
        return self._table.device_table[: len(self.groups)]

    def page_tables(self, group: int) -> list[Tensor]:
        """Page ids by class, int32 [Bmax+1, Pmax] each. In front of an open page and behind a sealed one: trash."""
        return [self._table.device_table[p] for p in self._pools_of[group]]

    def group_of(self, layer: int) -> int:
        """Group of a layer."""
        return self._group_of[layer]

    def layer_pools(self, layer: int) -> tuple[Tensor, ...]:
        """The planes of one layer that rows are written to, [K, P, S, *shape] each."""
        return self._views[layer][0]

    def layer_planes(self, layer: int) -> tuple[tuple[Tensor, ...], ...]:
        """All planes of one layer by class, [K, P, S, *shape] or [K, P, *shape] each."""
        return self._views[layer]

    def pool_slots(self, request: Request, ahead: int = 0) -> tuple[int, ...]:
        """Committed slots by pool that a running request has pages for, and `ahead` more."""
        n, dropped = request.n_done + ahead, request.dropped
        return tuple([n - dropped[pool.group] for pool in self._plan]) if dropped else (n,) * len(self._plan)

    def prefix_pages(self, tokens: int) -> tuple[int, ...]:
        """Pages by pool that a request which begins with so many cached tokens has, those given back included."""
        return tuple(self.index.seen(p, tokens).stop for p in range(len(self.pools)))

    @property
    def pool_groups(self) -> list[int]:
        """The group of each pool."""
        return [pool.group for pool in self._plan]

    def place(self, group: int, kv_len_B: Tensor, req_X: Tensor, dst_X: Tensor) -> Tensor:
        """Physical slots of a group, int64 [X], of slots counted from the end of the committed ones, `kv_len_B`; slots
        outside the table are trash."""
        return place(req_X, dst_X, kv_len_B, self.page_table_GBP[group], self.page_size)

    def move(self, groups: range, kv_len_GB: Tensor, req_X: Tensor, from_X: Tensor, to_X: Tensor) -> None:
        """Copy slots within requests, all sources read before anything is written.

        Sources and targets are counted from the end of the committed slots, `kv_len_GB` [G, Bmax+1].
        """
        for g in groups:
            source_X = self.place(g, kv_len_GB[g], req_X, from_X)
            target_X = self.place(g, kv_len_GB[g], req_X, to_X)
            for plane in self.planes[g]:
                slots_LKXD = plane.flatten(2, 3)
                slots_LKXD[:, :, target_X] = slots_LKXD[:, :, source_X]

    @property
    def available(self) -> tuple[int, ...]:
        """Pages by pool that can be taken now."""
        return tuple(pool.available for pool in self.pools)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(x.numel() * x.element_size() for planes in self.planes for x in planes)

    def capacity_tokens(self) -> int:
        """Longest request that fits when it is alone."""
        return (self.n_pages - 1) * self.page_size

    def look_up(self, request: Request) -> Hit:
        """The longest published prefix; the last known token is always left to recompute. Changes nothing.

        A hit ends before the first eviction: later tokens have seen less than those of the entry.
        """
        if not self.prefix_caching or request.scores_prompt:
            return Hit(0, (0,) * len(self.pools))
        nodes = self._chain(request)
        tokens = len(nodes) * self.page_size
        idle = tuple(
            sum(pool.is_idle(nodes[k].pages[p]) for k in self.index.seen(p, tokens))
            for p, pool in enumerate(self.pools)
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
        self._share(request, index, [[node.pages[p] for node in nodes] for p in range(len(self.pools))], tokens)
        request.published = len(nodes)

    def _share(self, request: Request, index: int, pages: Sequence[Sequence[int]], tokens: int) -> None:
        """Begin with `tokens` slots whose whole pages are those of somebody else, but for what is behind a window."""
        request.freed, request.dropped, request.pages = [], [0] * len(self.groups), []
        for p, theirs in enumerate(pages):
            seen = self.index.seen(p, tokens)
            mine = [TRASH] * seen.start + list(theirs[seen.start : seen.stop])
            for page in mine[seen.start :]:
                self.pools[p].share(page)
            self._table.host[p, index, : len(mine)] = mine
            request.pages.append(mine)
            request.freed.append(seen.start)
        self._table.touch(index)
        request.n_done = request.hit_tokens = tokens
        self.hit_tokens += tokens
        self.queried_tokens += request.n_tok

    def settle(self, request: Request, index: int, pages: list[list[int]]) -> None:
        """Begin with these pages by pool, to which the request has references already, but for trash behind a
        window."""
        request.pages = pages
        for g, mine in enumerate(pages):
            self._table.host[g, index, : len(mine)] = mine
        self._table.touch(index)

    def can_fork(self, parent: Request, slots: int) -> bool:
        """Whether the parent still has all that a request sees that begins with its first `slots` tokens."""
        return not any(parent.dropped) and all(
            freed <= self.index.seen(p, slots).start for p, freed in enumerate(parent.freed)
        )

    def fork(self, parent: Request, child: Request, index: int, slots: int) -> None:
        """Give `child` the first `slots` slots of `parent`: whole pages are shared, the rest of the last is copied."""
        whole, rest = divmod(slots, self.page_size)
        self._share(child, index, [pages[:whole] for pages in parent.pages], slots)
        for g in range(len(self.groups) if rest else 0):
            fresh, pages = self.pools[g].take(), child.pages[g]
            for plane_LKPX in self.planes[g]:
                plane_LKPX[:, :, fresh] = plane_LKPX[:, :, parent.pages[g][whole]]
            self._table.host[g, index, len(pages)] = fresh
            pages.append(fresh)
        child.published = whole

    def reserve(self, request: Request, rows: int) -> None:
        """Pages for `rows` slots behind the committed ones.

        In sealed pools too, so that sealing never lacks any.
        """
        grows = not request.peak_cache_slots
        for p, pages in enumerate(request.pages):
            wanted = -(-(request.slots(self._plan[p].group) + rows) // self.page_size)
            while len(pages) < wanted:
                page = self.pools[p].take()
                self._table.host[p, request.index, len(pages)] = page
                self._table.touch(request.index)
                pages.append(page)
                grows = True
        if not grows:
            return  # most steps of most requests
        held = [len(pages) - freed for pages, freed in zip(request.pages, request.freed, strict=True)]
        request.peak_cache_slots = max(request.peak_cache_slots, max(held, default=0) * self.page_size)
        request.peak_cache_bytes = max(request.peak_cache_bytes, self.bytes_of_pages(held))

    def held_bytes(self, request: Request) -> int:
        """Bytes of the pages that a request holds now, shared ones included."""
        return self.bytes_of_pages(
            [len(pages) - freed for pages, freed in zip(request.pages, request.freed, strict=True)]
        )

    def bytes_of_pages(self, pages: Sequence[int]) -> int:
        """Bytes of so many pages by pool."""
        return sum(n * pool.page_bytes for n, pool in zip(pages, self._plan, strict=False))

    def publish(self, request: Request) -> int:
        """Offer the request's newly whole units to others. Returns the slots that are read-only now, 0 if no more.

        Tokens from the first eviction on are never published: their cache is not that of a whole prefill.
        """
        whole = min(request.n_done, request.exact_len) // self.page_size
        if whole <= request.published or not self.prefix_caching or any(request.dropped):
            return 0
        self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
        for k in range(request.published, whole):
            unit = request.tokens[k * self.page_size : (k + 1) * self.page_size]
            self.index.publish(request.unit_keys[k], unit, self._unit_pages(request, k))
        request.published = whole
        return request.published * self.page_size

    def _unit_pages(self, request: Request, k: int) -> list[int]:
        """The pages of a unit by pool; trash where there is none, or nothing is in it yet."""
        sealed = [k < request.freed[pool.group] for pool in self._plan]
        return [
            pages[k] if pool.number == 0 or ready else TRASH
            for pool, pages, ready in zip(self._plan, request.pages, sealed, strict=True)
        ]

    def seal(self, request: Request) -> None:
        """Move the whole pages that its codec seals at `request.n_done` into sealed pages; the open ones go back.

        Entries of the prefix index get the sealed pages too.
        """
        for p, pool in enumerate(self._plan):
            if pool.number == 0:
                continue
            g, codec = pool.group, self.groups[pool.group].codec
            first, end = request.freed[g], codec.sealed(request.n_done) // self.page_size
            if end <= first:
                continue
            sealed = codec.seal([plane[:, :, request.pages[g][first:end]] for plane in self._all_planes[g]])
            for plane, contents in zip(self._all_planes[p], sealed, strict=True):
                plane[:, :, request.pages[p][first:end]] = contents
            self.free_behind(request, range(g, g + 1))
            if not self.prefix_caching:
                continue
            self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
            for k in range(first, min(end, request.published)):
                unit = request.tokens[k * self.page_size : (k + 1) * self.page_size]
                mine = [page if q == p else TRASH for q, page in enumerate(self._unit_pages(request, k))]
                self.index.publish(request.unit_keys[k], unit, mine)

    def free_behind(self, request: Request, groups: range) -> None:
        """Give back the open pages of `groups` that no later token sees: behind the window, or sealed."""
        for g in groups:
            pages = request.pages[g]
            end = min(self.index.seen(g, request.n_done).start, len(pages))
            for k in range(request.freed[g], end):
                self.pools[g].drop(pages[k], keep=self.index.holds(g, pages[k]))
                pages[k] = TRASH
                self._table.host[g, request.index, k] = TRASH
                self._table.touch(request.index)
            request.freed[g] = max(request.freed[g], end)

    def keys(self, request: Request, group: int) -> Tensor:
        """The committed keys of a group, decoded, a copy [L, K, n, D] in the order of slots."""
        return self._contents(request, group)[0]

    def values(self, request: Request, group: int) -> Tensor:
        """The committed values of a group, decoded, a copy [L, K, n, Dv] in the order of slots."""
        return self._contents(request, group)[1]

    def _contents(self, request: Request, group: int) -> tuple[Tensor, Tensor]:
        n, front = request.slots(group), request.freed[group]
        parts: list[tuple[Tensor, Tensor]] = []
        for p in reversed(self._pools_of[group]):  # sealed pages stand in front of the open ones
            end = -(-n // self.page_size)
            pages = request.pages[p][:front] if self._plan[p].number else request.pages[p][:end]
            if len(self._pools_of[group]) > 1 and not self._plan[p].number:
                pages = pages[front:]
            picked = [plane[:, :, pages] for plane in self._all_planes[p]]
            parts.append(self.groups[group].codec.decode(self._plan[p].number, picked))
        k_LKnD, v_LKnD = (torch.cat(x, 2).flatten(2, 3)[:, :, :n] for x in zip(*parts, strict=True))
        return k_LKnD, v_LKnD

    def compact(self, request: Request, keep: Mapping[int, Tensor]) -> dict[int, Move] | None:
        """Keep only some slots of a request and release the pages behind them: the one mover.

        keep: by group int64 [L, K, m], for each cell the slots that stay, ascending. Slots keep their order. Pages
        that others see too are never written: where slots of such a page move, a fresh page takes its place, and the
        published entry survives.

        Returns what was done by group, or None, with nothing changed, if pages lack for that: call again when others
        have given some back. A request that shares with nobody never lacks any.
        """
        moves = {g: plan_move(keep_LKm, request.slots(g), self.page_size, self._ranks) for g, keep_LKm in keep.items()}
        for g, move in moves.items():
            pages, pool = request.pages[g], self.pools[g]
            lost = [k for k in move.rewritten if not self._owned(g, pages[k])]
            back = [*lost, *range(move.pages, len(pages))]
            if len(lost) > pool.available + sum(pool.is_alone(pages[k]) for k in back):
                return None
        for g, move in moves.items():
            pages, pool, row = request.pages[g], self.pools[g], self._table.host[g, request.index]
            kept = [(plane, gather(plane, pages, move.source_LKx)) for plane in self.planes[g]]
            move.fresh.extend(k for k in move.rewritten if not self._owned(g, pages[k]))
            # Later pages first, so that of a published prefix the end is reclaimed before the beginning.
            for k in [*reversed(range(move.pages, len(pages))), *reversed(move.fresh)]:
                pool.drop(pages[k], keep=self.index.holds(g, pages[k]))
            row[move.pages : len(pages)] = TRASH
            del pages[move.pages :]
            for k in move.fresh:
                pages[k] = row[k] = pool.take()
            for plane_LKPSD, kept_LKxD in kept:
                scatter(plane_LKPSD, pages, move.first, kept_LKxD)
            request.dropped[g] += move.dropped
        self._table.touch(request.index)
        return moves

    def _owned(self, group: int, page: int) -> bool:
        """Whether one request holds the page and nobody else can come to see it."""
        return self.pools[group].is_alone(page) and not self.index.holds(group, page)

    def release(self, request: Request) -> None:
        """Give back every page. Later units go first, so that they are reclaimed before their parents."""
        for p, pages in enumerate(request.pages):
            self._table.host[p, request.index, : len(pages)] = TRASH
            for page in reversed(pages[request.freed[p] :]):
                self.pools[p].drop(page, keep=self.index.holds(p, page))
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
        flush((self._table,))

    def audit(self, holders: Sequence[Request]) -> None:
        """Raise InvariantError unless the books balance against the requests that hold pages."""
        for p, pool in enumerate(self.pools):
            pool.check()
            expected = Counter(page for request in holders for page in request.pages[p][request.freed[p] :])
            for page, refs in enumerate(pool.references()):
                if refs != expected.get(page, 0):
                    raise InvariantError(
                        f"page {page} of pool {p} has {refs} references; {expected.get(page, 0)} requests hold it"
                    )
        for request in holders:
            slots = self.pool_slots(request)
            for p, (pool_plan, pages) in enumerate(zip(self._plan, request.pages, strict=True)):
                row = self._table.host[p, request.index].tolist()
                if row != pages + [TRASH] * (len(row) - len(pages)):
                    raise InvariantError(f"the page table of request {request.request_id} differs from its books")
                if len(pages) * self.page_size < slots[p]:
                    raise InvariantError(f"request {request.request_id} has fewer pages than slots in pool {p}")
                codec = self.groups[pool_plan.group].codec
                if pool_plan.number and codec.sealed(request.n_done) != request.freed[pool_plan.group] * self.page_size:
                    raise InvariantError(f"request {request.request_id} has not sealed what its codec seals")
