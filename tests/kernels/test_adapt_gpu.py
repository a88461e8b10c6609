"""The GPU forms of low-rank changes against the reference, rows that do not know of each other, graphs."""

from __future__ import annotations

from collections import Counter

import gpu_forms
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adapt import numbers, places, some_factors
from torch import Tensor

from headrace.kernels.adapt import Factors
from headrace.kernels.adapt.gpu import MOST_SINGLE_ROWS, adapt_gpu_
from headrace.kernels.adapt.reference import adapt_reference_

pytestmark = gpu_forms.marks
DEVICE, HAS_GPU = gpu_forms.DEVICE, gpu_forms.HAS_GPU
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the largest result; the interpreter cuts float32 off where compiled code rounds it to bfloat16, twice.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float64: 1e-14}
FORMS = {"rows": 10**9, "tiles": 0}
PROFILE = settings(
    max_examples=60 if HAS_GPU else 8,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def there(factors: Factors) -> Factors:
    a, b, borders, borders_P = factors
    return Factors(a.to(DEVICE), b.to(DEVICE), borders, borders_P.to(DEVICE))


def run(y: Tensor, x: Tensor, slot_R: Tensor, factors: Factors, form: str) -> Tensor:
    out = y.to(DEVICE, copy=True)
    adapt_gpu_(out, x.to(DEVICE), slot_R.to(DEVICE), there(factors), single_rows=FORMS[form])
    return out.cpu()


@PROFILE
@given(data=st.data())
def check(events: Counter[str], form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, 45 if form == "tiles" or HAS_GPU else 12), "rows")
    inputs = data.draw(st.one_of(st.integers(1, 70), st.just(700)), "inputs")
    outputs = data.draw(st.lists(st.one_of(st.integers(1, 50), st.just(300)), min_size=1, max_size=3), "outputs")
    rank, slots = data.draw(st.integers(1, 17), "rank"), data.draw(st.integers(2, 5), "slots")
    seed = data.draw(st.integers(0, 999), "seed")
    factors = some_factors(seed, slots, inputs, outputs, rank, dtype)
    slot_R = places(seed, rows, slots)
    x, y = numbers(seed + 2, rows, inputs, dtype=dtype), numbers(seed + 3, rows, sum(outputs), dtype=dtype)
    expected = y.clone()
    adapt_reference_(expected, x, slot_R, factors)
    found = run(y, x, slot_R, factors, form)
    if y.numel():
        bound = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
        assert (found.double() - expected.double()).abs().max() <= bound
    assert torch.equal(found[slot_R == 0], y[slot_R == 0])
    events["several places"] += len(set(slot_R.tolist()) - {0}) > 1
    events["no rows"] += rows == 0
    events["several shares of inputs"] += inputs > 512
    events["several blocks of outputs"] += max(outputs) > 256


# In float64 each row is on its own, however many there are.
@pytest.mark.parametrize(("form", "dtype"), [(f, d) for f in FORMS for d in TYPES if (f, d) != ("tiles", TYPES[3])])
def test_forms(form: str, dtype: torch.dtype, events: Counter[str], device: torch.device) -> None:
    check(events, form, dtype)


@pytest.mark.parametrize("dtype", TYPES[:3])
@pytest.mark.parametrize("form", list(FORMS))
def test_bits_of_a_row(form: str, dtype: torch.dtype, device: torch.device) -> None:
    """Within a form, alone and in any batch: the same bits."""
    rows = 37 if form == "tiles" or HAS_GPU else 13
    factors = some_factors(1, 4, 600, [96, 33], 8, dtype)
    x, y, slot_R = numbers(2, rows, 600, dtype=dtype), numbers(3, rows, 129, dtype=dtype), places(4, rows, 4)
    whole = run(y, x, slot_R, factors, form)
    for first, count in ((0, 1), (rows - 1, 1), (7, 2), (3, rows // 2)):
        part = slice(first, first + count)
        assert torch.equal(run(y[part], x[part], slot_R[part], factors, form), whole[part])


@pytest.mark.parametrize("form", list(FORMS))
def test_bad_numbers_stay_in_their_row(form: str, device: torch.device) -> None:
    factors = some_factors(1, 3, 20, [9, 8], 4, torch.float32)
    x, y, slot_R = (
        numbers(2, 6, 20, dtype=torch.float32),
        numbers(3, 6, 17, dtype=torch.float32),
        torch.tensor([1, 1, 0, 2, 1, 2], dtype=torch.int32),
    )
    clean = run(y, x, slot_R, factors, form)
    for bad in (torch.nan, torch.inf):
        broken = x.clone()
        broken[4, 3] = bad
        out = run(y, broken, slot_R, factors, form)
        others = torch.arange(6) != 4
        assert torch.equal(out[others], clean[others])
        assert not out[4].isfinite().all()


@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [MOST_SINGLE_ROWS, MOST_SINGLE_ROWS + 1])
def test_a_graph_gives_the_same(rows: int) -> None:
    """Other places, other factors, other numbers at the same addresses."""
    factors = there(some_factors(1, 4, 600, [96, 33], 8, torch.bfloat16))
    x, y = (numbers(2, rows, n, dtype=torch.bfloat16).to(DEVICE) for n in (600, 129))
    slot_R = places(4, rows, 4).to(DEVICE)
    out = y.clone()
    adapt_gpu_(out, x, slot_R, factors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        adapt_gpu_(out, x, slot_R, factors)
    for tensor in (x, y, slot_R, factors.a_SEK):
        tensor.copy_(tensor.flip(0))
    graph.replay()
    expected = y.clone()
    adapt_gpu_(expected, x, slot_R, factors)
    assert torch.equal(out, expected)
