"""The GPU form of `draw`: random words bit for bit, results against the reference, exact filters, rows alone.

Logarithms and sums may differ from the reference in their last bits. Rows in which such a bit may decide, two scores
or a mass and its bound within 1e-5 and 1e-6, are close calls: counted, few, and not compared (`row_is_close_call`).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import gpu_forms
import numpy as np
import pytest
import test_draw as draws
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_draw import LARGE_LOGITS, SETTINGS, params_of, random_case, same_bits, stream_of, take
from torch import Tensor

from headrace.kernels.draw import Drawn, DrawParams
from headrace.kernels.draw.gpu import draw_gpu
from headrace.kernels.draw.gpu_kernel import gumbel_f32, words_of
from headrace.kernels.draw.reference import draw_reference, gumbel_noise, philox4x32
from headrace.kernels.gpu_runtime import tl, triton

pytestmark = gpu_forms.marks
DEVICE, HAS_GPU = gpu_forms.DEVICE, gpu_forms.HAS_GPU


def draw_there(logits_MV: Tensor, params: DrawParams, stream_M2: Tensor, t_out_M: Tensor, **options: Any) -> Drawn:
    """On the device, and back."""
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    there = DrawParams(*(x.to(DEVICE) for x in params))
    drawn = draw_gpu(logits_MV.to(DEVICE), there, stream_M2.to(DEVICE), t_out_M.to(DEVICE), **options)
    return Drawn(*(x.cpu() for x in drawn))


# --- noise -----------------------------------------------------------------------------------------------------------


@triton.jit
def write_words(words, counter, key, block, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    t_out, nth, purpose = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2)
    word = words_of(block + tl.arange(0, BLOCKS), t_out, nth, purpose, tl.load(key))
    tl.store(words + tl.arange(0, 4 * BLOCKS), word.to(tl.int32, bitcast=True))


@triton.jit
def write_noise(noise, words, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(noise + i, gumbel_f32(tl.load(words + i).to(tl.uint32, bitcast=True)))


@pytest.mark.parametrize("place", [(0, 0, 0, 0, 0), (-1, -1, -1, -1, -1), (7, 3, 5, -123456789, 987654321)])
@pytest.mark.parametrize("block", [0, 2**29 - 8])
def test_words_are_those_of_the_reference(place: tuple[int, int, int, int, int], block: int) -> None:
    blocks = 8
    counter = torch.tensor([[*place[:3], block + i] for i in range(blocks)])
    expected = philox4x32(torch.tensor(place[3:]) & 0xFFFFFFFF, counter & 0xFFFFFFFF).flatten()
    words = torch.empty(4 * blocks, dtype=torch.int32, device=DEVICE)
    low, high = (word & 0xFFFFFFFF for word in place[3:])
    key = torch.tensor([low, high], dtype=torch.int64).to(torch.uint32).view(torch.uint64).to(DEVICE)
    write_words[(1,)](words, counter[0, :3].int().to(DEVICE), key, block, BLOCKS=blocks)
    assert (words.cpu().long() & 0xFFFFFFFF).tolist() == expected.tolist()


def test_noise_is_accurate() -> None:
    """Against float64, over all sizes of words and both ends: a few units in the last place of the noise or of 1."""
    edges = [2**k + d for k in range(33) for d in (-1, 0, 1) if 0 <= 2**k + d < 2**32]
    near_one = [round(2**32 * (1 - math.exp(-1))) + d for d in range(-2000, 2000, 7)]
    drawn = np.random.default_rng(0).integers(0, 2**32, 8192).tolist()
    words = np.array((edges + near_one + drawn)[:8192], dtype=np.uint32)
    noise = torch.empty(8192, device=DEVICE)
    write_noise[(8,)](noise, torch.from_numpy(words.view(np.int32)).to(DEVICE), N=1024)
    u = np.minimum((words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    exact = -np.log(-np.log1p(-u.astype(np.float64)))
    error = np.abs(noise.cpu().numpy() - exact) / np.maximum(np.abs(exact), 1.0)
    assert error.max() < 3e-7
    assert 22.87 < float(noise.max()) < 22.88
    assert -2.82 < float(noise.min()) < -2.81


# --- against the reference -------------------------------------------------------------------------------------------


def test_agrees_with_the_reference(events: Counter[str]) -> None:
    wanted = "rows,bad rows,greedy,sampled,ties at the top,masked,filtered,not the most probable,top-k and top-p"
    events.update(dict.fromkeys([*wanted.split(","), "separate raw"], 0))

    @settings(
        max_examples=150 if HAS_GPU else 10,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**31), rows=st.integers(5, 9), vocab=st.integers(1, 300), separate=st.booleans())
    def check(seed: int, rows: int, vocab: int, separate: bool) -> None:
        raw_MV = None
        if separate:
            raw_MV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + 1)) * 3
            raw_MV[seed % rows, seed % vocab] = torch.nan if seed % 7 == 0 else 0.0
            events["separate raw"] += 1
        draws.compare_forms(random_case(seed, rows, vocab), raw_MV, events, draw_there)

    check()
    assert events.get("close calls", 0) < 0.03 * events["rows"], events


@pytest.mark.parametrize("kind", LARGE_LOGITS)
def test_large_vocabularies(kind: str) -> None:
    """Several chunks and an odd end. A GPU runs all settings, the interpreter four for each kind in turn."""
    vocab = 130_011 if HAS_GPU else 5003
    first = list(LARGE_LOGITS).index(kind)
    chosen = list(SETTINGS.values()) if HAS_GPU else [list(SETTINGS.values())[(first + 3 * j) % 12] for j in range(4)]
    rows = len(chosen)
    generator = torch.Generator().manual_seed(1)
    logits_MV = torch.stack([LARGE_LOGITS[kind](vocab, generator) for _ in range(rows)])
    params = DrawParams(*(torch.cat(x) for x in zip(*(params_of(1, **setting) for setting in chosen), strict=True)))
    events: Counter[str] = Counter()
    case = (logits_MV, params, stream_of(rows, 3), torch.arange(rows, dtype=torch.int32))
    draws.compare_forms(case, None, events, draw_there)
    assert events["rows"] == rows
    assert events.get("close calls", 0) <= 3, events


JUST_BELOW_5 = float(np.nextafter(np.float32(5.0), np.float32(0.0)))
HALVES = [0.0, -math.log(1.9), -math.log(2.1), -math.log(4.1)]
KEPT: list[tuple[list[float], dict[str, Any], set[int]]] = [
    ([0.5] * 8, {"top_k": 3}, {0, 1, 2}),
    ([0.5] * 8, {"top_k": 80}, set(range(8))),
    ([0.5] * 8, {"top_p": 0.5}, {0, 1, 2, 3}),
    ([0.5] * 8, {"top_p": 0.51}, {0, 1, 2, 3, 4}),
    ([0.5] * 8, {"top_k": 4, "top_p": 0.5}, {0, 1}),
    ([0.5] * 8, {"top_k": 4, "top_p": 0.999}, {0, 1, 2, 3}),
    ([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], {"top_k": 3}, {0, 1, 3}),
    ([2.0, 5.0, 1.0, 0.0], {"top_p": 1e-9}, {1}),
    ([2.0, 5.0, 1.0, 0.0], {"top_p": 0.0}, {1}),
    ([2.0, 5.0, 5.0, 1.0], {"min_p": 1.0}, {1, 2}),
    ([2.0, 5.0, JUST_BELOW_5, 0.0], {"min_p": 1.0}, {1}),
    ([2.0, 5.0, JUST_BELOW_5, 0.0], {"top_k": 1}, {1}),
    (HALVES, {"min_p": 0.5}, {0, 1}),
    (HALVES, {"min_p": 0.25}, {0, 1, 2}),
    (HALVES, {"min_p": 0.5, "temperature": 2.0}, {0, 1, 2}),
    ([1.0, -math.inf, 1.0, -math.inf], {"top_k": 3}, {0, 2}),
    ([-math.inf, 3.0], {}, {1}),
    ([-math.inf, 3.0], {"top_p": 0.2}, {1}),
]


@pytest.mark.parametrize(("logits", "setting", "kept"), KEPT)
def test_filters_keep_exactly(logits: list[float], setting: dict[str, Any], kept: set[int]) -> None:
    """The log-prob of a token tells the mass of the survivors, and all draws stay among them."""
    rows = 600 if HAS_GPU else 3
    logits_MV = torch.tensor(logits).repeat(rows, 1)
    drawn = draw_there(logits_MV, params_of(rows, **setting), stream_of(rows), torch.arange(rows, dtype=torch.int32))
    ids = drawn.id_M.long()
    assert set(ids.tolist()) <= kept
    assert not HAS_GPU or set(ids.tolist()) == kept
    left_V = torch.full((len(logits),), -torch.inf)
    left_V[sorted(kept)] = torch.tensor(logits)[sorted(kept)] / setting.get("temperature", 1.0)
    torch.testing.assert_close(drawn.logp_draw_M, left_V.log_softmax(0)[ids], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.logp_raw_M, torch.tensor(logits).log_softmax(0)[ids], rtol=0, atol=1e-5)


def test_greedy() -> None:
    logits_MV = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, -0.0, -5.0, 0.0], [-math.inf, -math.inf, -2.0, -3.0]])
    params = params_of(3, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)
    drawn = draw_there(logits_MV, params, stream_of(3), torch.arange(3).int())
    assert drawn.id_M.tolist() == [1, 0, 2]
    assert drawn.logp_draw_M.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(drawn.lse_M, logits_MV.logsumexp(-1))
    torch.testing.assert_close(drawn.logp_raw_M, logits_MV.log_softmax(-1).amax(-1))
    assert drawn.id_M.dtype is torch.int32
    assert all(x.dtype is torch.float32 for x in drawn[1:])


def test_equal_logits_follow_the_noise() -> None:
    """nth, as one number and as one a row, purpose, stream and t_out all name places."""
    vocab, rows = 37, 12
    stream_M2 = torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(5)).int()
    t_out_M = torch.arange(rows, dtype=torch.int32) * 1_000_003
    for nth in (3, torch.arange(rows, dtype=torch.int32) % 5, torch.arange(rows) % 7):
        noise_MV = gumbel_noise(stream_M2, t_out_M, vocab, nth, purpose=9)
        drawn = draw_there(torch.zeros(rows, vocab), params_of(rows), stream_M2, t_out_M, nth=nth, purpose=9)
        assert torch.equal(drawn.id_M.long(), noise_MV.argmax(-1))
        torch.testing.assert_close(drawn.logp_draw_M, torch.full((rows,), -math.log(vocab)))


@pytest.mark.parametrize(
    ("vocab", "t_out", "first", "second"), [(4096, 2442544, 1523, 3365), (20000, 18075, 7870, 13188)]
)
def test_equal_scores_go_to_the_lowest_id(vocab: int, t_out: int, first: int, second: int) -> None:
    """Places at which two tokens of one chunk, or of two, have the same best random word; see test_draw.py."""
    stream_M2, t_out_M = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([t_out], dtype=torch.int32)
    for setting in ({}, {"min_p": 0.5}, {"top_k": second + 1}):
        drawn = draw_there(torch.zeros(1, vocab), params_of(1, **setting), stream_M2, t_out_M)
        assert drawn.id_M.tolist() == [first]


def test_rows_without_a_token_are_marked_and_alone() -> None:
    good_MV = torch.randn(9, 130, generator=torch.Generator().manual_seed(2))
    broken_MV = good_MV.clone()
    broken_MV[1, 77] = torch.nan
    broken_MV[2, 0] = -torch.tensor(torch.nan)
    broken_MV[4] = -torch.inf
    broken_MV[5, 129] = torch.inf
    broken_MV[7] = torch.nan
    bad_M = torch.tensor([m in (1, 2, 4, 5, 7) for m in range(9)])
    for setting in ({"temperature": 0.0}, {}, {"top_k": 5, "top_p": 0.5, "min_p": 0.1}):
        arguments = params_of(9, **setting), stream_of(9), torch.arange(9, dtype=torch.int32)
        good = draw_there(good_MV, *arguments)
        for options in ({"raw_MV": broken_MV}, {}) if not setting else ({},):
            broken = draw_there(good_MV if options else broken_MV, *arguments, **options)
            assert (broken.id_M == -1).tolist() == bad_M.tolist()
            assert all(bool(x[bad_M].isnan().all()) for x in broken[1:])
            assert same_bits(take(good, ~bad_M), take(broken, ~bad_M))


def test_types_and_strides() -> None:
    logits_MV = torch.randn(2, 600, generator=torch.Generator().manual_seed(3)) * 2
    arguments = params_of(2, temperature=0.9, top_p=0.9), stream_of(2), torch.arange(2, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        half = draw_there(logits_MV.to(dtype), *arguments)
        assert same_bits(half, draw_there(logits_MV.to(dtype).float(), *arguments))
        both = draw_there(logits_MV, *arguments, raw_MV=logits_MV.to(dtype))
        torch.testing.assert_close(both.lse_M, half.lse_M)
        assert torch.equal(both.id_M, draw_there(logits_MV, *arguments).id_M)
    wide_MV = torch.stack((logits_MV, -logits_MV), 2).flatten(1)
    plain = draw_there(logits_MV, *arguments)
    assert same_bits(plain, draw_there(wide_MV[:, ::2], *arguments))
    assert same_bits(plain, draw_there(torch.cat((logits_MV, logits_MV), 1)[:, :600], *arguments))
    double = draw_there(logits_MV, *arguments, raw_MV=logits_MV.double())
    assert same_bits(plain, double)
    none = draw_there(logits_MV[:0], params_of(0), stream_of(0), torch.arange(0).int())
    assert all(x.shape == (0,) for x in none)


def test_rows_ignore_their_batch() -> None:
    for vocab, rows in ((61, 7), (4500, 4)):
        logits_MV, params, stream_M2, t_out_M = random_case(11, rows, vocab)
        whole = draw_there(logits_MV, params, stream_M2, t_out_M)
        for m in range(rows):
            row = slice(m, m + 1)
            alone = draw_there(logits_MV[row], DrawParams(*(x[row] for x in params)), stream_M2[row], t_out_M[row])
            assert same_bits(alone, take(whole, row)), m
        apart = draw_there(logits_MV, params, stream_M2, t_out_M, raw_MV=logits_MV.clone())
        assert same_bits(whole, apart), "raw apart, but equal"


# --- compiled only ---------------------------------------------------------------------------------------------------

ON_A_GPU = pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")


@ON_A_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", draws.LAWS)
def test_chi_square(name: str) -> None:
    ids_M = draws.draw_many(draw_there, draws.LAW_LOGITS, draws.DRAWS, seed=21, **draws.LAWS[name]).id_M
    assert draws.chi_square(ids_M, draws.law(draws.LAW_LOGITS, **(draws.NEUTRAL | draws.LAWS[name]))) > 1e-4


@ON_A_GPU
@pytest.mark.gpu
def test_one_graph_serves_all_parameters() -> None:
    """Captured with greedy rows, replayed with filters: nothing was decided by the host."""
    logits_MV, params, stream_M2, t_out_M = (
        DrawParams(*(y.to(DEVICE) for y in x)) if isinstance(x, DrawParams) else x.to(DEVICE)
        for x in random_case(5, 32, 70_000)
    )
    wanted = DrawParams(*(x.clone() for x in params))
    params.temperature_M.zero_()
    draw_gpu(logits_MV, params, stream_M2, t_out_M)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_gpu(logits_MV, params, stream_M2, t_out_M)
    for x, y in zip(params, wanted, strict=True):
        x.copy_(y)
    graph.replay()
    expected = draw_gpu(logits_MV, params, stream_M2, t_out_M)
    assert same_bits(Drawn(*(x.cpu() for x in drawn)), Drawn(*(x.cpu() for x in expected)))
    reference = draw_reference(logits_MV.cpu(), DrawParams(*(x.cpu() for x in wanted)), stream_M2.cpu(), t_out_M.cpu())
    assert (drawn.id_M.cpu() == reference.id_M).float().mean() > 0.9
