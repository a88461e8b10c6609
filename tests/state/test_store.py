"""The state store alone: commits at every offset, ghosts, forks, spills, books.

The definition is the scan over the accepted rows of one request, from zero; everything is compared bit for bit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy import CONV_STATE, HEADS, KEY, LINEAR_STATE, TAPS, VALUE, WIDTH, conv_scan, linear_scan

from headrace.cache.states import (
    StateBlob,
    StateStore,
    chains_only,
    check_decoder,
    group_states,
    state_bytes,
)
from headrace.errors import ConfigError, InvariantError
from headrace.step import Commit, LayerState

STATES = [LINEAR_STATE, LayerState("paged", 1, 2, 2), CONV_STATE, LINEAR_STATE]
"""Layers 0 and 3 are linear attention, layer 2 a short convolution."""
TAPS_CE = torch.randn(TAPS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SCANS = {0: linear_scan, 2: partial(conv_scan, TAPS_CE), 3: linear_scan}
GHOST = 4


def make_store(dtype: torch.dtype = torch.float64) -> StateStore:
    return StateStore(group_states(STATES), max_reqs=GHOST, dtype=dtype, device=torch.device("cpu"))


def inputs_of(layer: int, keys: list[int]) -> tuple[Tensor, ...]:
    """Inputs of rows, a function of the layer and a number a row."""
    shapes = [(WIDTH,)] if layer == 2 else [(HEADS, KEY), (HEADS, KEY), (HEADS, VALUE), (HEADS, KEY)]
    rows = []
    for key in keys:
        generator = torch.Generator().manual_seed(100 * key + layer)
        rows.append([torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes])
    columns = zip(*rows) if rows else [[] for _ in shapes]
    return tuple(
        torch.stack(column) if column else torch.empty(0, *shape, dtype=torch.float64)
        for column, shape in zip(list(map(list, columns)), shapes)
    )


def expected(layer: int, keys: list[int]) -> tuple[Tensor, Tensor]:
    """Outputs and state of one request that takes these rows in one scan."""
    shape = STATES[layer].state_shape
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    out, state = SCANS[layer](zero, inputs_of(layer, keys), torch.tensor([0, len(keys)]))
    return out, state[0]


def run(
    store: StateStore,
    rows: dict[int, list[int]],
    n_kv: list[int],
    path: tuple[list[list[int]], list[int]] | None = None,
    padding: int = 0,
) -> dict[int, Tensor]:
    """One step: rows by request index, then the commit. Returns the outputs by layer."""
    borders = list(itertools.accumulate((len(keys) for keys in rows.values()), initial=0))
    step = store.step(torch.tensor(list(rows), dtype=torch.int32), torch.tensor(borders, dtype=torch.int32))
    keys = [key for group in rows.values() for key in group]
    outs = {}
    for layer, scan in SCANS.items():
        inputs = [torch.cat([x, x.new_full((padding, *x.shape[1:]), torch.nan)]) for x in inputs_of(layer, keys)]
        outs[layer] = step.recur(layer, inputs, scan)
    n_kv_B = torch.tensor(n_kv, dtype=torch.int32)
    none_B = torch.zeros(len(n_kv), 1, dtype=torch.int32)
    commit = Commit(n_kv_B, n_kv_B, none_B, none_B)
    if path is not None:
        commit.path, commit.path_from = (torch.tensor(x, dtype=torch.int32) for x in path)
    step.commit(commit, n_kv_B)
    return outs


def expect(store: StateStore, taken: dict[int, list[int]]) -> None:
    """Each request's states are those of the rows it has taken."""
    for index, keys in taken.items():
        for layer in SCANS:
            assert torch.equal(store.state(layer, index), expected(layer, keys)[1]), (index, layer)
    store.audit({index: len(keys) for index, keys in taken.items()})


def test_rollback_at_every_offset() -> None:
    """Three requests with four rows each, every number of accepted rows; then each goes on with other rows."""
    for n_kv in itertools.product(range(5), (0, 2, 4), (1, 4)):
        store = make_store()
        taken: dict[int, list[int]] = {}
        for index, number in ((2, 0), (0, 1), (3, 2)):
            store.admit(index)
            taken[index] = [10 * number, 10 * number + 1]
        run(store, taken, [2, 2, 2])
        rows = {index: [keys[0] + 2 + i for i in range(4)] for index, keys in taken.items()}
        outs = run(store, rows, list(n_kv), padding=3)
        for at, index in enumerate(rows):
            for layer in SCANS:
                out, _ = expected(layer, taken[index] + rows[index])
                assert torch.equal(outs[layer][4 * at : 4 * at + 4], out[2:])
        taken = {index: keys + rows[index][:n] for (index, keys), n in zip(taken.items(), n_kv, strict=True)}
        expect(store, taken)
        more = {index: [50 + index] for index in taken}
        run(store, more, [1, 1, 1])
        expect(store, {index: keys + more[index] for index, keys in taken.items()})


def test_accepted_rows_may_lie_apart() -> None:
    """A path names the accepted rows behind the first ones."""
    for n_kv in range(5):
        store = make_store()
        store.admit(1)
        store.admit(0)
        run(store, {1: [1, 2, 3, 4, 5, 6], 0: [7, 8]}, [n_kv, 1], path=([[3, 5], [0, 0]], [2, 1]))
        expect(store, {1: [1, 2, 4, 6][:n_kv], 0: [7]})


def test_ghosts_and_padding_write_trash_alone() -> None:
    """Ghost requests with broken inputs, whole and refused, before and behind a real one."""
    for refused in (False, True):
        store = make_store()
        store.admit(1)
        store.admit(2)
        run(store, {1: [1, 2], 2: [3]}, [2, 1])
        before = {layer: pool.clone() for layer, pool in store.layers.items()}
        reqs_B = torch.tensor([GHOST, 1, GHOST], dtype=torch.int32)
        step = store.step(reqs_B, torch.tensor([0, 2, 3, 4], dtype=torch.int32))
        for layer, scan in SCANS.items():
            broken = [torch.full_like(x, torch.nan) for x in inputs_of(layer, [0] * 6)]
            for x, real in zip(broken, inputs_of(layer, [4]), strict=True):
                x[2] = real[0]
            step.recur(layer, broken, scan)
        n_kv_B = torch.tensor([1, 1, 1] if refused else [2, 1, 1], dtype=torch.int32)
        step.commit(Commit(n_kv_B, n_kv_B, n_kv_B[:, None], n_kv_B[:, None]), n_kv_B)
        for layer, pool in store.layers.items():
            assert torch.equal(pool[[1, 3, 4]], before[layer][[1, 3, 4]])
            assert pool[0].isnan().any()
        expect(store, {1: [1, 2, 4], 2: [3]})
        run(store, {2: [5], 1: [6]}, [1, 1], padding=5)
        expect(store, {1: [1, 2, 4, 6], 2: [3, 5]})


def test_a_step_without_a_commit_changes_nothing() -> None:
    store = make_store()
    store.admit(0)
    run(store, {0: [1]}, [1])
    step = store.step(torch.tensor([0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32))
    for layer, scan in SCANS.items():
        step.recur(layer, inputs_of(layer, [2, 3]), scan)
    expect(store, {0: [1]})


def test_spilled_states_go_on_elsewhere() -> None:
    """Interrupted after every number of rows; the old slot is used by somebody else meanwhile."""
    for cut in range(5):
        store = make_store()
        store.admit(0)
        run(store, {0: list(range(cut))}, [cut])
        blob = store.spill(0)
        store.release(0)
        assert blob.tokens == cut
        store.admit(0)
        run(store, {0: [70, 71]}, [2])
        store.restore(3, blob)
        run(store, {3: list(range(cut, 6)), 0: [72]}, [6 - cut, 1])
        expect(store, {3: list(range(6)), 0: [70, 71, 72]})


def test_books_balance_whatever_happens(events: Counter[str]) -> None:
    """Random steps, refusals, forks, spills and releases: states are those of each request's own rows."""
    events.update(dict.fromkeys(["examples", "refused", "whole", "fork", "spill", "restore", "release", "no rows"], 0))
    verbs = st.sampled_from(["admit", "step", "step", "step", "fork", "spill", "restore", "release"])

    @settings(max_examples=120, deadline=None)
    @given(st.lists(verbs, min_size=8, max_size=30), st.data())
    def play(plan: list[str], data: st.DataObject) -> None:
        store = make_store()
        taken: dict[int, list[int]] = {}
        blobs: list[tuple[StateBlob, list[int]]] = []
        key = 0
        for verb in plan:
            free = [index for index in range(GHOST) if index not in taken]
            if verb in ("admit", "restore", "fork") and not free:
                continue
            if verb == "admit":
                index = data.draw(st.sampled_from(free))
                store.admit(index)
                taken[index] = []
            elif verb == "restore" and blobs:
                index = data.draw(st.sampled_from(free))
                blob, keys = blobs.pop()
                store.restore(index, blob)
                taken[index] = keys
                events["restore"] += 1
            elif not taken:
                continue
            elif verb == "step":
                rows, n_kv = {}, []
                for index in data.draw(st.permutations(sorted(taken)))[: data.draw(st.integers(1, GHOST))]:
                    count = data.draw(st.integers(0, 4))
                    rows[index] = list(range(key, key + count))
                    key += count
                    n_kv.append(data.draw(st.integers(0, count)))
                    events["refused" if n_kv[-1] < count else "whole"] += 1
                    events["no rows"] += not count
                run(store, rows, n_kv, padding=data.draw(st.integers(0, 2)))
                for (index, keys), n in zip(rows.items(), n_kv, strict=True):
                    taken[index] = taken[index] + keys[:n]
            else:
                index = data.draw(st.sampled_from(sorted(taken)))
                if verb == "fork":
                    child = data.draw(st.sampled_from(free))
                    store.fork(index, child)
                    taken[child] = taken[index]
                elif verb == "spill":
                    blobs.append((store.spill(index), taken[index]))
                else:
                    store.release(index)
                    del taken[index]
                events[verb] += verb != "restore"
            expect(store, taken)
        for index in list(taken):
            store.release(index)
        store.audit({})
        events["examples"] += 1

    play()


def test_what_would_unbalance_the_books_is_refused() -> None:
    store = make_store()
    store.admit(0)
    with pytest.raises(InvariantError, match="held already"):
        store.admit(0)
    with pytest.raises(InvariantError, match="held already"):
        store.fork(0, 0)
    with pytest.raises(InvariantError, match="does not exist"):
        store.admit(GHOST)
    for verb in (store.release, store.spill, lambda index: store.fork(index, 3)):
        with pytest.raises(InvariantError, match="nobody holds it"):
            verb(2)
    with pytest.raises(InvariantError, match="requests hold"):
        store.audit({})
    with pytest.raises(InvariantError, match="1 are committed"):
        store.audit({0: 1})
    with pytest.raises(ConfigError, match="spilled from"):
        store.restore(1, StateBlob(0, store.spill(0).states[:1]))
    step = store.step(torch.tensor([0], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    n_kv_B = torch.ones(1, dtype=torch.int32)
    step.recur(0, inputs_of(0, [1]), linear_scan)
    with pytest.raises(InvariantError, match=r"layers \[2, 3\] did not recur"):
        step.commit(Commit(n_kv_B, n_kv_B, n_kv_B[:, None], n_kv_B[:, None]), n_kv_B)
    for layer in (0, 1):
        with pytest.raises(InvariantError, match=f"layer {layer} "):
            step.recur(layer, inputs_of(0, [1]), linear_scan)


def test_layers_group_by_shape_and_bytes_are_those_allocated() -> None:
    groups = group_states(STATES, 5)
    assert [group.layers for group in groups] == [(5, 8), (7,)]
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
        store = make_store(dtype)
        assert {pool.dtype for pool in store.layers.values()} == {torch.float64 if size == 8 else torch.float32}
        assert store.allocated_bytes == state_bytes(groups, GHOST, dtype)
        assert store.allocated_bytes == 5 * size * (2 * HEADS * KEY * VALUE + (TAPS - 1) * WIDTH)
    with pytest.raises(ConfigError, match="every axis"):
        group_states([LayerState("fixed", state_shape=(2, 0))])
    with pytest.raises(ConfigError, match="every axis"):
        group_states([LayerState("fixed")])
    with pytest.raises(ConfigError, match="ring of -1"):
        group_states([LayerState("fixed", state_shape=(2,), ring=-1)])


def test_decoders_that_states_cannot_follow_are_refused() -> None:
    groups = group_states(STATES)
    ring = LINEAR_STATE.ring
    assert chains_only(groups)
    assert not chains_only([])
    check_decoder("d", groups, drafts=ring, tree=False)
    check_decoder("d", [], drafts=99, tree=True, own=[LayerState("paged", 1, 2, 2)])
    with pytest.raises(ConfigError, match=f"draft_tokens to at most {ring}"):
        check_decoder("d", groups, drafts=ring + 1, tree=False)
    with pytest.raises(ConfigError, match="'d' verifies trees, but layer 0"):
        check_decoder("d", groups, drafts=0, tree=True)
    with pytest.raises(ConfigError, match="'d' has a model of its own"):
        check_decoder("d", [], drafts=1, tree=False, own=[CONV_STATE])
