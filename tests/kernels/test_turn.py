"""The GPU form of `turn` against its definition, and the definition against the operations that layers call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gpu_forms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.attention import write_kv
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rotary import rotate_
from headrace.kernels.turn import turn
from headrace.kernels.turn.gpu import turn_gpu
from headrace.kernels.turn.reference import turn_reference
from headrace.step import Turn

pytestmark = gpu_forms.marks
DEVICE = gpu_forms.DEVICE
POSITIONS, PAGES, SLOTS = 50, 7, 4
# A last bit of float32 may decide how the norm and the products are rounded.
# A launch hands on the epsilon of a norm in 24 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make(
    seed: int, dtype: torch.dtype, rows: int, heads: int, kv_heads: int, size: int, *, norm: bool, strided: bool = False
) -> tuple[Turn, list[Tensor], Tensor]:
    """Work, pools whose slots hold NaN, and places, of which one is in page 0 if there are several."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    n = heads + 2 * kv_heads
    qkv_RND = numbers(rows, n + 3, size)[:, :n] if strided else numbers(rows, n, size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = numbers(POSITIONS, size // 2, kind=wide) * 9
    pos_R = torch.randint(POSITIONS, (rows,), generator=generator, dtype=torch.int32)
    place_R = SLOTS + torch.randperm((PAGES - 1) * SLOTS, generator=generator)[:rows]
    if rows > 1:
        place_R[-1] = 0
    weight = (numbers(heads + kv_heads, size), 1e-5) if norm else None
    pools = [torch.full((kv_heads, PAGES, SLOTS, size), float("nan"), dtype=dtype) for _ in "kv"]
    return Turn(qkv_RND, heads, kv_heads, weight, angles.cos(), angles.sin(), pos_R), pools, place_R


def copied(work: Turn, pools: list[Tensor], device: torch.device) -> tuple[Turn, list[Tensor]]:
    norm = None if work.norm is None else (work.norm[0].to(device), work.norm[1])
    tensors: dict[str, Any] = {name: getattr(work, name).to(device) for name in ("cos_PD", "sin_PD", "pos_R")}
    # Clones of parts of larger tensors would be packed.
    qkv_RND = torch.empty_strided(work.qkv_RND.shape, work.qkv_RND.stride(), dtype=work.qkv_RND.dtype, device=device)
    qkv_RND.copy_(work.qkv_RND)
    return work._replace(qkv_RND=qkv_RND, norm=norm, **tensors), [pool.clone().to(device) for pool in pools]


def check(work: Turn, pools: list[Tensor], place_R: Tensor) -> None:
    mine, my_pools = copied(work, pools, DEVICE)
    theirs, their_pools = copied(work, pools, torch.device("cpu"))
    turn_gpu(mine, *my_pools, place_R.to(DEVICE))
    turn_reference(theirs, *their_pools, place_R)
    for x, y in ((mine.qkv_RND, theirs.qkv_RND), *zip(my_pools, their_pools, strict=True)):
        bound = TOLERANCE[x.dtype]
        torch.testing.assert_close(x.cpu(), y, rtol=bound, atol=bound, equal_nan=True)


def test_turn(events: Counter[str]) -> None:
    """Slots that no row names keep the NaN that they held."""
    events.update({"norm": 0, "strided": 0, "one row": 0, "many rows": 0, "half of no power of two": 0})
    events.update(dict.fromkeys(map(str, TOLERANCE), 0))

    @settings(max_examples=200 if gpu_forms.HAS_GPU else 60, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from(list(TOLERANCE)),
        rows=st.sampled_from([1, 2, 5, 20]),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 5),
        size=st.sampled_from([2, 10, 16, 64, 80, 128]),
        norm=st.booleans(),
        strided=st.booleans(),
    )
    def run(
        seed: int, dtype: torch.dtype, rows: int, kv_heads: int, group: int, size: int, norm: bool, strided: bool
    ) -> None:
        check(*make(seed, dtype, rows, kv_heads * group, kv_heads, size, norm=norm, strided=strided))
        events["norm"] += norm
        events["strided"] += strided
        events["one row" if rows == 1 else "many rows"] += 1
        events["half of no power of two"] += size in (10, 80)
        events[str(dtype)] += 1

    run()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_definition_is_the_three_operations(dtype: torch.dtype, norm: bool) -> None:
    work, pools, place_R = make(4, dtype, 6, 4, 2, 16, norm=norm)
    theirs, their_pools = copied(work, pools, torch.device("cpu"))
    if not gpu_forms.HAS_GPU:
        turn(work, pools[0], pools[1], place_R)
    else:
        turn_reference(work, pools[0], pools[1], place_R)
    qk_RND, v_RKD = theirs.qkv_RND.split((6, 2), 1)
    if theirs.norm is not None:
        qk_RND = rms_norm(qk_RND, *theirs.norm)
    cos, sin = (table[theirs.pos_R.long()].to(dtype) for table in (theirs.cos_PD, theirs.sin_PD))
    rotate_(qk_RND, torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    write_kv(qk_RND[:, 4:], v_RKD, *their_pools, place_R)
    torch.testing.assert_close(work.qkv_RND[:, :6], qk_RND, rtol=1e-6, atol=1e-6)
    for x, y in zip(pools, their_pools, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_what_the_kernel_does_not_know_is_refused() -> None:
    work, pools, place_R = make(1, torch.float32, 2, 2, 1, 16, norm=False)
    with pytest.raises(ValueError, match="pools are"):
        turn_gpu(work, pools[0].double(), pools[1], place_R)
    with pytest.raises(ValueError, match="must be neighbours"):
        turn_gpu(work._replace(qkv_RND=work.qkv_RND.transpose(1, 2)), *pools, place_R)
    with pytest.raises(ValueError, match="pages of heads"):
        turn_gpu(work, pools[0][..., :8], pools[1], place_R)
    turn_gpu(work._replace(qkv_RND=work.qkv_RND[:0]), *pools, place_R[:0])
    assert pools[0].isnan().all()
