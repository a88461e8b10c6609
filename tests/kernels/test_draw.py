"""The operation `draw`: known answers, both forms against each other, exact semantics, and the law of what is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels import cpu_runtime
from headrace.kernels.draw import Drawn, DrawParams, draw, stream_key
from headrace.kernels.draw import benchmark as draw_benchmark
from headrace.kernels.draw import cpu as cpu_form
from headrace.kernels.draw.cpu import draw_cpu
from headrace.kernels.draw.reference import draw_reference, gumbel_noise, philox4x32, survivors

DrawForm = Callable[..., Drawn]
FORMS = pytest.mark.parametrize("form", [draw_reference, draw_cpu], ids=["reference", "cpu"])
NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def params_of(rows: int, **setting: Any) -> DrawParams:
    values = NEUTRAL | setting
    return DrawParams(
        torch.full((rows,), float(values["temperature"])),
        torch.full((rows,), int(values["top_k"]), dtype=torch.int32),
        torch.full((rows,), float(values["top_p"])),
        torch.full((rows,), float(values["min_p"])),
    )


def stream_of(rows: int, seed: int = 0, sample: int = 0) -> Tensor:
    return torch.tensor([stream_key(seed, sample)], dtype=torch.int32).expand(rows, 2)


def draw_many(form: DrawForm, logits_V: Tensor, rows: int, seed: int = 0, first: int = 0, **setting: Any) -> Drawn:
    """The same logits at `rows` neighbouring token indices of one stream."""
    t_out_M = torch.arange(first, first + rows, dtype=torch.int32)
    logits_MV = logits_V.expand(rows, -1).contiguous()
    return form(logits_MV, params_of(rows, **setting), stream_of(rows, seed), t_out_M)


def same_bits(one: Drawn, other: Drawn) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def take(drawn: Drawn, rows: Tensor | slice) -> Drawn:
    return Drawn(*(x[rows] for x in drawn))


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    assert philox4x32(torch.tensor(words[1]), torch.tensor(words[0])).tolist() == words[2]
    # The compiled form: word v % 4 of counter (t_out, nth, purpose, v // 4), for a token of that block.
    place = tuple(np.uint64(x) for x in (*words[0][:3], *words[1]))
    tokens = words[0][3] * 4 + np.arange(4, dtype=np.int64)
    out = np.empty(4, np.uint32)
    cpu_form._words_of_list(out, tokens, 4, place)
    assert out.tolist() == words[2]


NOISE_STREAM = torch.tensor([[1, -2], [2**31 - 1, -(2**31)]], dtype=torch.int32)
NOISE_T_OUT = torch.tensor([0, 7], dtype=torch.int32)
NOISE_STORED = torch.tensor(
    [
        [1.5965372, 0.0578108, 0.1676160, 0.9930655, 0.8366696, 0.1079780, 0.3936526, 0.6052464, 0.1383005, -0.1237662],
        [
            0.7441765,
            1.2137149,
            2.6095873,
            -0.2108568,
            1.9189492,
            1.3180070,
            0.0402034,
            3.0212339,
            0.7102537,
            -0.9458950,
        ],
    ]
)


def test_noise_stored() -> None:
    """Values from plain integer and double arithmetic: what any other kernel must reproduce."""
    noise_MV = gumbel_noise(NOISE_STREAM, NOISE_T_OUT, 10, nth=3, purpose=5)
    torch.testing.assert_close(noise_MV, NOISE_STORED, rtol=0, atol=5e-7)


def test_noise_at_the_ends_is_finite() -> None:
    words = np.array([0, 1, 2**31, 2**32 - 2**8, 2**32 - 1], dtype=np.uint32)
    noise = [float(cpu_form._gumbel(word)) for word in words]
    expected = [-math.log(-math.log1p(-min((int(x) + 0.5) / 2**32, 1 - 2**-24))) for x in words]
    np.testing.assert_allclose(noise, expected, rtol=2e-6)
    assert 22.87 < noise[0] < 22.88
    assert -2.82 < noise[-1] < -2.81


def test_noise_bound_holds() -> None:
    """The bound that spares logarithms is never below the noise by more than half of the slack."""
    edges = [2**k + d for k in range(33) for d in (-1, 0, 1) if 0 <= 2**k + d < 2**32]
    words = np.array(edges + np.random.default_rng(0).integers(0, 2**32, 20_000).tolist(), dtype=np.uint32)
    gap = [cpu_form._bound(np.float32(-3.0), w) - (cpu_form._gumbel(w) - 3.0) for w in words]
    assert min(gap) > -0.5 * cpu_form._SLACK
    rare = (words > 2**6) & (words < 2**26)
    assert np.max(np.array(gap)[rare]) < 0.08, "loose where it has to be tight"


def test_stream_keys() -> None:
    assert stream_key(0, 0) == (778594294, 644239719)
    assert stream_key(2**64 - 1, 3, (1, 2)) == (-2078640099, -984466347)
    branches = [(), (0,), (1,), (0, 0), (0, 1)]
    keys = {stream_key(seed, sample, branch) for seed in range(20) for sample in range(20) for branch in branches}
    assert len(keys) == 20 * 20 * len(branches)
    wrong: list[Any] = [(-1, 0), (2**64, 0), (0, -1), (0, 0, (-3,)), (0, 0, (0, 2**64))]
    for arguments in wrong:
        with pytest.raises(ValueError, match="limit is 0 to 18446744073709551615"):
            stream_key(*arguments)


def test_exp_is_accurate() -> None:
    @cpu_runtime.njit_serial(fastmath=cpu_runtime.FAST_SUMS)
    def exp_all(x, out):  # type: ignore[no-untyped-def]
        for i in range(x.shape[0]):
            out[i] = cpu_runtime.exp_f32(x[i])

    x = np.concatenate([np.linspace(-87.29, 88.29, 1_000_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    out = np.empty_like(x)
    exp_all(x, out)
    assert np.abs(out / np.exp(x.astype(np.float64)) - 1.0).max() < 2e-7
    special = np.array([0.0, -0.0, -np.inf, -1e30, np.nan], np.float32)
    out = np.empty_like(special)
    exp_all(special, out)
    assert out.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


# --- the compiled form against the reference -------------------------------------------------------------------------


def random_case(seed: int, rows: int, vocab: int) -> tuple[Tensor, DrawParams, Tensor, Tensor]:
    """Logits with ties, masked entries and broken rows, under parameters that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)

    def chance(p: float, *shape: int) -> Tensor:
        return torch.rand(shape or (rows,), generator=generator) < p

    logits_MV = torch.randn(rows, vocab, generator=generator) * torch.rand(rows, 1, generator=generator) * 8
    logits_MV = torch.where(chance(0.3, rows, 1), logits_MV.round(), logits_MV)
    logits_MV[chance(0.3, rows, 1) & chance(0.4, rows, vocab)] = -torch.inf
    logits_MV[chance(0.05, rows, 1) & chance(0.3, rows, vocab)] = torch.nan
    logits_MV[chance(0.03, rows, 1) & chance(0.3, rows, vocab)] = torch.inf
    logits_MV[chance(0.03)] = -torch.inf
    temperature_M = torch.rand(rows, generator=generator) * 2 + 0.05
    params = DrawParams(
        torch.where(chance(0.2), 0.0, torch.where(chance(0.2), 1.0, temperature_M)),
        torch.randint(1, vocab + 3, (rows,), generator=generator, dtype=torch.int32) * chance(0.5),
        torch.where(chance(0.5), torch.rand(rows, generator=generator), 1.0),
        torch.where(chance(0.4), torch.rand(rows, generator=generator), 0.0),
    )
    stream_M2 = torch.randint(-(2**31), 2**31, (rows, 2), generator=generator).int()
    t_out_M = torch.randint(0, 10_000, (rows,), generator=generator).int()
    return logits_MV, params, stream_M2, t_out_M


def row_is_close_call(logits_V: Tensor, params: DrawParams, stream_2: Tensor, t_out: Tensor) -> bool:
    """Whether rounding may decide a row: its two best scores, or the mass at its top-p boundary, nearly meet."""
    temperature = float(params.temperature_M[0])
    if temperature <= 0.0:
        return False
    z_V = (logits_V - logits_V.max()) / temperature
    unbounded = params._replace(top_p_M=torch.ones(1))
    p_V = z_V.double().exp().masked_fill(~survivors(z_V[None], unbounded)[0], 0.0)
    mass_V = p_V.sort(descending=True).values.cumsum(0) / p_V.sum()
    if float(params.top_p_M[0]) < 1.0 and bool((mass_V - float(params.top_p_M[0])).abs().min() < 1e-6):
        return True
    score_V = (z_V + gumbel_noise(stream_2[None], t_out[None], z_V.shape[0])[0]).masked_fill(
        ~survivors(z_V[None], params)[0], -torch.inf
    )
    best = score_V.topk(min(2, score_V.shape[0])).values
    return best.shape[0] == 2 and bool(best[0] - best[1] < 1e-5)


def compare_forms(
    case: tuple[Tensor, DrawParams, Tensor, Tensor],
    raw_MV: Tensor | None,
    events: Counter[str],
    form: DrawForm = draw_cpu,
) -> None:
    logits_MV, params, stream_M2, t_out_M = case
    reference = draw_reference(*case, raw_MV=raw_MV)
    fast = form(*case, raw_MV=raw_MV)
    bad_M = ~(logits_MV.amax(-1).isfinite() & (logits_MV if raw_MV is None else raw_MV).amax(-1).isfinite())
    for m in range(logits_MV.shape[0]):
        row = slice(m, m + 1)
        events["rows"] += 1
        if bad_M[m]:
            events["bad rows"] += 1
            for drawn in (reference, fast):
                assert drawn.id_M[m] == -1
                assert all(bool(x[m].isnan()) for x in drawn[1:])
            continue
        row_params = DrawParams(*(x[row] for x in params))
        if row_is_close_call(logits_MV[m], row_params, stream_M2[m], t_out_M[m]):
            events["close calls"] += 1
            continue
        for expected, got in zip(take(reference, row), take(fast, row), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
        greedy = bool(params.temperature_M[m] <= 0)
        events["greedy"] += greedy
        events["sampled"] += not greedy
        events["ties at the top"] += int((logits_MV[m] == logits_MV[m].max()).sum()) > 1
        events["masked"] += bool((logits_MV[m] == -torch.inf).any())
        if not greedy:
            z_V = (logits_MV[m] - logits_MV[m].max()) / params.temperature_M[m]
            kept = int(survivors(z_V[None], row_params).sum())
            events["filtered"] += kept < int(z_V.isfinite().sum())
            events["not the most probable"] += bool(logits_MV[m, fast.id_M[m].long()] < logits_MV[m].max())
            events["top-k and top-p"] += bool(row_params.top_k_M[0] > 0) and bool(row_params.top_p_M[0] < 1)


def test_forms_agree(events: Counter[str]) -> None:
    wanted = "rows,bad rows,greedy,sampled,ties at the top,masked,filtered,not the most probable,top-k and top-p"
    events.update(dict.fromkeys([*wanted.split(","), "separate raw"], 0))

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), vocab=st.integers(1, 300), separate=st.booleans())
    def check(seed: int, rows: int, vocab: int, separate: bool) -> None:
        case = random_case(seed, rows, vocab)
        raw_MV = None
        if separate:
            raw_MV = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + 1)) * 3
            raw_MV[seed % rows, seed % vocab] = torch.nan if seed % 7 == 0 else 0.0
            events["separate raw"] += 1
        compare_forms(case, raw_MV, events)

    check()
    assert events.get("close calls", 0) < 0.02 * events["rows"], events


LARGE_LOGITS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": lambda v, g: torch.randn(v, generator=g) * 2.5,
    "flat": lambda v, g: torch.randn(v, generator=g) * 0.01,
    "all equal": lambda v, g: torch.full((v,), -3.25),
    "few levels": lambda v, g: torch.randn(v, generator=g).round(),
    "outliers": lambda v, g: torch.randn(v, generator=g) * 10.0 ** torch.randint(-3, 30, (v,), generator=g).float(),
    "mostly masked": lambda v, g: torch.randn(v, generator=g).masked_fill(
        torch.rand(v, generator=g) < 0.99, -torch.inf
    ),
    "one token": lambda v, g: torch.full((v,), -torch.inf).index_fill(0, torch.tensor([v // 2]), 1.0),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "temperature 0.7": {"temperature": 0.7},
    "tiny temperature": {"temperature": 1e-30},
    "large temperature": {"temperature": 50.0},
    "top-k 50": {"top_k": 50},
    "top-k 7000": {"temperature": 1.3, "top_k": 7000},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-p 0.3": {"top_p": 0.3},
    "min-p 0.05": {"min_p": 0.05},
    "min-p and top-p": {"min_p": 0.01, "top_p": 0.9},
    "all": {"temperature": 0.9, "min_p": 0.001, "top_k": 3000, "top_p": 0.9},
}


@pytest.mark.parametrize("kind", LARGE_LOGITS)
def test_forms_agree_on_large_vocabularies(kind: str) -> None:
    """Several chunks, an odd end, every selection path; one row a setting."""
    vocab, rows = 20_011, len(SETTINGS)
    generator = torch.Generator().manual_seed(1)
    logits_MV = torch.stack([LARGE_LOGITS[kind](vocab, generator) for _ in range(rows)])
    single = [params_of(1, **setting) for setting in SETTINGS.values()]
    params = DrawParams(*(torch.cat(column) for column in zip(*single, strict=True)))
    stream_M2 = torch.tensor([stream_key(m, 0) for m in range(rows)], dtype=torch.int32)
    events: Counter[str] = Counter()
    compare_forms((logits_MV, params, stream_M2, torch.arange(rows, dtype=torch.int32)), None, events)
    assert events["rows"] == rows
    assert events.get("close calls", 0) <= 3, events


# --- exact semantics -------------------------------------------------------------------------------------------------


def support(form: DrawForm, logits: list[float], draws: int = 600, **setting: Any) -> set[int]:
    """Ids that occur. Asserts that their log-probs are those of the renormalised survivors."""
    logits_V = torch.tensor(logits)
    drawn = draw_many(form, logits_V, draws, **setting)
    ids = set(drawn.id_M.tolist())
    z_V = logits_V / (setting.get("temperature", 1.0))
    kept_V = torch.full_like(z_V, -torch.inf)
    kept_V[sorted(ids)] = z_V[sorted(ids)]
    torch.testing.assert_close(drawn.logp_draw_M, kept_V.log_softmax(0)[drawn.id_M.long()], rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.logp_raw_M, logits_V.log_softmax(0)[drawn.id_M.long()], rtol=0, atol=1e-5)
    return ids


@FORMS
def test_filters_keep_exactly(form: DrawForm) -> None:
    equal = [0.5] * 8
    assert support(form, equal, top_k=3) == {0, 1, 2}, "ties to the lowest id"
    assert support(form, equal, top_k=8) == support(form, equal, top_k=80) == set(range(8))
    assert support(form, equal, top_p=0.5) == {0, 1, 2, 3}, "the crossing token is the fourth"
    assert support(form, equal, top_p=0.51) == {0, 1, 2, 3, 4}
    assert support(form, equal, top_k=4, top_p=0.5) == {0, 1}, "top-p is over what top-k left"
    assert support(form, [0.0, 1.0, 0.0, 1.0, 0.0], top_k=3) == {0, 1, 3}
    assert support(form, [2.0, 5.0, 1.0], top_p=1e-9) == {1}
    assert support(form, [2.0, 5.0, 1.0], top_p=0.0) == {1}, "at least one token"
    assert support(form, [2.0, 5.0, 5.0, 1.0], min_p=1.0) == {1, 2}
    just_below = float(np.nextafter(np.float32(5.0), np.float32(0.0)))
    assert support(form, [2.0, 5.0, just_below], min_p=1.0) == {1}
    halves = [0.0, -math.log(1.9), -math.log(2.1), -math.log(4.1)]
    assert support(form, halves, min_p=0.5) == {0, 1}
    assert support(form, halves, min_p=0.25, draws=2000) == {0, 1, 2}
    assert support(form, halves, min_p=0.5, temperature=2.0, draws=2000) == {0, 1, 2}, "temperature before min-p"
    assert support(form, [1.0, -math.inf, 1.0, -math.inf], top_k=3) == {0, 2}, "masked tokens never fill up"
    assert support(form, [-math.inf, 3.0]) == {1}


@FORMS
def test_greedy(form: DrawForm) -> None:
    logits_MV = torch.tensor([[1.0, 3.0, 3.0, -1.0], [0.0, -0.0, -5.0, 0.0], [-math.inf, -math.inf, -2.0, -3.0]])
    params = params_of(3, temperature=0.0, top_k=1, top_p=0.1, min_p=0.5)
    drawn = form(logits_MV, params, stream_of(3), torch.arange(3).int())
    assert drawn.id_M.tolist() == [1, 0, 2]
    assert drawn.logp_draw_M.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(drawn.lse_M, logits_MV.logsumexp(-1))
    torch.testing.assert_close(drawn.logp_raw_M, logits_MV.log_softmax(-1).amax(-1))
    assert drawn.id_M.dtype is torch.int32
    assert all(x.dtype is torch.float32 for x in drawn[1:])


@FORMS
def test_equal_logits_follow_the_noise(form: DrawForm) -> None:
    """With all logits equal, the token is the argmax of the noise: nth, purpose, stream and t_out all name places."""
    vocab, rows = 37, 64
    stream_M2 = torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(5)).int()
    t_out_M = torch.arange(rows, dtype=torch.int32) * 1_000_003
    nth_M = torch.arange(rows, dtype=torch.int32) % 5
    noise_MV = gumbel_noise(stream_M2, t_out_M, vocab, nth_M, purpose=9)
    drawn = form(torch.zeros(rows, vocab), params_of(rows), stream_M2, t_out_M, nth=nth_M, purpose=9)
    assert torch.equal(drawn.id_M.long(), noise_MV.argmax(-1))
    torch.testing.assert_close(drawn.logp_draw_M, torch.full((rows,), -math.log(vocab)))
    alone = form(torch.zeros(1, vocab), params_of(1), stream_M2[3:4], t_out_M[3:4], nth=3, purpose=9)
    assert same_bits(alone, take(drawn, slice(3, 4)))


@FORMS
@pytest.mark.parametrize(
    ("vocab", "t_out", "first", "second"), [(4096, 2442544, 1523, 3365), (20000, 18075, 7870, 13188)]
)
def test_equal_scores_go_to_the_lowest_id(form: DrawForm, vocab: int, t_out: int, first: int, second: int) -> None:
    """Places found by search, at which two tokens of one chunk, or of two, have the same best random word."""
    stream_M2, t_out_M = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([t_out], dtype=torch.int32)
    noise_V = gumbel_noise(stream_M2, t_out_M, vocab)[0]
    assert (noise_V == noise_V.max()).nonzero()[:, 0].tolist() == [first, second]
    for setting in ({}, {"min_p": 0.5}, {"top_k": second + 1}):
        assert form(torch.zeros(1, vocab), params_of(1, **setting), stream_M2, t_out_M).id_M.tolist() == [first]


@FORMS
def test_rows_without_a_token_are_marked_and_alone(form: DrawForm) -> None:
    generator = torch.Generator().manual_seed(2)
    good_MV = torch.randn(9, 130, generator=generator)
    broken_MV = good_MV.clone()
    broken_MV[1, 77] = torch.nan
    broken_MV[2, 0] = -torch.tensor(torch.nan)
    broken_MV[4] = -torch.inf
    broken_MV[5, 129] = torch.inf
    broken_MV[7] = torch.nan
    for setting in ({"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
        arguments = params_of(9, **setting), stream_of(9), torch.arange(9, dtype=torch.int32)
        good, broken = form(good_MV, *arguments), form(broken_MV, *arguments)
        bad_M = torch.tensor([m in (1, 2, 4, 5, 7) for m in range(9)])
        assert (broken.id_M == -1).tolist() == bad_M.tolist()
        assert all(bool(x[bad_M].isnan().all()) for x in broken[1:])
        assert same_bits(take(good, ~bad_M), take(broken, ~bad_M))


@FORMS
def test_raw_logits_are_only_reported(form: DrawForm) -> None:
    generator = torch.Generator().manual_seed(3)
    raw_MV = torch.randn(6, 90, generator=generator) * 2
    logits_MV = raw_MV.masked_fill(torch.rand(6, 90, generator=generator) < 0.5, -torch.inf) - 1.0
    arguments = params_of(6, temperature=0.9, top_p=0.9), stream_of(6), torch.arange(6, dtype=torch.int32)
    plain, both = form(logits_MV, *arguments), form(logits_MV, *arguments, raw_MV=raw_MV)
    assert torch.equal(plain.id_M, both.id_M)
    torch.testing.assert_close(plain.logp_draw_M, both.logp_draw_M)
    torch.testing.assert_close(both.lse_M, raw_MV.logsumexp(-1))
    torch.testing.assert_close(both.logp_raw_M, raw_MV.log_softmax(-1).gather(1, both.id_M.long()[:, None])[:, 0])


def test_dispatch_and_refusals() -> None:
    generator = torch.Generator().manual_seed(4)
    logits_MV = torch.randn(3, 50, generator=generator)
    arguments = params_of(3), stream_of(3), torch.arange(3, dtype=torch.int32)
    fast, wide = draw(logits_MV, *arguments), draw(logits_MV.double(), *arguments)
    assert same_bits(fast, draw_cpu(logits_MV, *arguments))
    assert torch.equal(fast.id_M, wide.id_M)
    torch.testing.assert_close(fast.logp_draw_M, wide.logp_draw_M, rtol=0, atol=1e-6)
    half = draw(logits_MV.bfloat16(), *arguments)
    assert torch.equal(half.id_M, draw(logits_MV.bfloat16().float(), *arguments).id_M)
    strided_MV = torch.randn(3, 100, generator=generator)[:, ::2]
    assert same_bits(draw(strided_MV, *arguments), draw(strided_MV.contiguous(), *arguments))
    assert draw(logits_MV[:0], params_of(0), stream_of(0), torch.arange(0).int()).id_M.shape == (0,)
    for wrong in (
        (logits_MV[0], *arguments),
        (logits_MV[:, :0], *arguments),
        (logits_MV[:2], *arguments),
        (logits_MV, params_of(2), *arguments[1:]),
        (logits_MV, arguments[0], stream_of(2), arguments[2]),
        (logits_MV, *arguments[:2], torch.arange(4).int()),
    ):
        with pytest.raises(ValueError, match="shape"):
            draw(*wrong)
    with pytest.raises(ValueError, match="raw logits have shape"):
        draw(logits_MV, *arguments, raw_MV=logits_MV[:2])


# --- a result is a function of its row -------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [61, 9001, 70_000])
def test_rows_ignore_batch_and_threads(vocab: int) -> None:
    logits_MV, params, stream_M2, t_out_M = random_case(11, 24, vocab)
    raw_MV = logits_MV.clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = draw(logits_MV, params, stream_M2, t_out_M)
        assert same_bits(whole, draw(logits_MV, params, stream_M2, t_out_M, raw_MV=raw_MV)), "raw apart, but equal"
        torch.set_num_threads(1)
        assert same_bits(whole, draw(logits_MV, params, stream_M2, t_out_M))
        for count in (1, 2):
            torch.set_num_threads(count)
            for m in range(24):
                row = slice(m, m + 1)
                alone = draw(logits_MV[row], DrawParams(*(x[row] for x in params)), stream_M2[row], t_out_M[row])
                assert same_bits(alone, take(whole, row)), (count, m)
            assert torch.get_num_threads() == count, "torch keeps its own number of threads"
    finally:
        torch.set_num_threads(threads)


def test_concurrent_callers_do_not_disturb_each_other() -> None:
    cases = [random_case(seed, 5, 5000 + 4000 * seed) for seed in range(4)]
    expected = [draw(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(map(same_bits, expected, pool.map(lambda case: draw(*case), cases)))


# --- the law of what is drawn ----------------------------------------------------------------------------------------


def p_value(statistic: float, degrees: int) -> float:
    """Probability of a chi-square at least this large."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


def chi_square(ids_M: Tensor, p_V: np.ndarray) -> float:
    """p-value of counts against probabilities; tokens expected fewer than five times are taken together."""
    counts_V = np.bincount(ids_M.numpy(), minlength=p_V.shape[0])
    expected_V = p_V * counts_V.sum()
    assert counts_V[p_V == 0].sum() == 0, "a filtered token was drawn"
    often = expected_V >= 5
    counts, expected = counts_V[often], expected_V[often]
    if expected_V[~often].sum() > 0:
        counts = np.append(counts, counts_V[~often].sum())
        expected = np.append(expected, expected_V[~often].sum())
    return p_value(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)


def law(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities by sorting lists, independent of both forms."""
    weight = np.exp((logits_V.double().numpy() - float(logits_V.max())) / temperature)
    order = sorted(range(len(weight)), key=lambda v: (-weight[v], v))
    order = [v for v in order if weight[v] >= min_p]
    order = order[:top_k] if top_k else order
    total, kept, mass = sum(weight[v] for v in order), [], 0.0
    for v in order:
        kept.append(v)
        mass += weight[v]
        if top_p < 1.0 and mass >= top_p * total:
            break
    p_V = np.zeros(len(weight))
    p_V[kept] = weight[kept] / weight[kept].sum()
    return p_V


LAW_LOGITS = torch.randn(50, generator=torch.Generator().manual_seed(8)) * 1.5
LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.85},
    "min-p": {"min_p": 0.08},
    "all": {"temperature": 1.2, "top_k": 15, "top_p": 0.9, "min_p": 0.03},
}
DRAWS = 40_000
REFERENCE_DRAWS = 15_000  # the reference sorts and makes noise of every row in full


@FORMS
@pytest.mark.parametrize("name", LAWS)
def test_chi_square(form: DrawForm, name: str) -> None:
    draws = DRAWS if form is draw_cpu else REFERENCE_DRAWS
    ids_M = draw_many(form, LAW_LOGITS, draws, seed=21, **LAWS[name]).id_M
    assert chi_square(ids_M, law(LAW_LOGITS, **(NEUTRAL | LAWS[name]))) > 1e-4


def test_chi_square_over_several_chunks() -> None:
    """Tokens far apart compete by the same law: 40 equal ones in a vocabulary of two and a bit chunks."""
    logits_V = torch.full((9001,), -torch.inf)
    logits_V[torch.arange(40) * 230 + 3] = 0.0
    for setting in ({}, {"top_k": 40}):
        ids_M = torch.cat(
            [draw_many(draw_cpu, logits_V, 1000, seed=4, first=k * 1000, **setting).id_M for k in range(8)]
        )
        assert chi_square(ids_M, np.where(logits_V.numpy() == 0, 1 / 40, 0.0)) > 1e-4


def test_chi_square_notices_wrong_laws() -> None:
    """The test has teeth: slightly wrong laws, and noise that is not independent, are refused."""
    ids_M = draw_many(draw_cpu, LAW_LOGITS, DRAWS, seed=21).id_M
    right = law(LAW_LOGITS, 1.0, 0, 1.0, 0.0)
    assert chi_square(ids_M, right) > 1e-4
    assert chi_square(ids_M, law(LAW_LOGITS, 1.07, 0, 1.0, 0.0)) < 1e-6, "temperature off by seven per cent"
    assert chi_square(ids_M, np.roll(right, 1)) < 1e-6
    narrow_M = draw_many(draw_cpu, LAW_LOGITS, DRAWS, seed=21, top_k=49).id_M
    wide = law(LAW_LOGITS, 1.0, 0, 1.0, 0.0)
    assert LAW_LOGITS.argmin() not in narrow_M
    assert chi_square(draw_many(draw_cpu, LAW_LOGITS, DRAWS, top_k=30).id_M, wide) < 1e-6, "filter forgotten"
    noise_MV = gumbel_noise(stream_of(DRAWS, 21), torch.arange(DRAWS, dtype=torch.int32), 50)
    assert chi_square((LAW_LOGITS + noise_MV).argmax(-1), right) > 1e-4
    shared_MV = noise_MV[:, torch.arange(50) // 4 * 4]
    assert chi_square((LAW_LOGITS + shared_MV).argmax(-1), right) < 1e-6, "one word for a block of four"
    assert chi_square((LAW_LOGITS + 0.95 * noise_MV).argmax(-1), right) < 1e-6, "noise too small"


def dependence(one_M: Tensor, other_M: Tensor, vocab: int) -> float:
    """p-value of independence of two columns of tokens."""
    table = np.bincount((one_M.long() * vocab + other_M.long()).numpy(), minlength=vocab * vocab).reshape(vocab, vocab)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return p_value(float(((table - expected) ** 2 / expected).sum()), (vocab - 1) ** 2)


def test_places_are_independent() -> None:
    rows, vocab = DRAWS, 7
    logits_MV = torch.linspace(0, 1, vocab).expand(rows, vocab).contiguous()
    t_out_M = torch.arange(rows, dtype=torch.int32)

    def ids(seed: int = 0, sample: int = 0, shift: int = 0, nth: int = 0, purpose: int = 0) -> Tensor:
        stream_M2 = stream_of(rows, seed, sample)
        return draw_cpu(logits_MV, params_of(rows), stream_M2, t_out_M + shift, nth=nth, purpose=purpose).id_M

    base_M = ids()
    others = {
        "next token": ids(shift=1),
        "four on": ids(shift=4),
        "next sample": ids(sample=1),
        "next seed": ids(seed=1),
        "next step of a block": ids(nth=1),
        "other purpose": ids(purpose=1),
    }
    for name, other_M in others.items():
        assert dependence(base_M, other_M, vocab) > 1e-4, name
    assert dependence(base_M, ids(), vocab) < 1e-6, "the same place gives the same token"
    assert torch.equal(others["next token"][:-1], base_M[1:])
    one_M, other_M = (
        draw_cpu(logits_MV, params_of(rows), torch.tensor([key]).int().expand(rows, 2), t_out_M).id_M
        for key in ([4, 5], [5, 5])
    )
    assert dependence(one_M, other_M, vocab) > 1e-4, "keys that differ by one bit"


@FORMS
def test_filtered_tokens_never_win(form: DrawForm) -> None:
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(6)) * 0.3
    logits_V[7] = -torch.inf
    for setting in ({"top_k": 20}, {"top_p": 0.5}, {"min_p": 0.6}, {"temperature": 5.0, "top_k": 30, "top_p": 0.8}):
        ids_M = draw_many(form, logits_V, 100_000 if form is draw_cpu else REFERENCE_DRAWS, **setting).id_M
        allowed = np.flatnonzero(law(logits_V, **(NEUTRAL | setting)))
        assert set(ids_M.tolist()) == set(allowed.tolist())


# --- the measuring tool ----------------------------------------------------------------------------------------------


def test_benchmark_compares_equal_laws() -> None:
    """What `draw` is timed against draws from the same law."""
    for temperature, top_k, top_p, min_p in draw_benchmark.FILTERS.values():
        tokens_M = draw_benchmark.torch_tokens(LAW_LOGITS.expand(5000, -1), temperature, top_k, top_p, min_p)
        if temperature == 0.0:
            assert set(tokens_M.tolist()) == {int(LAW_LOGITS.argmax())}
        else:
            assert chi_square(tokens_M, law(LAW_LOGITS, temperature, top_k, top_p, min_p)) > 1e-4


def test_benchmark_runs() -> None:
    entries = draw_benchmark.benchmark(rows=(2,), vocab=(100,), budget_s=0.0)
    assert [entry["filter"] for entry in entries] == list(draw_benchmark.FILTERS)
    assert all(isinstance(entry["ratio"], float) and entry["draw_us"] > 0 for entry in entries)
