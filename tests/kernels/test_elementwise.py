"""Norm, gate and rotation: compiled forms against the references, rows that do not know of each other, wrong shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.kernels import cpu_elements
from headrace.kernels.rms_norm import cpu as norm_form
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rms_norm.reference import rms_norm_reference
from headrace.kernels.rotary import cpu as rotary_form
from headrace.kernels.rotary import rotate_
from headrace.kernels.rotary.reference import rotate_reference_
from headrace.kernels.silu_mul import cpu as gate_form
from headrace.kernels.silu_mul import silu_mul
from headrace.kernels.silu_mul.reference import silu_mul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
COMPILED = DTYPES[:2]
# Relative to the reference on the same inputs. Sums and exponentials differ in their last bits, and such a bit may
# decide how a 16-bit number is rounded, in the gate twice: by two units in the last place.
# Other types run the reference.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float64: 0.0, torch.float16: 0.0}
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
FORMS = (norm_form, gate_form, rotary_form)
EPS = 1e-5
PROFILE = settings(
    max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values as a view: of a wider tensor along the last axis or the one before, or turned around."""
    if layout == "plain":
        return x
    if layout == "turned":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    axis = -1 if layout == "wide" or x.dim() == 1 else -2
    wide = torch.cat((torch.full_like(x, torch.nan), x, torch.full_like(x, torch.nan)), axis)
    return wide.narrow(axis, x.shape[axis], x.shape[axis])


def angles(seed: int, rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle_Rh = numbers(seed, rows, size // 2, dtype=torch.float64, spread=100.0)
    cos_Rh, sin_Rh = angle_Rh.cos().to(dtype), angle_Rh.sin().to(dtype)
    return torch.cat((cos_Rh, cos_Rh), -1)[:, None], torch.cat((-sin_Rh, sin_Rh), -1)[:, None]


def rotated(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor, form: Callable[..., None] = rotate_) -> Tensor:
    """A turned copy with the strides of x."""
    y_RND = torch.empty_strided(x_RND.shape, x_RND.stride(), dtype=x_RND.dtype).copy_(x_RND)
    form(y_RND, cos_R1D, sin_R1D)
    return y_RND


def same_bits(one: Tensor, other: Tensor) -> bool:
    assert one.dtype == other.dtype
    kind = INTEGER[one.dtype]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


LAYOUTS = ["plain", "wide", "tall", "turned"]


# --- against the references ------------------------------------------------------------------------------------------


@PROFILE
@given(data=st.data())
def check_norm(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    width = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 384, 1000])), "width")
    lead = data.draw(st.lists(st.integers(0, 6), max_size=3), "leading axes")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    per_head = bool(lead) and data.draw(st.booleans(), "weight a head")
    seed = data.draw(st.integers(0, 999), "seed")
    x = strided(numbers(seed, *lead, width, dtype=dtype, spread=10.0 ** data.draw(st.integers(-3, 2), "size")), layout)
    weight = numbers(seed + 1, *(lead[-1:] if per_head else []), width, dtype=dtype)
    kept = x.clone()
    y = rms_norm(x, weight, EPS)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(x, kept)
    torch.testing.assert_close(y, rms_norm_reference(x, weight, EPS), rtol=TOLERANCE[dtype], atol=0.0)
    events["one weight a head"] += per_head
    events["strided rows"] += not x.is_contiguous()
    events["no rows"] += x.numel() == 0
    events["four axes"] += x.dim() == 4
    events[str(dtype)] += 1


def test_norm(events: Counter[str]) -> None:
    check_norm(events)


@PROFILE
@given(data=st.data())
def check_gate(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows = data.draw(st.integers(0, 9), "rows")
    width = data.draw(st.one_of(st.integers(0, 70), st.sampled_from([256, 1001])), "width")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    spread = 10.0 ** data.draw(st.integers(-2, 2), "size")
    x = strided(numbers(data.draw(st.integers(0, 999), "seed"), rows, 2 * width, dtype=dtype, spread=spread), layout)
    kept = x.clone()
    y = silu_mul(x)
    assert y.shape == (rows, width)
    assert torch.equal(x, kept)
    # Below exp(-87.3) the compiled exponential is zero.
    torch.testing.assert_close(y, silu_mul_reference(x), rtol=TOLERANCE[dtype], atol=1e-32 * spread)
    events["strided rows"] += not x.is_contiguous()
    events["empty"] += x.numel() == 0
    events["below the smallest exponential"] += bool((x[:, :width] < -88).any())
    events[str(dtype)] += 1


def test_gate(events: Counter[str]) -> None:
    check_gate(events)


@PROFILE
@given(data=st.data())
def check_rotation(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    rows, heads = data.draw(st.integers(0, 9), "rows"), data.draw(st.integers(1, 8), "heads")
    size = 2 * data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 128])), "half of a head")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    seed = data.draw(st.integers(0, 999), "seed")
    x_RND = strided(numbers(seed, rows, heads, size, dtype=dtype), layout)
    cos_R1D, sin_R1D = angles(seed + 1, rows, size, dtype)
    expected = x_RND.clone()
    rotate_reference_(expected, cos_R1D, sin_R1D)
    rotate_(x_RND, cos_R1D, sin_R1D)
    # Sums of two products may cancel: the bound is one of the larger product. In 16 bits all roundings are the same.
    bound = 2e-6 if dtype is torch.float32 else 0.0
    torch.testing.assert_close(x_RND, expected, rtol=0.0, atol=bound)
    if layout in ("wide", "tall") and x_RND.numel():
        assert x_RND._base is not None
        assert int(x_RND._base.isnan().sum()) == 2 * x_RND.numel(), "wrote beside the view"
    events["strided heads"] += not x_RND.is_contiguous()
    events["last axis strided"] += x_RND.stride(2) != 1
    events[str(dtype)] += 1


def test_rotation(events: Counter[str]) -> None:
    check_rotation(events)


@pytest.mark.parametrize("form", [rms_norm, rms_norm_reference])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_against_the_formula_and_transformers(
    dtype: torch.dtype, per_head: bool, form: Callable[..., Tensor]
) -> None:
    """The exact value, rounded once. transformers rounds before the weight too, and is no closer to it."""
    x = numbers(0, 50, 3, 128, dtype=dtype)
    weight = numbers(1, *([3] if per_head else []), 128, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    y = form(x, weight, EPS)
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=bound * 1.001, atol=1e-7 if dtype is torch.float16 else 0.0)
    if dtype.itemsize == 2:  # but for the few numbers that lie at the edge of a rounding
        assert (y != exact.to(dtype)).float().mean() < 1e-3
    theirs = LlamaRMSNorm(128, eps=EPS)
    theirs.weight.data = weight
    with torch.no_grad():
        expected = theirs(x).double()
    if dtype is torch.float32:
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0.0)
    if dtype.itemsize == 2:
        assert (y - exact).square().mean() < (expected - exact).square().mean()


def test_rounding_is_that_of_torch() -> None:
    patterns = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    edges = np.array([(k << 16) + low for k in range(0, 2**16, 97) for low in (0, 0x7FFF, 0x8000, 0x8001)], np.uint32)
    x = np.concatenate((patterns, edges)).view(np.float32)
    rounded = np.array([cpu_elements._round_to_bfloat16(value) for value in x], np.uint16)
    got, expected = torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16), torch.from_numpy(x).bfloat16()
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0))


# --- rows that do not know of each other -----------------------------------------------------------------------------


def operations(seed: int, rows: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """By name: the operation, and its arguments that have rows."""
    weight_E, weight_ND = numbers(1, 384, dtype=dtype), numbers(2, 5, 48, dtype=dtype)
    cos_R1D, sin_R1D = angles(seed, rows, 48, dtype)
    fused = numbers(seed, rows, 7, 48, dtype=dtype)
    return {
        "norm": (lambda x: rms_norm(x, weight_E, EPS), (numbers(seed, rows, 384, dtype=dtype),)),
        "norm of heads": (lambda x: rms_norm(x[:, :5], weight_ND, EPS), (fused,)),
        "gate": (silu_mul, (numbers(seed, rows, 2 * 203, dtype=dtype, spread=3.0),)),
        "rotation": (lambda x, cos, sin: rotated(x[:, :5], cos, sin), (fused, cos_R1D, sin_R1D)),
    }


NAMES = ["norm", "norm of heads", "gate", "rotation"]


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_a_row(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, events: Counter[str]) -> None:
    """Alone, in any batch, on one thread or several, in one part or several: the same bits."""
    run, arguments = operations(3, 131, dtype)[name]
    torch.set_num_threads(1)
    whole = run(*arguments)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for serial_below in (0, 10**9):
            for form in FORMS:
                monkeypatch.setattr(form, "_SERIAL_BELOW", serial_below)
            for first, count in ((0, 131), (0, 1), (130, 1), (17, 2), (5, 64), (64, 67)):
                part = run(*(x[first : first + count] for x in arguments))
                assert same_bits(part, whole[first : first + count])
                events["in parts" if cpu_elements.shares_of(count, serial_below, count) > 1 else "whole"] += 1


@pytest.mark.parametrize("dtype", COMPILED)
@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_stay_in_their_row(name: str, dtype: torch.dtype) -> None:
    run, arguments = operations(4, 9, dtype)[name]
    clean = run(*arguments)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for where in (0, 1, 100, 200):
            broken = arguments[0].clone()
            broken[4].view(-1)[where] = bad
            y = run(broken, *arguments[1:])
            others = torch.arange(9) != 4
            assert same_bits(y[others], clean[others])
            assert not y[4].isfinite().all(), (bad, where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bad_numbers_are_those_of_the_reference(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -200.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    gate, up = torch.meshgrid(special, special, indexing="ij")
    pairs = torch.stack((gate.reshape(-1), up.reshape(-1)), 1)
    torch.testing.assert_close(silu_mul(pairs), silu_mul_reference(pairs), rtol=1e-6, atol=1e-30, equal_nan=True)
    weight = torch.ones(2, dtype=dtype)
    expected = rms_norm_reference(pairs, weight, EPS)
    torch.testing.assert_close(rms_norm(pairs, weight, EPS), expected, rtol=1e-6, atol=0.0, equal_nan=True)
    zeros = torch.zeros(1, 4, dtype=dtype)
    assert torch.equal(rms_norm(zeros, zeros[0], 0.0).isnan(), rms_norm_reference(zeros, zeros[0], 0.0).isnan())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(3, 4), torch.ones(5), EPS), r"weight has shape \(5,\).*\(3, 4\)"),
        (lambda: rms_norm(torch.ones(3, 4), torch.ones(1), EPS), r"weight has shape \(1,\)"),
        (lambda: rms_norm(torch.ones(4), torch.ones(3, 4), EPS), r"weight has shape \(3, 4\)"),
        (lambda: rms_norm(torch.ones(2, 5, 4), torch.ones(3, 4), EPS), r"weight has shape \(3, 4\)"),
        (lambda: rms_norm(torch.ones(2, 5, 4), torch.ones(2, 5, 4), EPS), r"weight has shape \(2, 5, 4\)"),
        (lambda: rms_norm(torch.ones(4), torch.tensor(1.0), EPS), r"weight has shape \(\)"),
        (lambda: silu_mul(torch.ones(3, 5)), r"shape \(3, 5\); silu_mul takes \[rows, 2 \* width\]"),
        (lambda: silu_mul(torch.ones(2, 3, 4)), r"shape \(2, 3, 4\)"),
        (lambda: rotate_(torch.ones(2, 3, 4), torch.ones(2, 1, 4), torch.ones(2, 4)), r"sin \(2, 4\)"),
        (lambda: rotate_(torch.ones(2, 3, 4), torch.ones(1, 1, 4), torch.ones(2, 1, 4)), r"cos \(1, 1, 4\)"),
        (lambda: rotate_(torch.ones(2, 3, 5), torch.ones(2, 1, 5), torch.ones(2, 1, 5)), "size even"),
        (lambda: rotate_(torch.ones(2, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 4)), r"x has shape \(2, 4\)"),
    ],
)
def test_wrong_shapes(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
