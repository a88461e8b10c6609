"""Products with quantised weights on the CPU: compiled forms against the references, on both sides of each choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headrace.kernels.project_fp8 import FP8, project_fp8
from headrace.kernels.project_fp8 import cpu as fp8_cpu
from headrace.kernels.project_fp8.reference import project_fp8_reference
from headrace.kernels.project_int4 import cpu as int4_cpu
from headrace.kernels.project_int4 import project_int4
from headrace.kernels.project_int4.reference import pack_int4, project_int4_reference, unpack_int4

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(8, 16, 8), (13, 5, 16), (300, 70, 40), (100, 600, 128), (384, 640, 384)]
"""Inputs, outputs, inputs of a group."""


def test_words_hold_their_codes() -> None:
    codes = torch.randint(0, 16, (21, 5), dtype=torch.uint8)
    words = pack_int4(codes)
    assert torch.equal(unpack_int4(words, 21), codes)
    for e in range(21):
        for n in range(5):
            assert (int(words[e // 8, n]) >> (4 * (e % 8))) & 15 == int(codes[e, n])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_int4(inputs: int, outputs: int, group: int, dtype: torch.dtype) -> None:
    groups = -(-inputs // group)
    words = pack_int4(torch.randint(0, 16, (inputs, outputs)))
    zeros, scales = torch.randint(0, 17, (groups, outputs), dtype=torch.uint8), torch.rand(groups, outputs)
    for rows in (0, 1, 3, int4_cpu.FEW_ROWS, int4_cpu.FEW_ROWS + 1, 40):
        x = torch.randn(rows, 2 * inputs).to(dtype)[:, ::2]
        must = project_int4_reference(x.double(), words, zeros, scales, group=group)
        for start in (0, outputs // 2):
            parts = [t[:, start:] for t in (words, zeros, scales)]
            got = project_int4(x, *parts, group=group)
            assert got.dtype == dtype
            assert got.shape == (rows, outputs - start)
            assert not rows or (got - must[:, start:]).abs().max() <= TOLERANCE[dtype] * must.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_fp8(inputs: int, outputs: int, group: int, dtype: torch.dtype) -> None:
    codes, scales = torch.randn(outputs, inputs).to(FP8), torch.randn(outputs, -(-inputs // group))
    for rows in (0, 1, 3, fp8_cpu.FEW_ROWS, fp8_cpu.FEW_ROWS + 1, 40):
        x = torch.randn(rows, 2 * inputs).to(dtype)[:, ::2]
        must = project_fp8_reference(x.double(), codes, scales, group=group)
        got = project_fp8(x, codes, scales, group=group)
        assert got.dtype == dtype
        assert got.shape == (rows, outputs)
        assert not rows or (got - must).abs().max() <= TOLERANCE[dtype] * must.abs().max()


def test_every_code_is_its_number() -> None:
    """Also the subnormal ones and both zeros."""
    for bits in range(256):
        must = torch.tensor([bits], dtype=torch.uint8).view(FP8).float()
        if not must.isnan():
            got = torch.tensor([float(fp8_cpu.decode(np.uint8(bits)))])
            assert torch.equal(got, must)
            assert torch.equal(got.signbit(), must.signbit())


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Within a form, a row has the same bits alone and among others."""
    words = pack_int4(torch.randint(0, 16, (64, 48)))
    zeros, scales = torch.full((2, 48), 8, dtype=torch.uint8), torch.rand(2, 48)
    codes, fp8_scales = torch.randn(48, 64).to(FP8), torch.rand(48, 1)
    x = torch.randn(fp8_cpu.FEW_ROWS, 64)
    for r in range(len(x)):
        assert torch.equal(
            project_int4(x, words, zeros, scales, group=32)[r],
            project_int4(x[r : r + 1], words, zeros, scales, group=32)[0],
        )
        assert torch.equal(
            project_fp8(x, codes, fp8_scales, group=64)[r], project_fp8(x[r : r + 1], codes, fp8_scales, group=64)[0]
        )


def test_shapes_that_do_not_fit() -> None:
    words = torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows of 17 inputs in groups of 8 do not fit"):
        project_int4(torch.ones(1, 17), words, torch.zeros(3, 8, dtype=torch.uint8), torch.ones(3, 8), group=8)
    with pytest.raises(ValueError, match="rows of 3 inputs and groups of 4 do not fit"):
        project_fp8(torch.ones(1, 3), torch.ones(2, 4).to(FP8), torch.ones(2, 1), group=4)
