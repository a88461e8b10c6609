"""Low-rank changes row by row: the compiled form against the reference and against dense changes, bits of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import cpu_elements
from headrace.kernels.adapt import Factors, adapt_
from headrace.kernels.adapt import cpu as form
from headrace.kernels.adapt.reference import adapt_reference_

COMPILED = [torch.float32, torch.bfloat16]
DTYPES = [*COMPILED, torch.float64, torch.float16]
# Of the largest result. Sums differ in their last bits, and such a bit may decide how A x is rounded to 16 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float64: 1e-14, torch.float16: 2**-9}
PROFILE = settings(
    max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_factors(seed: int, slots: int, inputs: int, outputs: Sequence[int], rank: int, dtype: torch.dtype) -> Factors:
    borders = (0, *torch.tensor(outputs).cumsum(0).tolist())
    a = numbers(seed, slots, inputs, rank * len(outputs), dtype=dtype) / max(inputs, 1) ** 0.5
    b = numbers(seed + 1, slots, rank, borders[-1], dtype=dtype) / rank**0.5
    return Factors(a, b, borders, torch.tensor(borders, dtype=torch.int32))


def places(seed: int, rows: int, slots: int) -> Tensor:
    """Runs of rows with one place each, as prompts make them, and single ones."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < rows:
        length = int(torch.randint(1, 9, (1,), generator=generator)) if len(found) % 3 else 1
        found += [int(torch.randint(0, slots, (1,), generator=generator))] * length
    return torch.tensor(found[:rows], dtype=torch.int32)


def dense(y_RN: Tensor, x_RE: Tensor, slot_R: Tensor, factors: Factors) -> Tensor:
    """y + W_s x in float64 with the whole matrix of every place."""
    rank = factors.b_SQN.shape[1]
    out = y_RN.double()
    for row, slot in enumerate(slot_R.tolist()):
        if slot:
            for p, (low, high) in enumerate(zip(factors.borders, factors.borders[1:])):
                a_EQ = factors.a_SEK[slot, :, p * rank : (p + 1) * rank].double()
                out[row, low:high] += x_RE[row].double() @ (a_EQ @ factors.b_SQN[slot, :, low:high].double())
    return out


@PROFILE
@given(data=st.data())
def check(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows = data.draw(st.integers(0, 40), "rows")
    inputs = data.draw(st.integers(1, 70), "inputs")
    outputs = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3), "outputs")
    rank, slots = data.draw(st.integers(1, 17), "rank"), data.draw(st.integers(1, 5), "slots")
    seed = data.draw(st.integers(0, 999), "seed")
    factors = some_factors(seed, slots, inputs, outputs, rank, dtype)
    slot_R = places(seed, rows, slots)
    wide = data.draw(st.booleans(), "views of wider tensors")
    x = numbers(seed + 2, rows, inputs + 3 * wide, dtype=dtype)[:, :inputs]
    y = numbers(seed + 3, rows, sum(outputs) + 5 * wide, dtype=dtype)
    beside, y = y[:, sum(outputs) :].clone(), y[:, : sum(outputs)]
    before, x_before = y.clone(), x.clone()
    expected = y.clone()
    adapt_reference_(expected, x, slot_R, factors)
    adapt_(y, x, slot_R, factors)
    bound = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0) if y.numel() else 0.0
    assert (y.double() - expected.double()).abs().max() <= bound if y.numel() else True
    assert (dense(before, x, slot_R, factors) - y.double()).abs().max() <= 4 * bound if y.numel() else True
    assert torch.equal(y[slot_R == 0], before[slot_R == 0])
    assert torch.equal(x, x_before)
    if wide and y.numel():
        assert y._base is not None
        assert torch.equal(y._base[:, sum(outputs) :], beside)
    events["rows without a change"] += bool((slot_R == 0).any())
    events["several places"] += len(set(slot_R.tolist()) - {0}) > 1
    events["no rows"] += rows == 0
    events["several projections"] += len(outputs) > 1
    events["inputs no multiple of four"] += inputs % 4 > 0
    events[str(dtype)] += 1


def test_forms(events: Counter[str]) -> None:
    check(events)


@pytest.mark.parametrize("dtype", COMPILED)
def test_bits_of_a_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, events: Counter[str]) -> None:
    """Alone, in any batch, on one thread or several, in one part or several: the same bits."""
    rows = 67
    factors = some_factors(1, 4, 130, [96, 32, 33], 8, dtype)
    x, y = numbers(2, rows, 130, dtype=dtype), numbers(3, rows, 161, dtype=dtype)
    slot_R = places(4, rows, 4)
    torch.set_num_threads(1)
    whole = y.clone()
    adapt_(whole, x, slot_R, factors)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for serial_below in (0, 10**12):
            monkeypatch.setattr(form, "_SERIAL_BELOW", serial_below)
            for first, count in ((0, rows), (0, 1), (rows - 1, 1), (17, 2), (5, 40)):
                part = slice(first, first + count)
                mine = y[part].clone()
                adapt_(mine, x[part], slot_R[part], factors)
                assert torch.equal(mine, whole[part])
                events["in parts" if cpu_elements.shares_of(count, serial_below, count) > 1 else "whole"] += 1


@pytest.mark.parametrize("dtype", COMPILED)
def test_a_smaller_rank_has_the_same_bits_in_a_larger_room(dtype: torch.dtype) -> None:
    small = some_factors(1, 2, 30, [20, 12], 3, dtype)
    large = some_factors(9, 2, 30, [20, 12], 8, dtype)
    large.a_SEK.zero_()
    large.b_SQN.zero_()
    for p in range(2):
        large.a_SEK[:, :, 8 * p : 8 * p + 3] = small.a_SEK[:, :, 3 * p : 3 * p + 3]
    large.b_SQN[:, :3] = small.b_SQN
    x, y, slot_R = numbers(2, 5, 30, dtype=dtype), numbers(3, 5, 32, dtype=dtype), torch.ones(5, dtype=torch.int32)
    other = y.clone()
    adapt_(y, x, slot_R, small)
    adapt_(other, x, slot_R, large)
    torch.testing.assert_close(y, other, rtol=0.0, atol=TOLERANCE[dtype] * 4)


@pytest.mark.parametrize("dtype", COMPILED)
def test_bad_numbers_stay_in_their_row(dtype: torch.dtype) -> None:
    factors = some_factors(1, 3, 20, [9, 8], 4, dtype)
    x, y, slot_R = numbers(2, 6, 20, dtype=dtype), numbers(3, 6, 17, dtype=dtype), places(4, 6, 3)
    slot_R[4] = 1
    clean = y.clone()
    adapt_(clean, x, slot_R, factors)
    for bad in (torch.nan, torch.inf):
        broken, out = x.clone(), y.clone()
        broken[4, 3] = bad
        adapt_(out, broken, slot_R, factors)
        others = torch.arange(6) != 4
        assert torch.equal(out[others], clean[others])
        assert not out[4].isfinite().all()


def test_wrong_shapes() -> None:
    factors = some_factors(1, 3, 20, [9, 8], 4, torch.float32)
    slot_R = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"y has shape \(2, 16\).*need \(2, 17\) and \(2, 20\)"):
        adapt_(torch.zeros(2, 16), torch.zeros(2, 20), slot_R, factors)
    with pytest.raises(ValueError, match=r"x \(3, 20\)"):
        adapt_(torch.zeros(2, 17), torch.zeros(3, 20), slot_R, factors)
    with pytest.raises(ValueError, match="must be the same"):
        adapt_(torch.zeros(2, 17, dtype=torch.float64), torch.zeros(2, 20), slot_R, factors)
