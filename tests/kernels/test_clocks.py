"""The compiled forms of `advance` and `chain_rows` against their definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.advance import Clocks
from headrace.kernels.advance.cpu import advance_cpu
from headrace.kernels.advance.reference import advance_reference
from headrace.kernels.chain_rows import History
from headrace.kernels.chain_rows.cpu import chain_rows_cpu
from headrace.kernels.chain_rows.reference import chain_rows_reference
from headrace.request import Finish
from headrace.step import RowTable

REQUESTS, LENGTH, STOPS = 6, 40, 3


def ints(rng: np.random.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int32))


def test_advance(events: Counter[str]) -> None:
    names = {0: "goes on", **{f.value: f.name.lower() for f in (Finish.STOP, Finish.LENGTH, Finish.ERROR)}}
    events.update(dict.fromkeys([*names.values(), "cut by a trigger", "nothing emitted", "several tokens"], 0))
    events.update({"ended before": 0, "ghost": 0})

    @settings(max_examples=400, deadline=None)
    @given(seed=st.integers(0, 2**32), e_max=st.integers(1, 6))
    def run(seed: int, e_max: int) -> None:
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
        ghosts = [REQUESTS] * int(rng.integers(0, 3))
        reqs_B = torch.tensor([*rng.permutation(REQUESTS)[: rng.integers(1, REQUESTS + 1)], *ghosts])
        n_emit_B = ints(rng, 0, e_max + 1, len(reqs_B))
        n_kv_B = torch.where(n_emit_B > 0, pending[reqs_B] + n_emit_B - 1, ints(rng, 0, 2, len(reqs_B)))
        emit_BE = torch.where(ints(rng, 0, 12, len(reqs_B), e_max) > 0, ints(rng, 0, 9, len(reqs_B), e_max), -1)
        mine, theirs = (Clocks(*(x.clone() for x in clocks)) for _ in range(2))
        got = advance_cpu(mine, reqs_B, n_kv_B, n_emit_B, emit_BE)
        expected = advance_reference(theirs, reqs_B, n_kv_B, n_emit_B, emit_BE)
        for x, y in zip(got, expected, strict=True):
            assert x.tolist() == y.tolist()
        for name, x, y in zip(Clocks._fields, mine, theirs, strict=True):
            assert x[..., :REQUESTS].equal(y[..., :REQUESTS]) if name == "kv_len" else x[:REQUESTS].equal(y[:REQUESTS])
        for name in ("n_tok", "n_done", "kv_len"):
            before, after = getattr(clocks, name), getattr(mine, name)
            assert after[..., REQUESTS].equal(before[..., REQUESTS]), "the ghost never advances"
            still_B = clocks.finish[:REQUESTS] != 0
            assert after[..., :REQUESTS][..., still_B].equal(before[..., :REQUESTS][..., still_B])
        events["ghost"] += len(ghosts)
        events["ended before"] += int((clocks.finish[reqs_B] != 0).sum())
        for reason in got.finish_B.tolist():
            events[names[reason]] += 1
        events["cut by a trigger"] += int((clocks.n_done[reqs_B] + n_kv_B > clocks.trigger[reqs_B]).sum())
        events["nothing emitted"] += int((got.n_emit_B == 0).sum())
        events["several tokens"] += int((got.n_emit_B > 1).sum())

    run()


def test_chain_rows(events: Counter[str]) -> None:
    events.update({"chunk": 0, "decode": 0, "several axes": 0})

    @settings(max_examples=100, deadline=None)
    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 2**32), axes=st.integers(1, 3)
    )
    def run(sizes: list[int], seed: int, axes: int) -> None:
        rng = np.random.default_rng(seed)
        history = History(
            ints(rng, 0, 99, REQUESTS + 1, LENGTH), ints(rng, 0, 20, REQUESTS + 1), ints(rng, -3, 9, REQUESTS + 1)
        )
        reqs = rng.permutation(REQUESTS)[: len(sizes)]
        entry_R = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        k_R = torch.cat([torch.arange(n, dtype=torch.int32) for n in sizes])
        tables: list[Any] = []
        for fill in (chain_rows_cpu, chain_rows_reference):
            rows = RowTable.allocate(sum(sizes), len(sizes), REQUESTS, axes, torch.device("cpu"))
            rows.reqs.copy_(torch.from_numpy(reqs))
            rows.bits.fill_(5)
            fill(rows, history, entry_R, k_R)
            tables.append(vars(rows))
        assert all(x.equal(y) for x, y in zip(*(t.values() for t in tables), strict=True))
        events["chunk"] += max(sizes) > 1
        events["decode"] += min(sizes) == 1
        events["several axes"] += axes > 1

    run()
