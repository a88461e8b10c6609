"""The cache manager: the only one who writes page tables, reference counts and the prefix index.

Layers that keep the same thing form a group; a group has one page table and one pool of pages. The manager
decides nothing: the scheduler says who gets rows, the manager makes room for them. Invariants (checked by
`audit`): every page is free, idle or held; references equal the holders; no shared page is ever written,
because a request writes only behind its committed slots and shared pages are whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.cache.pages import TRASH, PagePool
from headrace.cache.prefix import PrefixIndex
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


def group_layers(states: Sequence[LayerState], first: int = 0) -> list[CacheGroup]:
    """One group for each distinct kind of layer, in order of appearance; layers are counted from `first`.

    Layers with fixed states have no pages and are passed over. Raises ConfigError for a kind of layer that no cache
    exists for.
    """
    layers: dict[LayerState, list[int]] = {}
    for layer, state in enumerate(states, first):
        if state.kind == "fixed":
            continue  # headrace/cache/states.py
        if state.kind not in ("paged", "window"):
            raise ConfigError(
                f"layer {layer} keeps {state.kind!r}, for which there is no cache; known: paged, window, fixed"
            )
        layers.setdefault(state, []).append(layer)
    return [CacheGroup(tuple(members), state) for state, members in layers.items()]


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
        self.index = PrefixIndex(page_size, namespace)
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
        """The longest published prefix; the last known token is always left to recompute. Changes nothing."""
        if not self.prefix_caching or request.scores_prompt:
            return Hit(0, 0)
        self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
        units = (request.n_tok - 1) // self.page_size
        nodes = list(self.index.match(request.unit_keys, request.tokens, units))
        idle = max((sum(pool.is_idle(node.pages[g]) for node in nodes) for g, pool in enumerate(self.pools)), default=0)
        return Hit(len(nodes) * self.page_size, idle)

    def admit(self, request: Request, index: int) -> None:
        """Take the hit: share its pages and set the request's clocks to its end. Writes the page-table row."""
        hit = self.look_up(request)
        nodes = list(self.index.match(request.unit_keys, request.tokens, hit.tokens // self.page_size))
        request.pages = [[node.pages[g] for node in nodes] for g in range(len(self.groups))]
        for g, pages in enumerate(request.pages):
            for page in pages:
                self.pools[g].share(page)
            self._table.host[g, index, : len(pages)] = pages
        self._table.touch(index)
        request.n_done = request.hit_tokens = hit.tokens
        request.published = len(nodes)
        self.hit_tokens += hit.tokens
        self.queried_tokens += request.n_tok

    def fork(self, parent: Request, child: Request, index: int, slots: int) -> None:
        """Give `child` the first `slots` slots of `parent`: whole pages are shared, the rest of the last is copied."""
        whole, rest = divmod(slots, self.page_size)
        child.pages = [pages[:whole] for pages in parent.pages]
        for g, pages in enumerate(child.pages):
            for page in pages:
                self.pools[g].share(page)
            if rest:
                fresh = self.pools[g].take()
                for pool_LKPSD in (self._k_LKPSD[g], self._v_LKPSD[g]):
                    pool_LKPSD[:, :, fresh] = pool_LKPSD[:, :, parent.pages[g][whole]]
                pages.append(fresh)
            self._table.host[g, index, : len(pages)] = pages
        self._table.touch(index)
        child.n_done = child.hit_tokens = slots
        child.published = whole
        self.hit_tokens += slots
        self.queried_tokens += child.n_tok

    def reserve(self, request: Request, rows: int) -> None:
        """Pages for `rows` slots behind the committed ones."""
        wanted = -(-(request.n_done + rows) // self.page_size)
        for g, pages in enumerate(request.pages):
            while len(pages) < wanted:
                page = self.pools[g].take()
                self._table.host[g, request.index, len(pages)] = page
                self._table.touch(request.index)
                pages.append(page)

    def publish(self, request: Request) -> int:
        """Offer the request's newly whole units to others. Returns the slots that are read-only now, 0 if no more."""
        if not self.prefix_caching:
            return 0
        whole = request.n_done // self.page_size
        if whole <= request.published:
            return 0
        self.index.extend_keys(request.unit_keys, request.tokens, request.salt)
        for k in range(request.published, whole):
            unit = request.tokens[k * self.page_size : (k + 1) * self.page_size]
            self.index.publish(request.unit_keys[k], unit, tuple(pages[k] for pages in request.pages))
        request.published = whole
        return request.published * self.page_size

    def release(self, request: Request) -> None:
        """Give back every page. Later units go first, so that they are reclaimed before their parents."""
        for g, pages in enumerate(request.pages):
            self._table.host[g, request.index, : len(pages)] = TRASH
            for page in reversed(pages):
                self.pools[g].drop(page, keep=self.index.holds(g, page))
        self._table.touch(request.index)
        request.pages = []
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
            expected = Counter(page for request in holders for page in request.pages[g])
            for page, refs in enumerate(pool.references()):
                if refs != expected.get(page, 0):
                    raise InvariantError(
                        f"page {page} of group {g} has {refs} references; {expected.get(page, 0)} requests hold it"
                    )
        for request in holders:
            for g, pages in enumerate(request.pages):
                row = self._table.host[g, request.index, : len(pages)].tolist()
                if row != pages:
                    raise InvariantError(f"the page table of request {request.request_id} differs from its books")
