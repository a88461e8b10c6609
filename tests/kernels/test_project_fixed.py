"""Products with a fixed order of sums on the CPU: near the definition, and a row's bits are its own."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elementwise import EPS, LAYOUTS, numbers, strided

from headrace.kernels.cpu_types import TYPES
from headrace.kernels.project_fixed import cpu, project_fixed, project_fixed_onto
from headrace.kernels.project_fixed.gpu_shape import FEW_ROWS, GRAIN_E, choose_shape, choose_splits
from headrace.kernels.project_fixed.reference import project_fixed_onto_reference, project_fixed_reference
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def check_rows(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), "dtype")
    rows, outputs, inputs = (data.draw(st.integers(1, most)) for most in (12, 300, 200))
    weight_NE = numbers(1, outputs, inputs, dtype=dtype)
    if data.draw(st.booleans(), "outputs side by side"):
        wide_EN = weight_NE.new_empty(inputs, outputs + data.draw(st.integers(0, 16)))
        wide_EN[:, :outputs] = weight_NE.t()
        weight_NE = wide_EN[:, :outputs].t()
        events["outputs side by side"] += outputs > 1 and dtype in TYPES
    x_RE = strided(numbers(2, rows, inputs, dtype=dtype), data.draw(st.sampled_from(LAYOUTS), "layout of x"))
    y_RN = strided(numbers(3, rows, outputs, dtype=dtype), data.draw(st.sampled_from(LAYOUTS), "layout of y"))
    bias_N = numbers(4, outputs, dtype=dtype) if data.draw(st.booleans(), "bias") else None
    exact_RN = x_RE.double() @ weight_NE.double().t()
    size = float(exact_RN.abs().max()) + 1.0
    exact_bias_N = 0.0 if bias_N is None else bias_N.double()
    got_RN = project_fixed(x_RE, weight_NE, bias_N)
    sum_RN = y_RN.clone(memory_format=torch.preserve_format)
    project_fixed_onto(sum_RN, x_RE, weight_NE, bias_N)
    for result_RN, expected_RN in (
        (got_RN, exact_RN + exact_bias_N),
        (sum_RN, y_RN.double() + exact_RN + exact_bias_N),
    ):
        assert float((result_RN.double() - expected_RN).abs().max()) <= TOLERANCE[dtype] * 4 * size
    expected_RN = project_fixed_reference(x_RE, weight_NE, bias_N)
    torch.testing.assert_close(got_RN, expected_RN, rtol=0, atol=TOLERANCE[dtype] * 4 * size)
    again_RN = y_RN.clone()
    project_fixed_onto_reference(again_RN, x_RE, weight_NE, bias_N)
    torch.testing.assert_close(sum_RN, again_RN, rtol=0, atol=TOLERANCE[dtype] * 8 * size)

    # A row among others, at another place, or by itself.
    order_R = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[: data.draw(st.integers(1, rows))]
    assert torch.equal(project_fixed(x_RE[order_R], weight_NE, bias_N), got_RN[order_R])
    part_RN = y_RN[order_R]
    project_fixed_onto(part_RN, x_RE[order_R], weight_NE, bias_N)
    assert torch.equal(part_RN, sum_RN[order_R])
    events["one row of several"] += len(order_R) == 1 < rows
    events["more products than a thread takes"] += rows * outputs * inputs > cpu._SERIAL_BELOW
    events[str(dtype)] += 1


def test_rows_are_functions_of_themselves(events: Counter[str]) -> None:
    events.update(dict.fromkeys(["outputs side by side", "one row of several", "more products than a thread takes"], 0))
    check_rows(events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_library_sums_by_the_number_of_rows(dtype: torch.dtype, events: Counter[str]) -> None:
    """What this is for: were the comparison above made with the library, it would fail."""
    x_RE, weight_NE = numbers(1, 64, 1000, dtype=dtype), numbers(2, 300, 1000, dtype=dtype)
    whole_RN = F.linear(x_RE, weight_NE)
    alone_RN = torch.cat([F.linear(x_RE[i : i + 1], weight_NE) for i in range(64)])
    events["rows that differ"] += int((whole_RN != alone_RN).any(1).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate_are_the_operations(dtype: torch.dtype) -> None:
    x_RE, weight_NE, norm_E = (numbers(i, *n, dtype=dtype) for i, n in enumerate([(7, 48), (90, 48), (48,)]))
    plain = project_fixed(rms_norm(x_RE, norm_E, EPS), weight_NE)
    assert torch.equal(project_fixed(x_RE, weight_NE, norm=(norm_E, EPS)), plain)
    assert torch.equal(project_fixed(x_RE, weight_NE, norm=(norm_E, EPS), gated=True), silu_mul(plain))


@pytest.mark.parametrize(
    "call",
    [
        lambda: project_fixed(torch.ones(3, 4), torch.ones(5, 3)),
        lambda: project_fixed(torch.ones(3, 4), torch.ones(5, 4), torch.ones(4)),
        lambda: project_fixed(torch.ones(3, 4), torch.ones(5, 4, dtype=torch.float64)),
        lambda: project_fixed_onto(torch.ones(3, 4), torch.ones(3, 4), torch.ones(5, 4)),
        lambda: project_fixed_onto(torch.ones(3, 5, dtype=torch.float64), torch.ones(3, 4), torch.ones(5, 4)),
    ],
)
def test_refuses_what_does_not_fit(call: Any) -> None:
    with pytest.raises(ValueError, match=r"one type for all|the product|outputs|and the weight"):
        call()


def test_no_rows() -> None:
    assert project_fixed(torch.ones(0, 4), torch.ones(5, 4)).shape == (0, 5)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("outputs", [1, 77, 1024, 4096, 6144, 28672, 151936])
@pytest.mark.parametrize("inputs", [1, 100, 1024, 3072, 14336])
def test_order_follows_from_the_weight_only(outputs: int, inputs: int, itemsize: int) -> None:
    """Splits are those of the weight, and the kind of matrix instruction is one, whatever the rows."""
    splits = choose_splits(outputs, inputs, itemsize)
    for rows in (1, 2, 64, FEW_ROWS, FEW_ROWS + 1, 8192):
        shape = choose_shape(rows, outputs, inputs, itemsize)
        assert shape.splits == splits
        assert GRAIN_E % shape.block_e == 0
        assert not shape.apart or (splits > 1 and rows <= FEW_ROWS)
        if itemsize == 2:
            assert shape.block_r == 64 * (shape.n_warps // 4)
        else:
            assert shape[:4] == (32, 32, 32, splits)
