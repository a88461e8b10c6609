"""Linear maps with norm, gate and sum: bit for bit the operations they are composed of, and the cuts for a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elementwise import EPS, LAYOUTS, numbers, strided

from headrace.kernels.gpu_sizes import next_power
from headrace.kernels.project import project, project_onto
from headrace.kernels.project.gpu_shape import MAX_SPLITS, MOST_ROWS, Chip, Product, block_rows, choose_shape
from headrace.kernels.project.reference import project_onto_reference, project_reference
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_composition(dtype: torch.dtype, layout: str, biased: bool) -> None:
    x_RE = strided(numbers(0, 7, 48, dtype=dtype), layout)
    weight_NE, norm_E = numbers(1, 90, 48, dtype=dtype), numbers(2, 48, dtype=dtype)
    bias_N = numbers(3, 90, dtype=dtype) if biased else None
    plain = F.linear(x_RE, weight_NE, bias_N)
    normed = F.linear(rms_norm(x_RE, norm_E, EPS), weight_NE, bias_N)
    assert torch.equal(project(x_RE, weight_NE, bias_N), plain)
    assert torch.equal(project(x_RE, weight_NE, bias_N, norm=(norm_E, EPS)), normed)
    assert torch.equal(project(x_RE, weight_NE, bias_N, gated=True), silu_mul(plain))
    got = project(x_RE, weight_NE, bias_N, norm=(norm_E, EPS), gated=True)
    assert torch.equal(got, silu_mul(normed))
    expected = project_reference(x_RE, weight_NE, bias_N, norm=(norm_E, EPS), gated=True)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10)

    y_RN = strided(numbers(4, 7, 90, dtype=dtype), layout)
    sums = [y_RN.clone(memory_format=torch.preserve_format) for _ in range(3)]
    project_onto(sums[0], x_RE, weight_NE, bias_N)
    sums[1].addmm_(x_RE, weight_NE.t())
    if bias_N is not None:
        sums[1].add_(bias_N)
    project_onto_reference(sums[2], x_RE, weight_NE, bias_N)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    assert not torch.equal(sums[0], y_RN)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: project(torch.ones(3, 4), torch.ones(5, 3)), RuntimeError),
        (lambda: project(torch.ones(3, 4), torch.ones(5, 4), torch.ones(4)), RuntimeError),
        (lambda: project(torch.ones(3, 4), torch.ones(5, 4, dtype=torch.float64)), RuntimeError),
        (lambda: project(torch.ones(3, 4), torch.ones(5, 4), gated=True), ValueError),
        (lambda: project(torch.ones(3, 4), torch.ones(5, 4), norm=(torch.ones(5), EPS)), ValueError),
        (lambda: project_onto(torch.ones(3, 5), torch.ones(3, 4), torch.ones(6, 4)), RuntimeError),
        (lambda: project_onto(torch.ones(2, 5), torch.ones(3, 4), torch.ones(5, 4)), RuntimeError),
    ],
)
def test_wrong_shapes(call: Callable[[], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


@settings(max_examples=500, deadline=None, database=None)
@given(data=st.data())
def check_cuts(events: Counter[str], data: st.DataObject) -> None:
    sizes = st.one_of(st.integers(1, 300), st.sampled_from([1024, 2048, 3072, 4096, 6144, 14336, 28672, 151936]))
    gated = data.draw(st.booleans(), "gated")
    rows = data.draw(st.integers(1, MOST_ROWS), "rows")
    product = Product(rows, data.draw(sizes, "outputs") * (1 + gated), data.draw(sizes, "inputs"), 2, gated)
    chip = Chip(data.draw(st.integers(1, 160), "processors"), data.draw(st.sampled_from([99, 227]), "KiB") * 2**10)
    shape = choose_shape(product, chip)
    sides = (shape.block_n, shape.block_e, shape.splits, shape.n_warps)
    assert all(side == next_power(side) for side in sides)
    assert 1 <= shape.splits <= MAX_SPLITS
    # Every split has inputs, but for those that whole tiles leave over.
    tiles = -(-product.inputs // shape.block_e)
    assert shape.splits <= tiles
    if not shape.is_row:
        weights = shape.block_n * (2 if gated else 1)
        assert shape.block_n >= 16
        assert shape.block_e >= 16
        assert shape.n_stages >= 2
        assert shape.n_stages * (weights + block_rows(rows)) * shape.block_e * 2 <= chip.shared_bytes
    events["split"] += shape.splits > 1
    events["whole"] += shape.splits == 1
    events["one row"] += shape.is_row
    events["narrow"] += shape.block_n == 16


def test_cuts(events: Counter[str]) -> None:
    check_cuts(events)
