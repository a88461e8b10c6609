"""Products with picked experts: the groups against the definition pair by pair, the GPU form against the groups."""

from __future__ import annotations

from collections import Counter

import gpu_forms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.experts import gpu, multiply_picked, plan_experts
from headrace.kernels.experts.reference import group_pairs, multiply_groups

DEVICE = gpu_forms.DEVICE


def make(
    seed: int, rows: int, picked: int, experts: int, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Picks [R, K] without repetition, x [R, I], weights, biases."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        # Small multiples of 1/8: products and sums are exact in float32.
        return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)

    few = torch.rand(experts, generator=generator) * 3  # some experts are popular
    pick_RK = (torch.rand(rows, experts, generator=generator) + few).topk(picked, 1).indices
    return (
        pick_RK,
        numbers(rows, inputs),
        numbers(experts, outputs, inputs),
        numbers(experts, outputs) if bias else None,
    )


def by_pair(pick_RK: Tensor, x_RI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None) -> Tensor:
    """The definition, in float64."""
    y_PO = torch.einsum("roi,ri->ro", weight_NOI.double()[pick_RK.flatten()], x_RI.double())
    return y_PO if bias_NO is None else y_PO + bias_NO.double()[pick_RK.flatten()]


def test_groups_are_the_definition(events: Counter[str]) -> None:
    events.update({"experts without a pair": 0, "no rows": 0, "one input a pair": 0, "bias": 0})

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        experts = data.draw(st.integers(1, 7))
        rows, picked = data.draw(st.integers(0, 9)), data.draw(st.integers(1, experts))
        seed, bias = data.draw(st.integers(0, 2**32)), data.draw(st.booleans())
        pick_RK, x_RI, weight, bias_NO = make(seed, rows, picked, experts, 5, 3, torch.float64, bias=bias)
        x_PI = x_RI.repeat_interleave(picked, 0)
        expected = by_pair(pick_RK, x_PI, weight, bias_NO)
        plan = plan_experts(pick_RK, experts)
        torch.testing.assert_close(multiply_picked(plan, x_RI, weight, bias_NO, share=picked), expected)
        torch.testing.assert_close(multiply_picked(plan, x_PI, weight, bias_NO, share=1), expected)
        events["experts without a pair"] += rows > 0 and len(pick_RK.unique()) < experts
        events["no rows"] += not rows
        events["one input a pair"] += picked > 1
        events["bias"] += bias

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_form_is_the_groups(dtype: torch.dtype, device: torch.device, events: Counter[str]) -> None:
    """Sums of small fractions are exact, so that only the last rounding remains, which is the same."""
    events.update(
        {"experts without a pair": 0, "full tiles": 0, "several tiles of an expert": 0, "bias": 0, "no rows": 0}
    )
    events.update({"large tiles": 0})

    @settings(max_examples=200 if gpu_forms.HAS_GPU else 40, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        rows=st.sampled_from([0, 1, 3, 17, 40, 300]),
        experts=st.sampled_from([1, 3, 8]),
        picked=st.integers(1, 3),
        inputs=st.sampled_from([3, 64, 77]),
        outputs=st.sampled_from([1, 16, 70]),
        bias=st.booleans(),
    )
    def run(seed: int, rows: int, experts: int, picked: int, inputs: int, outputs: int, bias: bool) -> None:
        picked = min(picked, experts)
        pick_RK, x_RI, weight, bias_NO = make(seed, rows, picked, experts, inputs, outputs, dtype, bias=bias)
        share = picked if seed % 2 else 1
        if share == 1:
            x_RI = x_RI.repeat_interleave(picked, 0)
        expected = multiply_groups(
            group_pairs(pick_RK.flatten()),
            x_RI.float(),
            weight.float(),
            None if bias_NO is None else bias_NO.float(),
            share,
        ).to(dtype)
        tiles = gpu.list_tiles(pick_RK.flatten().to(device), experts)
        there = [None if t is None else t.to(device) for t in (x_RI, weight, bias_NO)]
        assert there[0] is not None
        assert there[1] is not None
        got = gpu.multiply_tiles(tiles, there[0], there[1], there[2], share)
        if dtype == torch.bfloat16 and not gpu_forms.HAS_GPU:  # the interpreter cuts where the chip rounds
            torch.testing.assert_close(got.cpu(), expected, rtol=2**-7, atol=0.0)
        else:
            assert torch.equal(got.cpu(), expected)
        counts = pick_RK.flatten().bincount(minlength=experts)
        events["no rows"] += not rows
        events["experts without a pair"] += bool(rows) and bool((counts == 0).any())
        events["full tiles"] += bool((counts % tiles.size == 0).any() & (counts > 0).any())
        events["several tiles of an expert"] += bool((counts > tiles.size).any())
        events["large tiles"] += tiles.size > 16
        events["bias"] += bias

    run()


def test_what_the_kernel_does_not_know_is_refused(device: torch.device) -> None:
    pick_RK, x_RI, weight, _ = make(1, 4, 2, 3, 16, 16, torch.float64, bias=False)
    tiles = gpu.list_tiles(pick_RK.flatten().to(device), 3)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        gpu.multiply_tiles(tiles, x_RI.to(device), weight.to(device), None, 2)
    with pytest.raises(ValueError, match="must be neighbours"):
        gpu.multiply_tiles(tiles, x_RI.float().to(device), weight.float().to(device).transpose(1, 2), None, 2)
