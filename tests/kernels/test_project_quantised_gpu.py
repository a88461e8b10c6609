"""Products with quantised weights on a GPU against the references: odd shapes, groups, slices, every form by rows."""

from __future__ import annotations

import gpu_forms
import pytest
import torch
from torch import Tensor

from headrace.kernels.gpu_coded import FEW_ROWS
from headrace.kernels.project_fp8 import gpu as fp8
from headrace.kernels.project_fp8.reference import FP8, project_fp8_reference
from headrace.kernels.project_int4 import gpu as int4
from headrace.kernels.project_int4.reference import pack_int4, project_int4_reference

# `device` teaches the interpreter products of bfloat16.
pytestmark = [*gpu_forms.marks, pytest.mark.usefixtures("device")]
DEVICE = gpu_forms.DEVICE
# Relative to the largest result: weights are rounded to the type of x.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
MANY = FEW_ROWS + 3
SHAPES = [(1, 8, 16, 8), (1, 300, 70, 40), (2, 64, 24, 32), (5, 100, 130, 128), (17, 72, 40, 72), (MANY, 136, 72, 64)]
"""Rows, inputs, outputs, inputs of a group."""


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, must: Tensor, dtype: torch.dtype) -> bool:
    assert got.dtype == dtype
    return bool((got.double() - must.double()).abs().max() <= TOLERANCE[dtype] * must.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_int4(rows: int, inputs: int, outputs: int, group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    groups = -(-inputs // group)
    words = pack_int4(torch.randint(0, 16, (inputs, outputs), generator=generator)).to(DEVICE)
    zeros = torch.randint(0, 17, (groups, outputs), generator=generator, dtype=torch.uint8).to(DEVICE)
    scales = torch.rand(groups, outputs, generator=generator).to(DEVICE)
    x = numbers(1, rows, 2 * inputs).to(DEVICE, dtype)[:, ::2]
    must = project_int4_reference(x.double(), words, zeros, scales, group=group)
    assert close(int4.project_int4_gpu(x, words, zeros, scales, group), must, dtype)
    part = [t[:, 8:] for t in (words, zeros, scales)]
    assert close(int4.project_int4_gpu(x, *part, group), must[:, 8:], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "inputs", "outputs", "group"), SHAPES)
def test_fp8(rows: int, inputs: int, outputs: int, group: int, dtype: torch.dtype) -> None:
    codes = numbers(rows, outputs, inputs).to(FP8).to(DEVICE)
    scales = numbers(3, outputs, -(-inputs // group)).to(DEVICE)
    x = numbers(1, rows, 2 * inputs).to(DEVICE, dtype)[:, ::2]
    must = project_fp8_reference(x.double(), codes, scales, group=group)
    assert close(fp8.project_fp8_gpu(x, codes, scales, group), must, dtype)


def test_every_code_is_its_number() -> None:
    """One input at a time: the products are the weights, subnormal ones and both zeros too."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    codes = bits.view(FP8)[:, None].repeat(1, 8).to(DEVICE)
    scales = torch.ones(len(bits), 1, device=DEVICE)
    for rows in (1, 8):
        got = fp8.project_fp8_gpu(torch.eye(8, device=DEVICE)[:rows], codes, scales, 8)
        assert torch.equal(got, codes.float().t()[:rows])


def test_refusals() -> None:
    ones = torch.ones(1, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        fp8.project_fp8_gpu(ones, ones.to(FP8), ones[:, :1].float(), 8)
    words = torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        int4.project_int4_gpu(ones, words, words.to(torch.uint8), words.float(), 8)
    across = torch.zeros(8, 1, dtype=torch.int32, device=DEVICE).expand(8, 8).t()
    with pytest.raises(ValueError, match="outputs must be neighbours"):
        int4.project_int4_gpu(ones.float(), across[:1, ::2], across[:1].byte(), across[:1].float(), 8)
