"""Products with a fixed order of sums on a GPU: exact sums, poisoned outputs; bits that follow from the row alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gpu_forms
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_elementwise import LAYOUTS, numbers, strided
from test_elementwise_gpu import there
from test_project_gpu import poisoned, whole_numbers

from headrace.kernels.project_fixed import gpu, project_fixed, project_fixed_onto
from headrace.kernels.project_fixed.gpu_shape import Shape, choose_shape, choose_splits
from headrace.kernels.project_fixed.reference import project_fixed_onto_reference, project_fixed_reference

# `device` teaches the interpreter products of bfloat16.
pytestmark = [*gpu_forms.marks, pytest.mark.usefixtures("device")]
DEVICE, HAS_GPU = gpu_forms.DEVICE, gpu_forms.HAS_GPU
ROWS = (1, 2, 7, 64, 300)
SHAPES = ((4096, 4096), (6144, 4096), (4096, 14336), (1024, 2048), (1024, 3072), (4096, 1024), (777, 1000))
"""Outputs and inputs."""


@settings(
    max_examples=200 if HAS_GPU else 15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def check_exact_sums(events: Counter[str], data: st.DataObject) -> None:
    """Nothing is left out, read twice or read from beyond the ends: equal bits."""
    dtype = data.draw(st.sampled_from(gpu.TYPES), "dtype")
    rows = data.draw(st.sampled_from([1, 2, 33, 64, 65, 130, 300]), "rows")
    outputs = data.draw(st.one_of(st.integers(1, 50), st.sampled_from([64, 130, 300])), "outputs")
    inputs = data.draw(
        st.one_of(st.integers(1, 70), st.sampled_from([128, 600, 1024, 2500] if HAS_GPU else [128, 600])), "inputs"
    )
    shape = None
    if data.draw(st.booleans(), "own cut"):
        splits = data.draw(st.sampled_from([1, 2, 3, 8]), "splits")
        apart = splits > 1 and data.draw(st.booleans(), "apart")
        shape = Shape(
            data.draw(st.sampled_from([16, 64])),
            32,
            64,
            splits,
            apart,
            4,
            3,
            group_r=data.draw(st.sampled_from([1, 8])),
        )
    layouts = data.draw(st.sampled_from(LAYOUTS), "layout of x"), data.draw(st.sampled_from(["plain", "wide", "tall"]))
    # Sums stay below 256, which bfloat16 still holds.
    x_RE = strided(whole_numbers(1, rows, inputs, dtype=dtype, most=2 if inputs < 60 else 1), layouts[0])
    weight_NE = strided(whole_numbers(2, outputs, inputs, dtype=dtype, most=1), layouts[1])
    bias_N = whole_numbers(3, outputs, dtype=dtype, most=9) if data.draw(st.booleans(), "bias") else None
    y_RN = strided(whole_numbers(4, rows, outputs, dtype=dtype, most=9), layouts[1])
    args = (there(x_RE), there(weight_NE), None if bias_N is None else there(bias_N))
    with poisoned():
        got_RN = gpu.multiply_gpu(*args, None, shape=shape)
        sum_RN = there(y_RN)
        gpu.multiply_gpu(*args, sum_RN, shape=shape)
    expected_RN = project_fixed_reference(
        x_RE.double(), weight_NE.double(), None if bias_N is None else bias_N.double()
    )
    assert expected_RN.abs().max() < 256
    assert torch.equal(got_RN.cpu().double(), expected_RN)
    project_fixed_onto_reference(y_RN, x_RE, weight_NE, bias_N)
    assert torch.equal(sum_RN.cpu(), y_RN)
    if sum_RN._base is not None and layouts[1] != "plain":
        assert int(sum_RN._base.isnan().sum()) == 2 * y_RN.numel(), "wrote beside the view"
        events["y in a wider tensor"] += 1
    assert not any(bool(counts.any()) for counts in gpu._counters.values()), "the next launch would start with counts"
    shape = shape or choose_shape(rows, outputs, inputs, dtype.itemsize)
    events["splits apart"] += shape.apart
    events["splits in one program"] += shape.splits > 1 and not shape.apart
    events["several blocks of rows"] += rows > shape.block_r
    events["x strided"] += not x_RE.is_contiguous()
    events["bias"] += bias_N is not None


def test_exact_sums(events: Counter[str]) -> None:
    names = ["splits apart", "splits in one program", "several blocks of rows", "x strided", "bias"]
    events.update(dict.fromkeys([*names, "y in a wider tensor"], 0))
    check_exact_sums(events)


def check_bits(outputs: int, inputs: int, dtype: torch.dtype, rows: tuple[int, ...], events: Counter[str]) -> None:
    """Rows of a large step, and the same rows in smaller ones, at other places, accumulated or not."""
    x_RE, weight_NE = (
        there(numbers(i, *n, dtype=dtype)) for i, n in enumerate([(rows[-1], inputs), (outputs, inputs)])
    )
    weight_NE *= inputs**-0.5
    bias_N, y_RN = there(numbers(3, outputs, dtype=dtype)), there(numbers(4, rows[-1], outputs, dtype=dtype))
    whole_RN = project_fixed_(x_RE, weight_NE, bias_N)
    sum_RN = y_RN.clone()
    project_fixed_onto_(sum_RN, x_RE, weight_NE, bias_N)
    exact_RN = x_RE.double() @ weight_NE.double().t() + bias_N.double()
    error = (whole_RN.double() - exact_RN).norm() / exact_RN.norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 5e-3)
    library_RN = F.linear(x_RE, weight_NE, bias_N)
    generator = torch.Generator().manual_seed(1)
    for count in rows:
        for _ in range(3):
            mine = torch.randint(rows[-1], (count,), generator=generator).to(DEVICE)
            assert torch.equal(project_fixed_(x_RE[mine], weight_NE, bias_N), whole_RN[mine])
            part_RN = y_RN[mine]
            project_fixed_onto_(part_RN, x_RE[mine], weight_NE, bias_N)
            assert torch.equal(part_RN, sum_RN[mine])
            theirs_RN = F.linear(x_RE[mine], weight_NE, bias_N)
            # What the library does is shown, and nothing rests on it.
            if differ := int((theirs_RN != library_RN[mine]).any(1).sum()):
                events["rows by the library that differ"] += differ
            events["rows"] += count


def project_fixed_(x_RE: Any, weight_NE: Any, bias_N: Any) -> Any:
    """In the interpreter the kernel by itself: the package gives tensors of the CPU to the CPU's."""
    return (project_fixed if HAS_GPU else lambda *args: gpu.multiply_gpu(*args, None))(x_RE, weight_NE, bias_N)


def project_fixed_onto_(y_RN: Any, x_RE: Any, weight_NE: Any, bias_N: Any) -> None:
    if HAS_GPU:
        project_fixed_onto(y_RN, x_RE, weight_NE, bias_N)
    else:
        gpu.multiply_gpu(x_RE, weight_NE, bias_N, y_RN)


def test_bits_of_small_products(events: Counter[str]) -> None:
    """Splits apart and in one program. Tiles of one size: the interpreter multiplies them by a library."""
    check_bits(40, 600, torch.float32, (1, 7, 300), events)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="what a GPU's instructions add up first is known to the GPU only")
@pytest.mark.parametrize("dtype", gpu.TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_on_the_gpu(shape: tuple[int, int], dtype: torch.dtype, events: Counter[str]) -> None:
    check_bits(*shape, dtype, (*ROWS, 2048), events)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="what a GPU's instructions add up first is known to the GPU only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 3072)])
def test_tiles_do_not_matter_on_the_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sizes of blocks, warps and stages change no bit as long as splits and the kind of instruction are the same."""
    outputs, inputs = shape
    x_RE, weight_NE = (there(numbers(i, *n, dtype=dtype)) for i, n in enumerate([(192, inputs), shape]))
    splits = choose_splits(outputs, inputs, 2)
    expected_RN = gpu.multiply_gpu(x_RE, weight_NE, None, None)
    for block_r, block_n, block_e, warps in (
        (64, 64, 64, 4),
        (64, 128, 128, 4),
        (64, 256, 64, 4),
        (128, 64, 64, 8),
        (128, 128, 32, 8),
        (128, 128, 64, 4),
        (128, 256, 64, 8),
    ):
        for apart in (False, splits > 1):
            cut = Shape(block_r, block_n, block_e, splits, apart, warps, 3)
            assert torch.equal(gpu.multiply_gpu(x_RE, weight_NE, None, None, shape=cut), expected_RN), cut
