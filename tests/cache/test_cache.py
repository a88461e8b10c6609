"""Pages, prefix index and manager: the books balance whatever happens, and a hit is exact."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.manager import CacheManager, cache_bytes, group_layers
from headrace.cache.pages import PagePool
from headrace.cache.prefix import PrefixIndex
from headrace.codecs.base import Setup
from headrace.codecs.model import ModelType
from headrace.errors import ConfigError, InvariantError
from headrace.params import SamplingParams
from headrace.request import Request
from headrace.step import LayerState

CODEC = ModelType(Setup(torch.float32, 4))


def make_request(tokens: list[int], **params: int) -> Request:
    return Request("r", len(tokens), list(tokens), SamplingParams(**params), 0, 0, (0, 0), 10**6, ())


def make_manager(n_pages: int = 16, page_size: int = 4, groups: int = 1, prefix: bool = True) -> CacheManager:
    states = [LayerState("paged", 1, 2, 2), *(LayerState("window", 1, 2, 2, window=8 * g) for g in range(1, groups))]
    return CacheManager(
        group_layers(states, CODEC),
        n_pages=n_pages,
        page_size=page_size,
        max_reqs=8,
        max_len=64,
        device=torch.device("cpu"),
        prefix_caching=prefix,
        namespace="test",
    )


def test_pool_refuses_what_would_unbalance_the_books() -> None:
    pool = PagePool(3)
    page = pool.take()
    pool.drop(page, keep=False)
    with pytest.raises(InvariantError, match="no reference"):
        pool.drop(page, keep=False)
    with pytest.raises(InvariantError, match="is free"):
        pool.share(page)
    pool.take(), pool.take()
    with pytest.raises(InvariantError, match="no page is available"):
        pool.take()


def test_idle_pages_are_reclaimed_oldest_first() -> None:
    gone: list[int] = []
    pool = PagePool(4, gone.append)
    pages = [pool.take() for _ in range(3)]
    for page in pages:
        pool.drop(page, keep=True)
    pool.share(pages[0])
    assert pool.take() == pages[1]
    assert gone == [pages[1]]
    pool.check()


def test_a_hash_collision_is_a_miss() -> None:
    index = PrefixIndex(2, "n")
    keys: list[bytes] = []
    index.extend_keys(keys, [1, 2])
    index.publish(keys[0], [1, 2], (5,))
    assert [n.pages for n in index.match(keys, [1, 2, 3], 1)] == [(5,)]
    assert list(index.match(keys, [7, 8, 3], 1)) == []


def test_keys_depend_on_everything_before() -> None:
    index, keys, other = PrefixIndex(2, "n"), list[bytes](), list[bytes]()
    index.extend_keys(keys, [1, 2, 3, 4])
    index.extend_keys(other, [9, 2, 3, 4])
    assert len(keys) == 2
    assert keys[1] != other[1]
    elsewhere: list[bytes] = []
    PrefixIndex(2, "m").extend_keys(elsewhere, [1, 2, 3, 4])
    assert keys[0] != elsewhere[0]


def test_the_last_token_is_always_left_to_compute() -> None:
    manager = make_manager()
    first = make_request(list(range(8)))
    manager.admit(first, 0)
    first.index = 0
    manager.reserve(first, 8)
    first.n_done = 8
    assert manager.publish(first) == 8
    assert manager.look_up(make_request(list(range(8)))).tokens == 4
    assert manager.look_up(make_request(list(range(9)))).tokens == 8
    assert manager.look_up(make_request(list(range(9)), prompt_logprobs=0)).tokens == 0
    manager.release(first)
    assert manager.pools[0].held == 0
    assert manager.look_up(make_request(list(range(9)))) == (manager.look_up(make_request(list(range(9)))))
    assert manager.look_up(make_request(list(range(9)))).idle_pages == (2,)


def test_a_tail_is_forgotten_before_its_parent() -> None:
    manager = make_manager(n_pages=4)
    first = make_request(list(range(8)))
    first.index = 0
    manager.admit(first, 0)
    manager.reserve(first, 8)
    first.n_done = 8
    manager.publish(first)
    manager.release(first)
    other = make_request([99] * 8)
    other.index = 1
    manager.admit(other, 1)
    manager.reserve(other, 8)
    assert manager.look_up(make_request(list(range(9)))).tokens == 4
    manager.audit([other])


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_books_balance_whatever_happens(groups: int, events: Counter[str]) -> None:
    """Random admissions, growth, publications and releases: every page is in one place, hits hold the right tokens."""
    events.update(dict.fromkeys(["hit", "reclaim", "full", "published"], 0))

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        manager = make_manager(
            n_pages=data.draw(st.integers(4, 14)), page_size=data.draw(st.sampled_from([1, 2, 4])), groups=groups
        )
        contents: dict[tuple[int, int], tuple[int, ...]] = {}
        live: list[Request] = []
        for _ in range(data.draw(st.integers(1, 30))):
            if live and data.draw(st.booleans()):
                request = live.pop(data.draw(st.integers(0, len(live) - 1)))
                index = request.index
                manager.release(request)
                request.index = -1
                assert manager._table.host[:, index].max() == 0
            elif len(live) < 8:
                length = data.draw(st.integers(1, 24))
                tokens = [data.draw(st.integers(0, 1)) if i < 6 else 0 for i in range(length)]
                request = make_request(tokens)
                hit = manager.look_up(request)
                fresh = -(-length // manager.page_size) - hit.tokens // manager.page_size
                if any(fresh + idle > free for idle, free in zip(hit.idle_pages, manager.available, strict=True)):
                    events["full"] += 1
                    continue
                request.index = min(set(range(8)) - {r.index for r in live})
                before = sum(pool.reclaimed for pool in manager.pools)
                manager.admit(request, request.index)
                assert request.n_done == hit.tokens < length
                check_contents(manager, request, contents, request.n_done)
                events["hit"] += hit.tokens > 0
                manager.reserve(request, length - request.n_done)
                events["reclaim"] += sum(pool.reclaimed for pool in manager.pools) > before
                request.n_done = length
                for g, pages in enumerate(request.pages):
                    for k, page in enumerate(pages):
                        if page:
                            contents[g, page] = tuple(tokens[: (k + 1) * manager.page_size])
                size = len(manager.index)
                manager.publish(request)
                events["published"] += len(manager.index) > size
                live.append(request)
            manager.audit(live)
        for request in live:
            manager.release(request)
        manager.audit([])
        assert all(pool.held == 0 for pool in manager.pools)
        events["examples"] += 1

    run()


def check_contents(
    manager: CacheManager, request: Request, contents: dict[tuple[int, int], tuple[int, ...]], done: int
) -> None:
    """The pages of a hit were written with exactly this prefix."""
    for g, pages in enumerate(request.pages):
        window = manager.groups[g].state.window
        # Behind the window nothing is needed; all that the next token sees is there.
        assert request.freed[g] == (max(0, done - window + 1) // manager.page_size if window else 0)
        for k, page in enumerate(pages):
            if k < request.freed[g]:
                assert page == 0
            else:
                assert contents[g, page] == tuple(request.tokens[: (k + 1) * manager.page_size])
        assert len(pages) * manager.page_size == done


def test_layers_group_by_what_they_keep() -> None:
    full, window = LayerState("paged", 2, 8, 8), LayerState("window", 2, 8, 8, window=16)
    groups = group_layers([full, window, full, window, window], CODEC)
    assert [g.layers for g in groups] == [(0, 2), (1, 3, 4)]
    assert cache_bytes(groups, 3, 16, 1) == 3 * 5 * 2 * 16 * 16 * 4
    with pytest.raises(ConfigError, match="layer 0 keeps 'conv'"):
        group_layers([LayerState("conv", 1, 1, 1)], CODEC)
