"""The GPU forms of norm, gate and rotation against the references, rows that do not know of each other, graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import gpu_forms
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_elementwise import EPS, INTEGER, LAYOUTS, angles, numbers, strided
from torch import Tensor

from headrace.kernels.rms_norm.gpu import TYPES, rms_norm_gpu
from headrace.kernels.rms_norm.reference import rms_norm_reference
from headrace.kernels.rotary.gpu import rotate_gpu_
from headrace.kernels.rotary.reference import rotate_reference_
from headrace.kernels.silu_mul.gpu import silu_mul_gpu
from headrace.kernels.silu_mul.reference import silu_mul_reference

pytestmark = gpu_forms.marks
DEVICE, HAS_GPU = gpu_forms.DEVICE, gpu_forms.HAS_GPU
# Relative to the reference on the CPU: a last bit of float32 may decide how a 16-bit number is rounded, in the gate
# twice.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SMALLEST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2e-7}
# The interpreter cuts float32 off where compiled code rounds it to bfloat16, so that only a GPU shows this rounding.
ROUNDED = TYPES if HAS_GPU else (torch.float32, torch.float16)
PROFILE = settings(
    max_examples=150 if HAS_GPU else 40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def there(x: Tensor) -> Tensor:
    """On the device, in a tensor of its own, with the same strides: views of wider ones stay views."""
    base = x if x._base is None else x._base
    return base.to(DEVICE, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())


def same_bits(one: Tensor, other: Tensor) -> bool:
    kinds = {**INTEGER, torch.float16: torch.int16}
    return torch.equal(one.contiguous().view(kinds[one.dtype]), other.contiguous().view(kinds[other.dtype]))


@PROFILE
@given(data=st.data())
def check_norm(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(TYPES), "dtype")
    width = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 384, 1000])), "width")
    lead = data.draw(st.lists(st.integers(0, 6), max_size=3), "leading axes")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    per_head = bool(lead) and data.draw(st.booleans(), "weight a head")
    seed = data.draw(st.integers(0, 999), "seed")
    x = strided(numbers(seed, *lead, width, dtype=dtype, spread=10.0 ** data.draw(st.integers(-3, 2), "size")), layout)
    weight = numbers(seed + 1, *(lead[-1:] if per_head else []), width, dtype=dtype)
    x_there = there(x)
    y = rms_norm_gpu(x_there, there(weight), EPS)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(x_there.cpu(), x), "x was changed"
    torch.testing.assert_close(
        y.cpu(), rms_norm_reference(x, weight, EPS), rtol=TOLERANCE[dtype], atol=SMALLEST[dtype]
    )  # fmt: skip
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
    dtype = data.draw(st.sampled_from(TYPES), "dtype")
    rows = data.draw(st.integers(0, 6), "rows")
    width = data.draw(st.one_of(st.integers(0, 70), st.sampled_from([256, 1001, 2500])), "width")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    spread = 10.0 ** data.draw(st.integers(-2, 2 if dtype is not torch.float16 else 1), "size")
    x = strided(numbers(data.draw(st.integers(0, 999), "seed"), rows, 2 * width, dtype=dtype, spread=spread), layout)
    y = silu_mul_gpu(there(x)).cpu()
    assert y.shape == (rows, width)
    # Below exp(-87.3) the hardware's exponential is zero; above, its relative error grows with the exponent.
    rtol, atol = max(TOLERANCE[dtype], 1e-5), max(1e-32 * spread, 3 * spread * SMALLEST[dtype])
    torch.testing.assert_close(y, silu_mul_reference(x), rtol=rtol, atol=atol)
    events["strided rows"] += not x.is_contiguous()
    events["empty"] += x.numel() == 0
    events["below the smallest exponential"] += bool((x[:, :width] < -88).any())
    events[str(dtype)] += 1


def test_gate(events: Counter[str]) -> None:
    check_gate(events)


@PROFILE
@given(data=st.data())
def check_rotation(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(TYPES), "dtype")
    rows, heads = data.draw(st.integers(0, 4), "rows"), data.draw(st.integers(1, 40), "heads")
    size = 2 * data.draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 128])), "half of a head")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    seed = data.draw(st.integers(0, 999), "seed")
    x_RND = strided(numbers(seed, rows, heads, size, dtype=dtype), layout)
    cos_R1D, sin_R1D = angles(seed + 1, rows, size, dtype)
    expected = x_RND.clone()
    rotate_reference_(expected, cos_R1D, sin_R1D)
    turned = there(x_RND)
    rotate_gpu_(turned, there(cos_R1D), there(sin_R1D))
    # Sums of two products may cancel: the bound is one of the larger product. In 16 bits all roundings are the same,
    # but for a sum of which a fused multiply-add and two roundings see different last bits.
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    rtol, atol = (rtol, 2e-6) if dtype in ROUNDED else (2**-6, 2**-5)
    torch.testing.assert_close(turned.cpu(), expected, rtol=rtol, atol=atol)
    if layout in ("wide", "tall") and x_RND.numel():
        assert turned._base is not None
        assert int(turned._base.isnan().sum()) == 2 * x_RND.numel(), "wrote beside the view"
    events["strided heads"] += not x_RND.is_contiguous()
    events["last axis strided"] += x_RND.stride(2) != 1
    events["several programs a row"] += heads * size > 2048
    events[str(dtype)] += 1


def test_rotation(events: Counter[str]) -> None:
    check_rotation(events)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_norm_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight = numbers(0, 50, 3, 128, dtype=dtype), numbers(1, 128, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    y = rms_norm_gpu(there(x), there(weight), EPS).cpu()
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=bound * 1.001, atol=1e-7 if dtype is torch.float16 else 0.0)
    if dtype.itemsize == 2:  # but for the few numbers that lie at the edge of a rounding
        assert (y != exact.to(dtype)).float().mean() < 1e-3


def operations(seed: int, rows: int, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """By name: the operation, and its arguments that have rows, on the device."""
    weight_E, weight_ND = there(numbers(1, 384, dtype=dtype)), there(numbers(2, 5, 48, dtype=dtype))
    cos_R1D, sin_R1D = angles(seed, rows, 48, dtype)
    fused = there(numbers(seed, rows, 7, 48, dtype=dtype))

    def rotated(x_RND: Tensor, cos_R1D: Tensor, sin_R1D: Tensor) -> Tensor:
        y_RND = x_RND.clone()
        rotate_gpu_(y_RND[:, :5], cos_R1D, sin_R1D)
        return y_RND

    return {
        "norm": (lambda x: rms_norm_gpu(x, weight_E, EPS), (there(numbers(seed, rows, 384, dtype=dtype)),)),
        "norm of heads": (lambda x: rms_norm_gpu(x[:, :5], weight_ND, EPS), (fused,)),
        "gate": (silu_mul_gpu, (there(numbers(seed, rows, 2 * 203, dtype=dtype, spread=3.0)),)),
        "rotation": (rotated, (fused, there(cos_R1D), there(sin_R1D))),
    }


NAMES = ["norm", "norm of heads", "gate", "rotation"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bits_of_a_row(name: str, dtype: torch.dtype) -> None:
    """Alone and in any batch: the same bits."""
    rows = 131 if HAS_GPU else 13
    run, arguments = operations(3, rows, dtype)[name]
    whole = run(*arguments)
    for first, count in ((0, 1), (rows - 1, 1), (7, 2), (5, rows // 2)):
        assert same_bits(run(*(x[first : first + count] for x in arguments)), whole[first : first + count])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_stay_in_their_row(name: str, dtype: torch.dtype) -> None:
    run, arguments = operations(4, 5, dtype)[name]
    clean = run(*arguments)
    others = torch.arange(5, device=DEVICE) != 2
    for bad in (torch.nan, torch.inf, -torch.inf):
        for where in (1, 200):
            broken = arguments[0].clone()
            broken[2].view(-1)[where] = bad
            y = run(broken, *arguments[1:])
            assert same_bits(y[others], clean[others])
            assert not y[2].isfinite().all(), (bad, where)


@pytest.mark.parametrize("dtype", [dtype for dtype in ROUNDED if dtype is not torch.float16])  # 3e38 is inf in it
def test_bad_numbers_are_those_of_the_reference(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -200.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    gate, up = torch.meshgrid(special, special, indexing="ij")
    pairs = torch.stack((gate.reshape(-1), up.reshape(-1)), 1)
    y = silu_mul_gpu(there(pairs)).cpu()
    torch.testing.assert_close(y, silu_mul_reference(pairs), rtol=1e-6, atol=1e-30, equal_nan=True)
    weight = torch.ones(2, dtype=dtype)
    y = rms_norm_gpu(there(pairs), there(weight), EPS).cpu()
    torch.testing.assert_close(y, rms_norm_reference(pairs, weight, EPS), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_gives_the_same(name: str) -> None:
    run, arguments = operations(3, 20, torch.bfloat16)[name]
    run(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured: Any = run(*arguments)
    for x in arguments:
        x.copy_(x.flip(0))
    graph.replay()
    assert same_bits(captured, run(*arguments))
