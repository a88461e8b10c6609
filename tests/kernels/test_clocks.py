"""The compiled forms of `advance` and `chain_rows` against their definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.advance import Advanced, Clocks
from headrace.kernels.advance.cpu import advance_cpu
from headrace.kernels.advance.reference import advance_reference
from headrace.kernels.chain_rows import History
from headrace.kernels.chain_rows.cpu import chain_rows_cpu
from headrace.kernels.chain_rows.reference import chain_rows_reference
from headrace.request import Finish
from headrace.step import RowTable

REQUESTS, LENGTH, STOPS = 6, 40, 3
ROW_COLUMNS = "tok req t pos dst a b c bits".split()


def ints(rng: np.random.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int32))


class CommitCase(NamedTuple):
    """Arguments of `advance`: requests in any order, then ghosts."""

    clocks: Clocks
    reqs_B: torch.Tensor
    n_kv_B: torch.Tensor
    n_emit_B: torch.Tensor
    emit_BE: torch.Tensor


def commit_case(seed: int, e_max: int, n_ghosts: int) -> CommitCase:
    rng = np.random.default_rng(seed)
    n_done = ints(rng, 0, 20, REQUESTS + 1)
    pending = ints(rng, 1, 4, REQUESTS + 1)
    far = torch.full_like(n_done, 2**30)
    near = rng.random() < 0.5
    clocks = Clocks(
        n_tok=n_done + pending,
        n_done=n_done,
        finish=torch.where(ints(rng, 0, 8, REQUESTS + 1) > 0, 0, int(Finish.STOP)).int(),
        hist=ints(rng, 0, 9, REQUESTS + 1, LENGTH),
        kv_len=n_done.repeat(2, 1) - ints(rng, 0, 3, 2, 1),
        limit=n_done + pending + ints(rng, 0, 6, REQUESTS + 1),
        trigger=n_done + ints(rng, 1, 8, REQUESTS + 1) if near else far,
        stop_ids=torch.where(ints(rng, 0, 2, REQUESTS + 1, STOPS) > 0, ints(rng, 0, 9, REQUESTS + 1, STOPS), -1),
    )
    reqs_B = torch.from_numpy(rng.permutation(REQUESTS)[: rng.integers(1, REQUESTS + 1)])
    n_emit_B = ints(rng, 0, e_max + 1, len(reqs_B))
    n_kv_B = torch.where(n_emit_B > 0, pending[reqs_B] + n_emit_B - 1, ints(rng, 0, 2, len(reqs_B)))
    emit_BE = torch.where(ints(rng, 0, 12, len(reqs_B), e_max) > 0, ints(rng, 0, 9, len(reqs_B), e_max), -1)
    nothing = torch.zeros(n_ghosts, dtype=torch.int32)
    return CommitCase(
        clocks,
        torch.cat((reqs_B, nothing.long() + REQUESTS)),
        torch.cat((n_kv_B, nothing + 2)),
        torch.cat((n_emit_B, nothing + 1)),
        torch.cat((emit_BE, ints(rng, -1, 9, n_ghosts, e_max))),
    )


def compare_advance(case: CommitCase, form: Callable[..., Advanced]) -> Advanced:
    mine, theirs = (Clocks(*(x.clone() for x in case.clocks)) for _ in range(2))
    got = form(mine, *case[1:])
    expected = advance_reference(theirs, *case[1:])
    for x, y in zip(got, expected, strict=True):
        assert x.tolist() == y.tolist()
    for name, x, y in zip(Clocks._fields, mine, theirs, strict=True):
        assert x[..., :REQUESTS].equal(y[..., :REQUESTS]) if name == "kv_len" else x[:REQUESTS].equal(y[:REQUESTS])
    for name in ("n_tok", "n_done", "kv_len"):
        before, after = getattr(case.clocks, name), getattr(mine, name)
        assert after[..., REQUESTS].equal(before[..., REQUESTS]), "the ghost never advances"
        ended_B = case.clocks.finish[:REQUESTS] != 0
        assert after[..., :REQUESTS][..., ended_B].equal(before[..., :REQUESTS][..., ended_B])
    return got


def check_advance(form: Callable[..., Advanced], events: Counter[str], examples: int) -> None:
    names = {0: "goes on", **{f.value: f.name.lower() for f in (Finish.STOP, Finish.LENGTH, Finish.ERROR)}}
    counted = "cut by a trigger,nothing emitted,several tokens,several ghosts,ended before"
    events.update(dict.fromkeys([*names.values(), *counted.split(",")], 0))

    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 2**32), e_max=st.integers(1, 6), n_ghosts=st.integers(0, 3))
    def run(seed: int, e_max: int, n_ghosts: int) -> None:
        case = commit_case(seed, e_max, n_ghosts)
        n_reqs = len(case.reqs_B) - n_ghosts
        got = Advanced(*(x[:n_reqs] for x in compare_advance(case, form)))
        reqs_B = case.reqs_B[:n_reqs]
        for reason in got.finish_B.tolist():
            events[names[reason]] += 1
        late_B = case.clocks.n_done[reqs_B] + case.n_kv_B[:n_reqs] > case.clocks.trigger[reqs_B]
        events["cut by a trigger"] += int(late_B.sum())
        events["nothing emitted"] += int((got.n_emit_B == 0).sum())
        events["several tokens"] += int((got.n_emit_B > 1).sum())
        events["several ghosts"] += n_ghosts > 1
        events["ended before"] += int((case.clocks.finish[reqs_B] != 0).sum())

    run()


def test_advance(events: Counter[str]) -> None:
    check_advance(advance_cpu, events, 400)


def check_chain_rows(form: Callable[..., None], events: Counter[str], examples: int) -> None:
    events.update({"chunk": 0, "decode": 0, "several axes": 0, "several rows of padding": 0})

    @settings(max_examples=examples, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
        padding=st.integers(0, 4),
        seed=st.integers(0, 2**32),
        axes=st.integers(1, 3),
    )
    def run(sizes: list[int], padding: int, seed: int, axes: int) -> None:
        rng = np.random.default_rng(seed)
        history = History(
            ints(rng, 0, 99, REQUESTS + 1, LENGTH), ints(rng, 0, 20, REQUESTS + 1), ints(rng, -3, 9, REQUESTS + 1)
        )
        n_rows, n_reqs = sum(sizes), len(sizes)
        reqs = rng.permutation(REQUESTS)[:n_reqs]
        # All rows of padding belong to the first ghost, at any offset; a second one has none.
        entry_R = torch.arange(n_reqs + 1).repeat_interleave(torch.tensor([*sizes, padding]))
        k_R = torch.cat([torch.arange(n, dtype=torch.int32) for n in (*sizes, padding)])
        tables: list[Any] = []
        for fill in (form, chain_rows_reference):
            rows = RowTable.allocate(n_rows + padding, n_reqs + 2, REQUESTS, axes, torch.device("cpu"))
            blank = {name: x[..., n_rows:].clone() for name, x in vars(rows).items() if name in ROW_COLUMNS}
            for name in blank:
                vars(rows)[name].fill_(5)
            rows.reqs[:n_reqs] = torch.from_numpy(reqs)
            fill(rows, history, entry_R, k_R)
            assert all(vars(rows)[name][..., n_rows:].equal(x) for name, x in blank.items()), "padding sees only itself"
            tables.append(vars(rows))
        assert all(x.equal(y) for x, y in zip(*(t.values() for t in tables), strict=True))
        events["chunk"] += max(sizes) > 1
        events["decode"] += min(sizes) == 1
        events["several axes"] += axes > 1
        events["several rows of padding"] += padding > 1

    run()


def test_chain_rows(events: Counter[str]) -> None:
    check_chain_rows(chain_rows_cpu, events, 100)
