"""Chunks whose own rows are computed beside the pages, against the reference."""

from __future__ import annotations

from typing import Any

import gpu_forms
import pytest
import torch
from test_attention import Case, compare, make_case
from test_attention_gpu import TOLERANCE, by_reference, on
from torch import Tensor

from headrace.kernels.attention import Chain, gpu, squares

pytestmark = gpu_forms.marks
DEVICE = gpu_forms.DEVICE
# The interpreter does not multiply bfloat16.
DTYPE = torch.bfloat16 if gpu_forms.HAS_GPU else torch.float16


@pytest.fixture(autouse=True)
def small_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "GRAIN", 4)
    monkeypatch.setattr(squares, "LEAST", 4)


def case_of(counts: tuple[int, ...], committed: tuple[int, ...], size: int = 64, **options: Any) -> Case:
    kinds = ["causal"] * len(counts)
    case = make_case(
        len(counts),
        dtype=DTYPE,
        counts=counts,
        committed=committed,
        kinds=kinds,
        size=size,
        group=2,
        page_size=4,
        **options,
    )
    return on(case, DEVICE)


def chains_of(counts: tuple[int, ...], committed: tuple[int, ...]) -> list[Chain]:
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return [Chain(f, r, n) for f, r, n in zip(firsts, counts, committed, strict=True) if r > 1]


def own_of(case: Case, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of the rows, as they stand in the pools."""
    size = case.k_KPSD.shape[2]
    req_R = case.rows.req_R.long()
    k_R = torch.cat([torch.arange(n, device=DEVICE) for n in counts])
    slot_R = case.kv_len_B[req_R].long() + k_R
    place_R = case.page_table_BP[req_R, slot_R // size].long() * size + slot_R % size
    k_RKD, v_RKD = (pool.flatten(1, 2)[:, place_R].transpose(0, 1) for pool in (case.k_KPSD, case.v_KPSD))
    return k_RKD, v_RKD


@pytest.mark.parametrize(
    ("counts", "committed"),
    [
        ((8,), (0,)),  # one square and nothing else
        ((8,), (5,)),
        ((11,), (0,)),  # rows behind the square
        ((1, 9, 4, 1, 3, 6), (7, 0, 10, 0, 2, 1)),
    ],
)
def test_squares_are_the_reference(counts: tuple[int, ...], committed: tuple[int, ...]) -> None:
    case = case_of(counts, committed)
    chains = chains_of(counts, committed)
    tables = case.page_table_BP, case.kv_len_B
    plan = gpu.GpuPlan(case.rows, *tables, case.k_KPSD.shape[2], chains)
    assert [square.rows for square in plan.squares] == [n // 4 * 4 for n in counts if n >= 4]
    own = own_of(case, counts)
    for _ in range(2):  # layers share the plan
        out, _ = gpu.attend(
            case.q_RHD, case.rows, case.k_KPSD, case.v_KPSD, *tables, scale=case.options["scale"], plan=plan, own=own
        )
        expected, _ = by_reference(case)
        torch.testing.assert_close(
            out.double().cpu(), expected.double().cpu(), rtol=0.0, atol=TOLERANCE[DTYPE], equal_nan=False
        )


def test_the_square_is_not_read_from_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would pass without squares."""
    counts, committed = (8,), (5,)
    case = case_of(counts, committed)
    tables = case.page_table_BP, case.kv_len_B
    plan = gpu.GpuPlan(case.rows, *tables, case.k_KPSD.shape[2], chains_of(counts, committed))
    k_RKD, v_RKD = own_of(case, counts)
    arguments: Any = (case.q_RHD, case.rows, case.k_KPSD, case.v_KPSD, *tables)
    options: Any = {"scale": case.options["scale"], "plan": plan}
    plain, _ = gpu.attend(*arguments, **options, own=(k_RKD, v_RKD))
    other, _ = gpu.attend(*arguments, **options, own=(k_RKD, v_RKD + 1))
    assert (plain - other).abs().min() > 0.01


@pytest.mark.parametrize("option", [{"window": 3}, {"softcap": 5.0}, {"sinks": True}, {"size": 48}])
def test_what_a_square_cannot_do_goes_by_pages(option: dict[str, Any]) -> None:
    counts, committed = (8, 5), (5, 0)
    case = case_of(counts, committed, **option)
    tables = case.page_table_BP, case.kv_len_B
    plan = gpu.GpuPlan(case.rows, *tables, case.k_KPSD.shape[2], chains_of(counts, committed))
    own = tuple(torch.full_like(x, float("nan")) for x in own_of(case, counts))
    got = gpu.attend(
        case.q_RHD, case.rows, case.k_KPSD, case.v_KPSD, *tables, **case.options, need_lse=True, plan=plan, own=own
    )
    compare(case, got, by_reference(case), TOLERANCE[DTYPE])
    got = gpu.attend(case.q_RHD, case.rows, case.k_KPSD, case.v_KPSD, *tables, **case.options, plan=plan, own=own)
    assert not got[0].isnan().any()
