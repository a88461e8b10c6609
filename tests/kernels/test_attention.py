"""The operation `attend`: the reference against loops over rows, the CPU form against the reference, poison, bits.

Slots that no row sees, the trash page and fresh outputs hold NaN in every test that draws its case at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.kernels.attention import NONE, AttentionRows, attend, by_rows, cpu, plan_attention, reference, write_kv
from headrace.kernels.attention import benchmark as attention_benchmark
from headrace.kernels.attention.cpu_kernel import CHUNK_SLOTS

NEVER = 10**9
PATHS = {"by number of rows": cpu.WIDE_FROM, "all gathered": 1, "all in place": NEVER}
# Against the reference on the same inputs. bfloat16: outputs are rounded to 8 bits, and torch's fused attention rounds
# the probabilities too.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}
GROUPS = ("groups", "padded groups", "stale slots in groups", "causal")
PROFILE = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny calls: on busy cores, waiting for the other threads would be most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """One step and one layer; `seen` is the mask, by row a list of slots, made without the code under test."""

    q_RHD: Tensor
    rows: AttentionRows
    k_KPSD: Tensor
    v_KPSD: Tensor
    page_table_BP: Tensor
    kv_len_B: Tensor
    lens: list[tuple[int, int, int]]
    options: dict[str, Any]
    seen: list[list[int]]
    real: list[bool]
    masks: list[list[bool] | None]
    """By row the mask over its second interval, if it has one."""

    def run(self, form: Any = None, **more: Any) -> tuple[Tensor, Tensor]:
        tables: Any = (self.rows, self.k_KPSD, self.v_KPSD, self.page_table_BP, self.kv_len_B)
        call: Any = form or attend
        out, lse = call(self.q_RHD, *tables, **self.options, need_lse=True, **more)
        assert lse is not None
        return out, lse

    def plan(self, wide_from: int, lens: Sequence[tuple[int, int, int]] | None) -> cpu.CpuPlan:
        page_size = self.k_KPSD.shape[2]
        return cpu.plan_attention(self.rows, self.page_table_BP, self.kv_len_B, page_size, lens, wide_from)


def int32(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values).tolist(), dtype=torch.int32)


def seen_slots(n: int, t: int, a: int, b: int, c: int, window: int, mask: list[bool] | None) -> list[int]:
    low = t - window + 1 if window > 0 else 0
    last = n + max(a, c, 0)
    return [
        s
        for s in range(max(last, 0))
        if (s < n + a or (n + b <= s < n + c and (mask is None or mask[s - n - b]))) and s >= low
    ]


def draw_mask(rng: np.random.Generator, kind: str, masks: str, length: int) -> list[bool] | None:
    """The mask of a row over a second interval of `length` slots."""
    if masks == "none" or (masks == "some rows" and rng.integers(2)):
        return None
    if kind == "tree":  # the row's ancestors under a random parent each, and the row itself
        mask, i = [False] * length, length - 1
        while i >= 0:
            mask[i] = True
            i = int(rng.integers(-1, i)) if i > 0 else -1
        return mask
    share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return [bool(x) for x in rng.random(length) < share]


def pack_masks(rng: np.random.Generator, masks: Sequence[list[bool] | None]) -> tuple[list[int], list[int]]:
    """(bits, words) of the rows' masks, words that no mask owns and bits behind a mask's end at random."""
    bits, words = [], []
    for mask in masks:
        if mask is None:
            bits.append(-1)
            continue
        words += rng.integers(-(2**31), 2**31, int(rng.integers(0, 3))).tolist()
        bits.append(len(words))
        for i in range(0, len(mask), 32):
            part = [*mask[i : i + 32], *(rng.random(32) < 0.5)][:32]
            word = sum(2**j for j, bit in enumerate(part) if bit)
            words.append(word - 2**32 if word >= 2**31 else word)
    return bits, words


def draw_row(rng: np.random.Generator, kind: str, k: int, n: int, count: int) -> tuple[int, int, int]:
    """(a, b, c) of row k of `count`."""
    if kind in ("causal", "tree"):
        return 0, 0, k + 1
    if kind == "block":
        return 0, 0, count
    if kind == "empty":
        return NONE, 0, 0
    if kind == "own only":
        return NONE, k, k + 1
    a = int(rng.choice([NONE, 0, -int(rng.integers(0, n + 1)), int(rng.integers(0, count + 1))]))
    b = int(rng.integers(-n, count + 1))
    return a, b, int(rng.integers(b, count + 1))


def make_case(
    seed: int,
    *,
    dtype: torch.dtype = torch.float64,
    page_size: int = 3,
    kv_heads: int = 2,
    group: int = 3,
    size: int = 5,
    v_size: int | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    counts: Sequence[int] = (1, 4),
    committed: Sequence[int] = (7, 0),
    kinds: Sequence[str] = ("causal", "any"),
    masks: Sequence[str] | None = None,
    ghosts: int = 0,
    ghost_tail: int = 0,
) -> Case:
    """Requests with `counts` rows and `committed` slots; an entry of `ghosts` padding rows if any; the last
    `ghost_tail` rows of every request are padding. `masks`, by request: which of its rows have a mask over their second
    interval, "none", "some rows" or "all rows"; without it there is no table of masks."""
    rng = np.random.default_rng(seed)
    n_reqs, v_size = len(counts), v_size or size
    b_max = n_reqs + 2
    index = rng.permutation(b_max)[:n_reqs].tolist()
    slots = [n + count + int(rng.integers(0, 4)) for n, count in zip(committed, counts, strict=True)]
    width = -(-max(slots) // page_size) + 1
    n_pages = 1 + sum(-(-s // page_size) for s in slots) + 3
    free = list(1 + rng.permutation(n_pages - 1))
    table = np.zeros((b_max + 1, width), np.int64)
    kv_len = np.zeros(b_max + 1, np.int64)
    columns: list[tuple[int, int, int, int, int]] = []
    seen: list[list[int]] = []
    real: list[bool] = []
    row_masks: list[list[bool] | None] = []
    lens, reqs = [], []
    k_slots = torch.full((kv_heads, n_pages * page_size, size), math.nan, dtype=torch.float64)
    v_slots = torch.full((kv_heads, n_pages * page_size, v_size), math.nan, dtype=torch.float64)
    masked = masks or ["none"] * n_reqs
    for r, n, count, kind, capacity, which in zip(index, committed, counts, kinds, slots, masked, strict=True):
        kv_len[r] = n
        for p in range(-(-capacity // page_size)):
            table[r, p] = free.pop()
        first, last_slot = len(columns), n
        for k in range(count):
            abc = draw_row(rng, kind, k, n, count)
            t = n + k + int(rng.integers(0, 3)) * (kind == "any")
            ghost = k >= max(1, count - ghost_tail)
            columns.append((b_max if ghost else int(r), t, *((NONE, 0, 1) if ghost else abc)))
            mask = None if ghost else draw_mask(rng, kind, which, abc[2] - abc[1])
            row_masks.append(mask)
            seen.append([] if ghost else seen_slots(n, t, *abc, window, mask))
            real.append(not ghost)
            last_slot = max(last_slot, n + max(abc[0], abc[2]))
        for s in {s for mine in seen[first:] for s in mine}:
            place = table[r, s // page_size] * page_size + s % page_size
            k_slots[:, place] = torch.from_numpy(rng.standard_normal((kv_heads, size)))
            v_slots[:, place] = torch.from_numpy(rng.standard_normal((kv_heads, v_size)))
        lens.append((first, count, last_slot + int(rng.integers(0, 3)) * page_size))
        reqs.append(int(r))
    if ghosts:
        lens.append((len(columns), ghosts, 1))
        reqs.append(b_max)
        columns += [(b_max, 0, NONE, 0, 1)] * ghosts
        seen += [[0]] * ghosts
        real += [False] * ghosts
        row_masks += [None] * ghosts
    fields = [int32([column[i] for column in columns]) for i in range(5)]
    ptr = int32([first for first, _, _ in lens] + [len(columns)])
    bits_and_words = map(int32, pack_masks(rng, row_masks)) if masks else ()
    q = torch.from_numpy(rng.standard_normal((len(columns), kv_heads * (group + 2), size)))
    pools = []
    for x in (k_slots, v_slots):
        layers = torch.full((3, *x.shape), math.nan, dtype=dtype).view(3, kv_heads, n_pages, page_size, x.shape[-1])
        layers[1] = x.to(dtype).view(layers.shape[1:])
        pools.append(layers[1] if seed % 2 else layers.transpose(0, 1).contiguous().transpose(0, 1)[1])
    if v_size < size:
        pools[1] = pools[0][..., :v_size]  # values are the first part of the keys
    return Case(
        q_RHD=q.to(dtype)[:, : kv_heads * group],
        rows=AttentionRows(*fields, ptr, int32(reqs), *bits_and_words),
        k_KPSD=pools[0],
        v_KPSD=pools[1],
        page_table_BP=int32(table),
        kv_len_B=int32(kv_len),
        lens=lens,
        options={
            "scale": size**-0.5,
            "window": window,
            "softcap": softcap,
            "sinks_H": torch.from_numpy(rng.standard_normal(kv_heads * group)).to(dtype) if sinks else None,
        },
        seen=seen,
        real=real,
        masks=row_masks,
    )


def by_loops(case: Case) -> tuple[Tensor, Tensor]:
    """The definition row by row, head by head, in float64."""
    rows, heads, _ = case.q_RHD.shape
    kv_heads, _, page_size, v_size = case.v_KPSD.shape
    q, keys, values = (x.double().numpy() for x in (case.q_RHD, case.k_KPSD, case.v_KPSD))
    sinks, cap = case.options["sinks_H"], case.options["softcap"]
    out, lse = np.zeros((rows, heads, v_size)), np.full((rows, heads), -np.inf)
    for i in range(rows):
        pages = case.page_table_BP[int(case.rows.req_R[i])].tolist()
        for h in range(heads):
            scores = []
            for s in case.seen[i]:
                score = case.options["scale"] * float(
                    q[i, h] @ keys[h * kv_heads // heads][pages[s // page_size], s % page_size]
                )
                scores.append(cap * math.tanh(score / cap) if cap > 0 else score)
            terms = [math.exp(x) for x in scores]
            total = math.fsum(terms) + (math.exp(float(sinks[h])) if terms and sinks is not None else 0.0)
            lse[i, h] = math.log(total) if total else -np.inf
            for s, term in zip(case.seen[i], terms, strict=True):
                out[i, h] += term / total * values[h * kv_heads // heads][pages[s // page_size], s % page_size]
    return torch.from_numpy(out), torch.from_numpy(lse)


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    largest: int = 40,
    masks: bool = False,
    kinds: Sequence[str] = ("causal", "causal", "block", "empty", "own only", "any", "any"),
) -> Case:
    requests = draw(st.integers(1, 4))

    def each(strategy: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(strategy, min_size=requests, max_size=requests))

    softcap = draw(st.sampled_from([0.0, 0.0, 1.5]))
    return make_case(
        draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from(dtypes)),
        page_size=draw(st.sampled_from([1, 3, 16])),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 5])),
        size=draw(st.sampled_from([1, 3, 8, 33])),
        v_size=draw(st.sampled_from([None, None, 7])),
        window=draw(st.sampled_from([0, 0, 1, 6, 20])),
        softcap=softcap,
        sinks=draw(st.booleans()) and draw(st.booleans()),
        counts=each(st.sampled_from([1, 1, 2, 3, 8, 9, 13, 26] if not masks else [1, 2, 3, 9, 13, 26, 40, 70])),
        committed=each(
            st.integers(0, largest) if largest < 100 else st.sampled_from([0, 5, 63, 64, 130, 256, 300, 700])
        ),
        kinds=each(
            st.sampled_from(["causal", "block", "empty", "own only", "any", "any", "tree", "tree"] if masks else kinds)
        ),
        masks=each(st.sampled_from(["none", "some rows", "all rows"])) if masks else None,
        ghosts=draw(st.sampled_from([0, 0, 1, 10])),
        ghost_tail=draw(st.sampled_from([0, 0, 1])),
    )


def count_events(events: Counter[str], case: Case, wide: int) -> None:
    met = {
        "wide": wide,
        "narrow": len(case.lens) - wide,
        "windows": case.options["window"] > 0,
        "softcap": case.options["softcap"] > 0,
        "sinks": case.options["sinks_H"] is not None,
        "empty rows": sum(not mine for mine, real in zip(case.seen, case.real, strict=True) if real),
        "rows with a hole": sum(any(y - x > 1 for x, y in pairwise(mine)) for mine in case.seen),
        "ghost rows": case.real.count(False),
        "odd head counts": case.q_RHD.shape[1] % 2,
        "values of another size": case.k_KPSD.shape[3] != case.v_KPSD.shape[3],
        "values in keys": case.v_KPSD.stride(2) > case.v_KPSD.shape[3],
        "several chunks": sum(mine[0] // CHUNK_SLOTS < mine[-1] // CHUNK_SLOTS for mine in case.seen if mine),
        **count_masks(case),
        str(case.q_RHD.dtype): 1,
    }
    events.update({name: int(count) for name, count in met.items() if count})


MASKS = "masks,masks of several words,masks without a set bit,words below zero,first interval only,"
MASKS += "masks with nothing committed,windows over masks,large requests with masks,"
MASKS += "steps of requests with and without masks,tables without a mask"


def count_masks(case: Case) -> dict[str, int]:
    if case.rows.words_W is None:
        return {}
    has_B = [
        any(mask is not None for mask in case.masks[first : first + count])
        for first, count, _ in case.lens
        if case.real[first]
    ]
    mine = [(mask, seen) for mask, seen in zip(case.masks, case.seen, strict=True) if mask]
    return {
        "masks": len(mine),
        "masks of several words": sum(len(mask) > 32 for mask, _ in mine),
        "masks without a set bit": sum(not any(mask) for mask, _ in mine),
        "words below zero": int((case.rows.words_W < 0).sum()),
        "first interval only": sum(not any(mask) and bool(seen) for mask, seen in mine),
        "masks with nothing committed": sum(
            bool(mask) and not int(case.kv_len_B[int(r)]) for mask, r in zip(case.masks, case.rows.req_R, strict=True)
        ),
        "windows over masks": len(mine) * (case.options["window"] > 0),
        "large requests with masks": sum(
            has and count >= cpu.WIDE_FROM for has, (_, count, _) in zip(has_B, case.lens, strict=False)
        ),
        "steps of requests with and without masks": any(has_B) and not all(has_B),
        "tables without a mask": not any(has_B),
    }


def expect_events(events: Counter[str], *names: str) -> None:
    common = "windows,softcap,sinks,empty rows,rows with a hole,ghost rows,odd head counts"
    events.update(dict.fromkeys([*common.split(","), "values of another size", "values in keys", *names], 0))


def compare(case: Case, got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Padding rows of an entry of their own see the trash page, which holds NaN here: they are not compared."""
    real_R = torch.tensor([r or not s for r, s in zip(case.real, case.seen, strict=True)])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[real_R].double(), y[real_R].double(), rtol=tolerance, atol=tolerance)


# --- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_reference_is_the_definition(events: Counter[str]) -> None:
    expect_events(events)

    @settings(PROFILE, max_examples=80)
    @given(case=cases())
    def check(case: Case) -> None:
        expected = by_loops(case)
        compare(case, case.run(reference.attend), expected, 1e-12)
        plan = reference.plan_attention(case.rows, case.kv_len_B, case.lens)
        compare(case, case.run(reference.attend, plan=plan), expected, 1e-12)
        count_events(events, case, 0)

    check()


@pytest.mark.usefixtures("one_thread")
def test_reference_with_masks_is_the_definition(events: Counter[str]) -> None:
    expect_events(events, *MASKS.split(","))

    @settings(PROFILE, max_examples=150)
    @given(case=cases(masks=True))
    def check(case: Case) -> None:
        compare(case, case.run(reference.attend), by_loops(case), 1e-12)
        count_events(events, case, 0)

    check()


def test_reference_takes_rows_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(1, counts=(30, 2), committed=(20, 3), window=9, sinks=True)
    expected = case.run(reference.attend)
    monkeypatch.setattr(reference, "MAX_SCORES", 1000)
    compare(case, case.run(reference.attend), expected, 1e-14)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("taken", [2**25, 500])
def test_by_rows_is_the_reference(events: Counter[str], taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "MAX_ELEMENTS", taken)
    expect_events(events, *MASKS.split(","))

    @settings(PROFILE, max_examples=100)
    @given(case=cases(masks=True))
    def check(case: Case) -> None:
        compare(case, case.run(by_rows.attend), case.run(reference.attend), TOLERANCE[case.q_RHD.dtype])
        count_events(events, case, 0)

    check()


# --- the CPU form ----------------------------------------------------------------------------------------------------


def compare_forms(case: Case, events: Counter[str]) -> None:
    tolerance = TOLERANCE[case.q_RHD.dtype]
    expected = case.run(reference.attend)
    for i, wide_from in enumerate(PATHS.values()):
        plan = case.plan(wide_from, case.lens if (len(case.seen) + i) % 2 else None)
        got = case.run(plan=plan)
        assert got[0].dtype == case.q_RHD.dtype
        assert got[1].dtype == (torch.float64 if case.q_RHD.dtype == torch.float64 else torch.float32)
        compare(case, got, expected, tolerance)
        # Without lse, wide requests take torch's fused attention.
        out, lse = cpu.attend(*_tables(case), **case.options, plan=plan)
        assert lse is None
        compare(case, (out, got[1]), expected, tolerance)
        count_events(events, case, int(plan.wide_B.sum()))
        for group in plan.work(case.options["window"]).wide:
            met = (group.shape[0] > 1, group.real is not None, group.stale_B1m1 is not None, group.causal)
            events.update(name for name, is_met in zip(GROUPS, met, strict=True) if is_met)
    for row, mine in enumerate(case.seen):
        if not mine:
            assert not got[0][row].any()
            assert bool((got[1][row] == -math.inf).all())


def _tables(case: Case) -> tuple[Any, ...]:
    return case.q_RHD, case.rows, case.k_KPSD, case.v_KPSD, case.page_table_BP, case.kv_len_B


@pytest.mark.usefixtures("one_thread")
def test_cpu_is_the_reference(events: Counter[str]) -> None:
    expect_events(events, "wide", "narrow", *GROUPS, *map(str, TOLERANCE))

    @settings(PROFILE, max_examples=150)
    @given(case=cases(dtypes=tuple(TOLERANCE)))
    def check(case: Case) -> None:
        compare_forms(case, events)

    check()


@pytest.mark.usefixtures("one_thread")
def test_cpu_is_the_reference_over_several_chunks(events: Counter[str]) -> None:
    expect_events(events, "wide", "narrow", "several chunks", *GROUPS[:3], *map(str, TOLERANCE))

    @settings(PROFILE, max_examples=40)
    @given(case=cases(dtypes=tuple(TOLERANCE), largest=700))
    def check(case: Case) -> None:
        compare_forms(case, events)

    check()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("largest", [40, 700])
def test_cpu_with_masks_is_the_reference(events: Counter[str], largest: int) -> None:
    expect_events(events, "wide", "narrow", *MASKS.split(","), *map(str, TOLERANCE))
    if largest == 700:
        expect_events(events, "several chunks")

    @settings(PROFILE, max_examples=150)
    @given(case=cases(dtypes=tuple(TOLERANCE), largest=largest, masks=True))
    def check(case: Case) -> None:
        compare_forms(case, events)

    check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [attend, reference.attend], ids=["cpu", "reference"])
@pytest.mark.parametrize("window", [0, 40])
def test_a_tree_is_its_chains(window: int, form: Any, dtype: torch.dtype) -> None:
    """Every row of a draft tree of 64 rows gives what it gives at the end of a chain of its ancestors."""
    n, size, page_size, tree = 50, 16, 16, 64
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    # Depth first: the parent of row i is row i - 1 or an ancestor of it.
    paths: list[list[int]] = [[0]]
    for i in range(1, tree):
        paths.append([*paths[-1][: int(rng.integers(1, len(paths[-1]) + 1))], i])
    assert 3 < max(map(len, paths)) < 40
    q_RHD, k_sKD, v_sKD = (
        torch.randn(rows, heads, size, generator=generator, dtype=torch.float64).to(dtype)
        for rows, heads in ((tree, 6), (n + tree, 2), (n + tree, 2))
    )
    pools = [torch.full((2, 9, page_size, size), math.nan, dtype=dtype) for _ in "kv"]
    table_BP, kv_len_B, options = int32([[7, 2, 5, 8, 1, 3, 4, 6], [0] * 8]), int32([n, 0]), {"scale": 0.3}
    places = [int(table_BP[0, s // page_size]) * page_size + s % page_size for s in range(n + tree)]
    write_kv(k_sKD, v_sKD, pools[0], pools[1], torch.tensor(places))

    def attend_rows(q: Tensor, depths: list[int], *masks: Tensor) -> Tensor:
        count = len(depths)
        k_R, zero_R = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
        rows = AttentionRows(zero_R, n + int32(depths), zero_R, zero_R, k_R + 1, int32([0, count]), int32([0]), *masks)
        out: Tensor = form(q, rows, *pools, table_BP, kv_len_B, window=window, **options)[0]
        return out

    words = np.zeros((tree, tree // 32), np.uint32)
    for i, path in enumerate(paths):
        for j in path:
            words[i, j // 32] |= np.uint32(1) << np.uint32(j % 32)
    bits_R = torch.arange(tree, dtype=torch.int32) * words.shape[1]
    words_W = torch.from_numpy(words.reshape(-1).view(np.int32))
    got = attend_rows(q_RHD, [len(path) - 1 for path in paths], bits_R, words_W)
    for i, path in enumerate(paths):
        slots = [n + j for j in path]
        write_kv(k_sKD[slots], v_sKD[slots], pools[0], pools[1], torch.tensor(places[n : n + len(path)]))
        chain = attend_rows(q_RHD[path], list(range(len(path))))
        torch.testing.assert_close(got[i], chain[-1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wide_from", PATHS.values(), ids=PATHS)
def test_model_sized_heads(dtype: torch.dtype, wide_from: int) -> None:
    """Shapes of a real model: whole vectors, several tiles and chunks, scores of useful size."""
    counts, committed = (1, 1, 8, 40, 12), (15, 700, 300, 200, 0)
    case = make_case(
        7,
        dtype=dtype,
        page_size=16,
        kv_heads=2,
        group=3,
        size=64,
        counts=counts,
        committed=committed,
        kinds=["causal"] * 5,
    )
    case.options["scale"] = 0.5
    compare(case, case.run(plan=case.plan(wide_from, case.lens)), case.run(reference.attend), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [0, 13])
def test_requests_gathered_together(dtype: torch.dtype, window: int) -> None:
    """Prompts of similar lengths are padded to one shape, whatever lies between them; outliers stay apart."""
    counts, committed = (40, 12, 1, 11, 13, 90, 36, 12), (0, 9, 50, 9, 8, 0, 3, 700)
    case = make_case(11, dtype=dtype, size=16, window=window, counts=counts, committed=committed, kinds=["causal"] * 8)
    plan = case.plan(cpu.WIDE_FROM, None)
    shapes = sorted(group.shape for group in plan.work(window).wide)
    assert [shape[0] for shape in shapes] == [1, 1, 2, 3]
    compare(case, case.run(plan=plan), case.run(reference.attend), TOLERANCE[dtype])
    out, _ = cpu.attend(*_tables(case), **case.options, plan=plan)
    compare(case, (out, out), (case.run(reference.attend)[0],) * 2, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wide_from", PATHS.values(), ids=PATHS)
def test_large_scores(dtype: torch.dtype, wide_from: int) -> None:
    """Scores far beyond the range of exp: the largest one takes all, and nothing overflows."""
    case = make_case(3, dtype=dtype, counts=(1, 12), committed=(90, 20), kinds=["causal"] * 2, size=8)
    case.options["scale"] = 1000.0
    out, lse = case.run(plan=case.plan(wide_from, None))
    assert bool(out.isfinite().all() and lse.isfinite().all())
    reference_out, reference_lse = case.run(reference.attend)
    torch.testing.assert_close(lse, reference_lse, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out, reference_out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("wide_from", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("pool", ["keys", "values"])
def test_what_a_row_sees_is_not_hidden(pool: str, wide_from: int) -> None:
    """NaN that a model wrote reaches the rows that see it, and no other request."""
    case = make_case(5, dtype=torch.float32, counts=(1, 12), committed=(30, 30), kinds=["causal"] * 2, page_size=16)
    page = int(case.page_table_BP[int(case.rows.reqs_B[0]), 0])
    (case.k_KPSD if pool == "keys" else case.v_KPSD)[:, page, 3] = math.nan
    out, _ = case.run(plan=case.plan(wide_from, None))
    assert bool(out[0].isnan().all(-1).all()) if pool == "keys" else bool(out[0].isnan().any())
    assert bool(out[1:].isfinite().all())


def test_refuses_what_it_cannot_read() -> None:
    case = make_case(1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"queries are torch\.float32, pools torch\.float64"):
        replace(case, k_KPSD=case.k_KPSD.double()).run()
    with pytest.raises(ValueError, match="pool strides"):
        replace(case, v_KPSD=case.v_KPSD.transpose(1, 2).contiguous().transpose(1, 2)).run()
    write: Any = write_kv
    with pytest.raises(ValueError, match="pools are"):
        write(*case.q_RHD.split(3, 1), case.k_KPSD, case.v_KPSD.double(), torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("form", [cpu, reference], ids=["cpu", "reference"])
def test_refuses_masks_it_cannot_read(form: Any) -> None:
    case = make_case(1, dtype=torch.float32, kinds=("tree", "tree"), masks=["all rows"] * 2)
    bits_R, words_W = case.rows.bits_R, case.rows.words_W
    assert bits_R is not None
    assert words_W is not None

    def run(**fields: Any) -> None:
        replace(case, rows=case.rows._replace(**fields)).run(form.attend)

    run()
    with pytest.raises(ValueError, match="rows have bits_R but no words_W: give both"):
        run(words_W=None)
    with pytest.raises(ValueError, match="rows have words_W but no bits_R: give both"):
        run(bits_R=None)
    with pytest.raises(ValueError, match=r"words_W is torch\.int64 \[\d+\]: words of masks are torch\.int32"):
        run(words_W=words_W.long())
    with pytest.raises(ValueError, match=r"bits_R is torch\.int32 \[4\]: it is torch\.int32, one a row, \[5\]"):
        run(bits_R=bits_R[:4])
    # A word that the last row needs is the last that any row needs.
    needed = int(bits_R.max()) + 1
    run(words_W=words_W[:needed])
    error, message = (ValueError, "behind the end of words_W") if form is cpu else (IndexError, "out of bounds")
    with pytest.raises(error, match=message):
        run(words_W=words_W[: needed - 1])


def test_step_without_rows() -> None:
    case = make_case(1, dtype=torch.float32)
    none = AttentionRows(*(x[:0] for x in case.rows[:5]), case.rows.row_ptr_B1[:1], case.rows.reqs_B[:0])
    out, lse = replace(case, q_RHD=case.q_RHD[:0], rows=none).run()
    assert out.shape == (0, 6, 5)
    assert lse.shape == (0, 6)


def test_rows_of_no_request_are_zero() -> None:
    """Rows behind the last request, as in a step padded to a bucket."""
    case = make_case(1, dtype=torch.float32)
    columns = [torch.cat([x, x[-2:]]) for x in case.rows[:5]]
    padded = replace(
        case,
        q_RHD=torch.cat([case.q_RHD, case.q_RHD[-2:]]),
        rows=AttentionRows(*columns, case.rows.row_ptr_B1, case.rows.reqs_B),
    )
    for form in (attend, reference.attend):
        out, lse = padded.run(form)
        compare(case, (out[:-2], lse[:-2]), case.run(form), 0.0)
        assert not out[-2:].any()


# --- bits ------------------------------------------------------------------------------------------------------------


def take_masks(case: Case, mine: slice, shift: int) -> tuple[Tensor, ...]:
    """The masks of some rows, and the words with `shift` others in front; nothing if the case has none."""
    if case.rows.bits_R is None or case.rows.words_W is None:
        return ()
    bits_R = case.rows.bits_R[mine]
    return bits_R.where(bits_R < 0, bits_R + shift), torch.cat([int32([-1] * shift), case.rows.words_W])


def take_request(case: Case, index: int, page_size: int, rng: np.random.Generator) -> Case:
    """One request of a case in a step of its own, in pools of its own with other pages of another size."""
    first, count, visible = case.lens[index]
    mine = slice(first, first + count)
    r = int(case.rows.reqs_B[index])
    old, table = case.k_KPSD.shape[2], case.page_table_BP[r]
    n_slots = min(visible, table.shape[0] * old)
    slot = torch.arange(n_slots)
    from_place = table[slot // old].long() * old + slot % old
    pages = torch.from_numpy(1 + rng.permutation(-(-n_slots // page_size) + 2))
    to_place = pages[slot // page_size] * page_size + slot % page_size
    pools = []
    for pool in (case.k_KPSD, case.v_KPSD):
        shape = (pool.shape[0], len(pages) + 1, page_size, pool.shape[3])
        moved = torch.full(shape, math.nan, dtype=pool.dtype)
        moved.view(shape[0], -1, shape[3])[:, to_place] = pool.reshape(shape[0], -1, shape[3])[:, from_place]
        pools.append(moved)
    columns = [x[mine] for x in case.rows[1:5]]
    tables = take_masks(case, mine, int(rng.integers(0, 3)))
    rows = AttentionRows(torch.zeros(count, dtype=torch.int32), *columns, int32([0, count]), int32([0]), *tables)
    return replace(
        case,
        q_RHD=case.q_RHD[mine].contiguous(),
        rows=rows,
        k_KPSD=pools[0],
        v_KPSD=pools[1],
        page_table_BP=torch.stack([pages, torch.zeros_like(pages)]).int(),
        kv_len_B=torch.stack([case.kv_len_B[r], torch.tensor(0)]).int(),
        lens=[(0, count, visible)],
    )


def take_row(case: Case, row: int) -> Case:
    """One row of a step of one request: what decoding it alone, its neighbours written before, would be."""
    columns = [x[row : row + 1] for x in case.rows[:5]]
    rows = AttentionRows(*columns, int32([0, 1]), case.rows.reqs_B, *take_masks(case, slice(row, row + 1), 1))
    return replace(case, q_RHD=case.q_RHD[row : row + 1], rows=rows, lens=[(0, 1, case.lens[0][2])])


def bits(result: tuple[Tensor, Tensor]) -> list[Tensor]:
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return [x.contiguous().view(words[x.element_size()]) for x in result]


@pytest.mark.parametrize("masks", [False, True], ids=["no masks", "masks"])
def test_bits_depend_on_the_request_alone(events: Counter[str], masks: bool) -> None:
    """In place: the same bits alone, in a batch, with other pages and page sizes, row by row, on one thread."""
    names = ("requests", "rows alone", "several chunks", "one thread", *map(str, TOLERANCE))
    expect_events(events, *names, *(["masks"] if masks else []))
    rng = np.random.default_rng(0)
    threads = torch.get_num_threads()

    @settings(PROFILE, max_examples=90)
    @given(case=cases(dtypes=tuple(TOLERANCE), largest=700, masks=masks))
    def check(case: Case) -> None:
        expected = bits(case.run(plan=case.plan(NEVER, case.lens)))
        count_events(events, case, 0)
        torch.set_num_threads(1)
        try:
            for x, y in zip(bits(case.run(plan=case.plan(NEVER, case.lens))), expected, strict=True):
                assert torch.equal(x, y)
            events["one thread"] += 1
        finally:
            torch.set_num_threads(threads)
        for index in range(len(case.lens) - (case.lens[-1][2] == 1 and not case.real[-1])):
            first, count, _ = case.lens[index]
            if not all(case.real[first : first + count]):
                continue
            alone = take_request(case, index, int(rng.choice([1, 4, 16])), rng)
            got = bits(alone.run(plan=alone.plan(NEVER, None)))
            for x, y in zip(got, expected, strict=True):
                assert torch.equal(x, y[first : first + count])
            row = int(rng.integers(count))
            single = take_row(alone, row)
            for x, y in zip(bits(single.run(plan=single.plan(NEVER, None))), expected, strict=True):
                assert torch.equal(x[0], y[first + row])
            events["requests"] += 1
            events["rows alone"] += 1

    check()


# --- chunked prefill -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 10])
@pytest.mark.parametrize("wide_from", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("chunks", [[75], [40, 1, 1, 30, 3], [1] * 75, [9, 66]], ids=str)
def test_chunked_prefill_is_full_attention(chunks: list[int], wide_from: int, window: int) -> None:
    """write_kv and attend, step by step, against one causal softmax over everything, in float64."""
    kv_heads, group, size, page_size, length = 2, 3, 8, 16, sum(chunks)
    generator = torch.Generator().manual_seed(0)
    q_THD, k_TKD, v_TKD = (
        torch.randn(length, heads, size, generator=generator, dtype=torch.float64)
        for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    k_pool, v_pool = (torch.full((kv_heads, 9, page_size, size), math.nan, dtype=torch.float64) for _ in "kv")
    table_BP = torch.zeros(2, 6, dtype=torch.int32)
    table_BP[0, :5] = int32([7, 2, 5, 8, 1])
    outs, n = [], 0
    for count in chunks:
        k_R = torch.arange(count, dtype=torch.int32)
        zero_R = torch.zeros_like(k_R)
        rows = AttentionRows(zero_R, n + k_R, zero_R, zero_R, k_R + 1, int32([0, count]), int32([0]))
        slot_R = n + k_R.long()
        write_kv(
            k_TKD[n : n + count],
            v_TKD[n : n + count],
            k_pool,
            v_pool,
            table_BP[0][slot_R // page_size].long() * page_size + slot_R % page_size,
        )
        kv_len_B = int32([n, 0])
        plan = cpu.plan_attention(rows, table_BP, kv_len_B, page_size, [(0, count, n + count)], wide_from)
        out, _ = attend(
            q_THD[n : n + count], rows, k_pool, v_pool, table_BP, kv_len_B, scale=0.3, window=window, plan=plan
        )
        outs.append(out)
        n += count
    full = torch.ones(length, length, dtype=torch.bool).tril()
    mask = full & ~full.tril(-window) if window else full
    scores = torch.einsum("qkgd,skd->kgqs", q_THD.view(length, kv_heads, group, size), k_TKD) * 0.3
    expected = torch.einsum("kgqs,skd->qkgd", scores.masked_fill(~mask, -math.inf).softmax(-1), v_TKD)
    torch.testing.assert_close(torch.cat(outs), expected.reshape(length, -1, size), rtol=1e-12, atol=1e-12)


# --- write_kv --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 50])
@pytest.mark.parametrize("v_size", [5, 7])
def test_write_kv(dtype: torch.dtype, rows: int, v_size: int) -> None:
    """What is written is read back, from strided rows into strided pools, and nothing else changes."""
    generator = torch.Generator().manual_seed(rows)
    kv_heads, pages, page_size, size = 3, 23, 3, 5
    both = torch.randn(rows, 2 * kv_heads, size, generator=generator).to(dtype)
    k_RKD = both[:, kv_heads:]
    v_RKD = torch.randn(rows, v_size, kv_heads, generator=generator).to(dtype).transpose(1, 2)
    layers = torch.randn(kv_heads, 4, pages, page_size, size, generator=generator).to(dtype).transpose(0, 1)
    k_pool = layers[2]
    v_pool = torch.randn(kv_heads, pages, page_size, v_size, generator=generator).to(dtype)
    place_R = torch.randperm(pages * page_size, generator=generator)[:rows]
    expected_layers, expected_v = layers.clone(), v_pool.clone()
    expected_layers[2].view(kv_heads, -1, size)[:, place_R] = k_RKD.transpose(0, 1)
    expected_v.view(kv_heads, -1, v_size)[:, place_R] = v_RKD.transpose(0, 1)
    reference_pools = (k_pool.clone(), v_pool.clone())
    reference.write_kv(k_RKD, v_RKD, reference_pools[0], reference_pools[1], place_R)
    write_kv(k_RKD, v_RKD, k_pool, v_pool, place_R)
    assert torch.equal(layers, expected_layers)
    assert torch.equal(v_pool, expected_v)
    assert torch.equal(reference_pools[0], k_pool)
    assert torch.equal(reference_pools[1], v_pool)


# --- plans and the benchmark -----------------------------------------------------------------------------------------


def test_one_plan_serves_layers_with_and_without_window() -> None:
    case = make_case(9, dtype=torch.float32, counts=(1, 30), committed=(80, 40), kinds=["causal"] * 2)
    windowed = make_case(9, dtype=torch.float32, counts=(1, 30), committed=(80, 40), kinds=["causal"] * 2)
    windowed.options["window"] = 11
    plan = plan_attention(case.rows, case.page_table_BP, case.kv_len_B, case.k_KPSD.shape[2], case.lens)
    for one in (case, windowed, case):
        compare(one, one.run(plan=plan), one.run(reference.attend), TOLERANCE[torch.float32])


def test_benchmark_runs() -> None:
    table = attention_benchmark.benchmark(decode=[(2, 40)], prefill=[(1, 20, 30)], seconds=0.02)
    assert [row["work"] for row in table] == ["decode", "prefill"]
    assert all(row["ours_ms"] > 0 and row["sdpa_ms"] > 0 for row in table)
