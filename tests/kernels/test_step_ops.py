"""The compiled forms of `place`, `walk` and `draw_rows` against their definitions, and `report` against its lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.advance import Advanced
from headrace.kernels.draw_rows import DrawTables
from headrace.kernels.draw_rows.cpu import draw_rows_cpu
from headrace.kernels.draw_rows.reference import draw_rows_reference
from headrace.kernels.place.cpu import place_cpu
from headrace.kernels.place.reference import place_reference
from headrace.kernels.report import HEAD, Priced
from headrace.kernels.report.reference import report_reference
from headrace.kernels.walk import Drafts, Walks
from headrace.kernels.walk.cpu import walk_cpu
from headrace.kernels.walk.reference import walk_reference

REQUESTS = 6


def ints(rng: np.random.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int32))


def tensors(result: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in tensors(part)]


def check_equal(got: Any, expected: Any) -> None:
    for x, y in zip(tensors(got), tensors(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.tolist() == y.tolist()


def check_place(form: Callable[..., torch.Tensor], n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    for size in (1, 4, 16):
        tables = ints(rng, 0, 20, REQUESTS + 1), ints(rng, 1, 99, REQUESTS + 1, 24 // size + 1)
        # Some are negative, some behind the table.
        dst_R = ints(rng, -9, 40, n_rows)
        for kind in (torch.int32, torch.int64):
            req_R = ints(rng, 0, REQUESTS + 1, n_rows).to(kind)
            check_equal(form(req_R, dst_R, *tables, size), place_reference(req_R, dst_R, *tables, size))


@pytest.mark.parametrize("n_rows", [0, 1, 5, 300])
def test_place(n_rows: int) -> None:
    check_place(place_cpu, n_rows)


def test_slots_outside_the_table_lie_in_the_trash_page() -> None:
    table_BP = torch.tensor([[7, 9]], dtype=torch.int32)
    dst_R = torch.tensor([-1, 0, 5, 7, 8, 2**20], dtype=torch.int32)
    for form in (place_cpu, place_reference):
        req_R, kv_len_B = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        assert form(req_R, dst_R, kv_len_B, table_BP, 4).tolist() == [3, 28, 37, 39, 0, 0]


def walk_case(rng: np.random.Generator, n_reqs: int, most: int) -> tuple[Walks, torch.Tensor, Drafts]:
    """Requests with some rows of a prompt, or all pending ones and some drafts; each has one draw at least."""
    n_done = ints(rng, 0, 9, REQUESTS + 1)
    n_tok = n_done + ints(rng, 1, 5, REQUESTS + 1)
    drafts = Drafts(ints(rng, 0, 2, REQUESTS + 1, most), ints(rng, 0, most + 1, REQUESTS + 1))
    reqs_B = torch.from_numpy(rng.permutation(REQUESTS + 1)[:n_reqs])
    pending_B = (n_tok - n_done)[reqs_B].long()
    whole_B = pending_B + ints(rng, 0, most + 1, n_reqs).minimum(drafts.count_B[reqs_B])
    part_B = pending_B.minimum(ints(rng, 1, 3, n_reqs).long())
    grant_B = torch.where(ints(rng, 0, 4, n_reqs) > 0, whole_B, part_B)
    n_out_B = grant_B.clamp(max=most + 1)
    first_B = n_out_B.cumsum(0) - n_out_B
    id_M = ints(rng, 0, 2, int(n_out_B.sum()))
    return Walks(n_tok, n_done, reqs_B, grant_B, n_out_B, first_B), id_M, drafts


def check_walk(form: Callable[..., Any], events: Counter[str], examples: int) -> None:
    events.update({"plain": 0, "part of a prompt": 0, "all drafts hold": 0, "some hold": 0, "none hold": 0})

    @settings(max_examples=examples, deadline=None)
    @given(seed=st.integers(0, 2**32), n_reqs=st.integers(1, REQUESTS), most=st.integers(0, 5))
    def run(seed: int, n_reqs: int, most: int) -> None:
        walks, id_M, drafts = walk_case(np.random.default_rng(seed), n_reqs, max(most, 1))
        given_drafts = drafts if most else None
        expected = walk_reference(walks, id_M, given_drafts)
        check_equal(form(walks, id_M, given_drafts), expected)
        if not most:
            events["plain"] += 1
            return
        pending_B = (walks.n_tok - walks.n_done)[walks.reqs_B]
        for pending, grant, emitted in zip(
            pending_B.tolist(), walks.grant_B.tolist(), expected.n_emit_B.tolist(), strict=True
        ):
            events["part of a prompt"] += emitted == 0
            if grant > pending:
                held = emitted - 1
                kind = "none hold" if not held else "all drafts hold" if held == grant - pending else "some hold"
                events[kind] += 1

    run()


def test_walk(events: Counter[str]) -> None:
    check_walk(walk_cpu, events, 400)


def test_the_walk_by_hand() -> None:
    """Two tokens pending and three drafts, of which the first two are what was drawn."""
    table = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32)
    one = torch.tensor([0])
    walks = Walks(*table, one, torch.tensor([5]), torch.tensor([4]), one)
    drafts = Drafts(torch.tensor([[8, 6, 7], [0, 0, 0]], dtype=torch.int32), torch.tensor([3, 0], dtype=torch.int32))
    for form in (walk_cpu, walk_reference):
        walked = form(walks, torch.tensor([8, 6, 1, 2], dtype=torch.int32), drafts)
        assert [x.tolist() for x in walked] == [[4], [3], [[8, 6, 1, 2]], [[0, 1, 2, 3]]]


def check_draw_rows(form: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    reals = [torch.from_numpy(rng.random(REQUESTS + 1, dtype=np.float32)) for _ in range(3)]
    top_k, stream = ints(rng, 0, 9, REQUESTS + 1), ints(rng, -9, 9, REQUESTS + 1, 2)
    tables = DrawTables(reals[0], top_k, reals[1], reals[2], stream)
    for n_rows, n_draws in ((1, 0), (1, 1), (9, 4), (300, 290)):
        req_R, t_R = ints(rng, 0, REQUESTS + 1, n_rows), ints(rng, 0, 99, n_rows)
        out_row_M = torch.from_numpy(rng.integers(0, n_rows, n_draws))
        for shift in (0, 1, 3):
            arguments = (tables, req_R, t_R, out_row_M, shift)
            check_equal(form(*arguments), draw_rows_reference(*arguments))


def test_draw_rows() -> None:
    check_draw_rows(draw_rows_cpu)


def report_case(n_reqs: int, e_max: int) -> tuple[Advanced, torch.Tensor, Priced]:
    rng = np.random.default_rng(n_reqs + e_max)
    emit_BE, priced_by_BE = ints(rng, 0, 99, n_reqs, e_max), ints(rng, 0, 2 * n_reqs + 1, n_reqs, e_max)
    logp_M = torch.from_numpy(rng.standard_normal(2 * n_reqs + 1, dtype=np.float32))
    return Advanced(*ints(rng, 0, 9, 3, n_reqs)), ints(rng, 0, 5, n_reqs), Priced(emit_BE, priced_by_BE, logp_M)


@pytest.mark.parametrize(("n_reqs", "e_max"), [(1, 1), (3, 4)])
def test_report(n_reqs: int, e_max: int) -> None:
    advanced, drafted_B, priced = report_case(n_reqs, e_max)
    out = report_reference(advanced, drafted_B, priced)
    assert out[:3].equal(torch.stack(tuple(advanced)))
    assert out[3].equal(drafted_B)
    assert out[HEAD : HEAD + e_max].t().equal(priced.emit_BE)
    logp_BE = out[HEAD + e_max :].view(torch.float32).t()
    assert logp_BE.equal(priced.logp_M[priced.priced_by_BE.long()])
    assert not report_reference(advanced, None, priced)[3].any()
