"""The GPU form of `attend` against the reference in float64 on the same inputs; `conftest.py` says where it runs.

Slots that no row sees and the trash page hold NaN in every case.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import PROFILE, Case, cases, compare, count_events, make_case
from torch import Tensor

from headrace.kernels.attention import (
    FEW_ROWS,
    AttentionRows,
    attend,
    benchmark_gpu,
    gpu,
    gpu_shape,
    plan_attention,
    reference,
    write_kv,
)
from headrace.kernels.attention.gpu_shape import Chip, Heads, choose_shape
from headrace.step import NONE

# Outputs are rounded to 24, 8 or 11 bits, and probabilities before they meet the values.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LSE_TOLERANCE = 5e-5
H100 = Chip(132, 227 * 2**10)

# Not-a-number that a test put where it is seen, in the interpreter's numpy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def many_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four splits wherever there are as many blocks of 16 slots, on any device."""
    monkeypatch.setattr(gpu_shape, "PROGRAMS_A_PROCESSOR", 2**16)
    monkeypatch.setattr(gpu_shape, "MIN_SPLIT_SLOTS", 16)
    monkeypatch.setattr(gpu_shape, "LEAST_SLOTS", 16)
    monkeypatch.setattr(gpu_shape, "MAX_BLOCK_N", 16)
    monkeypatch.setattr(gpu_shape, "MAX_SPLITS", 4)


def on(case: Case, device: torch.device) -> Case:
    """The case with its tensors on a device, parts of larger tensors as parts of larger ones."""

    def move(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        return torch.as_strided(whole.to(device), x.shape, x.stride(), x.storage_offset())

    fields = "q_RHD", "k_KPSD", "v_KPSD", "page_table_BP", "kv_len_B"
    moved: dict[str, Any] = {name: move(getattr(case, name)) for name in fields}
    columns: Any = [move(x) if isinstance(x, Tensor) else x for x in case.rows]
    options = {name: move(x) if isinstance(x, Tensor) else x for name, x in case.options.items()}
    return replace(case, **moved, rows=AttentionRows(*columns), options=options)


def run(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """The GPU form's result, on the CPU; on a GPU by way of the package."""
    out, lse = on(case, device).run(attend if device.type == "cuda" else gpu.attend)
    assert out.dtype == case.q_RHD.dtype
    assert lse.dtype == torch.float32
    return out.cpu(), lse.cpu()


def by_reference(case: Case) -> tuple[Tensor, Tensor]:
    """The definition in float64."""
    pools = {"k_KPSD": case.k_KPSD.double(), "v_KPSD": case.v_KPSD.double()}
    return replace(case, q_RHD=case.q_RHD.double(), **pools).run(reference.attend)


def check(case: Case, device: torch.device) -> None:
    """Results are those of the definition, and a row that sees nothing, or is padding, has out 0 and lse -inf."""
    out, lse = run(case, device)
    expected_out, expected_lse = by_reference(case)
    compare(case, (out, out), (expected_out, expected_out), TOLERANCE[case.q_RHD.dtype])
    compare(case, (lse, lse), (expected_lse, expected_lse), LSE_TOLERANCE)
    for row, mine in enumerate(case.seen):
        if not mine:
            assert not out[row].any()
            assert bool((lse[row] == -math.inf).all())


MIXED: dict[str, Any] = {
    "counts": (20, 1, 5, 1, 9, 1),
    "committed": (0, 150, 40, 17, 3, 0),
    "kinds": ("causal", "causal", "any", "own only", "block", "empty"),
}
TREES: dict[str, Any] = {
    "counts": (40, 3, 1, 9),
    "committed": (21, 50, 30, 0),
    "kinds": ("tree", "causal", "any", "tree"),
    "masks": ("all rows", "none", "some rows", "all rows"),
}
GRID: dict[str, dict[str, Any]] = {
    "prompts and decode": {"group": 4, "size": 64, "page_size": 16, **MIXED},
    "one head a group": {"group": 1, "size": 16, "page_size": 4, **MIXED},
    "seven heads a group": {"group": 7, "size": 16, "page_size": 4, "kv_heads": 1, **MIXED},
    "80 numbers a head": {"group": 2, "size": 80, "page_size": 16, **MIXED},
    "values of another size": {"group": 2, "size": 16, "v_size": 80, "page_size": 4, **MIXED},
    "window": {"group": 2, "size": 16, "page_size": 4, "window": 30, **MIXED},
    "softcap": {"group": 2, "size": 16, "page_size": 4, "softcap": 1.5, **MIXED},
    "sinks": {"group": 2, "size": 16, "page_size": 4, "sinks": True, **MIXED},
    "all at once": {"group": 2, "size": 16, "page_size": 4, "window": 9, "softcap": 2.0, "sinks": True, **MIXED},
    "trees": {"group": 4, "size": 16, "page_size": 4, **TREES},
    "trees under a window": {"group": 2, "size": 64, "page_size": 16, "window": 45, **TREES},
    "latents": {
        "group": 40,
        "kv_heads": 1,
        "size": 600,
        "v_size": 512,
        "page_size": 4,
        "sinks": True,
        "counts": (3, 1),
        "committed": (5, 20),
        "kinds": ("causal", "causal"),
    },
    "ghosts": {"group": 2, "size": 16, "page_size": 4, "ghosts": 5, "ghost_tail": 1, **MIXED},
}


JOINED: dict[str, Any] = {
    "counts": (1, 3, 1, 1, 2, 1),
    "committed": (0, 150, 40, 17, 3, 90),
    "kinds": ("causal", "causal", "block", "causal", "block", "empty"),
}
"""Few rows a request, each of which sees one run of slots."""
FEW: dict[str, dict[str, Any]] = {
    "four heads a group": {"group": 4, "size": 64, "page_size": 16, **JOINED},
    "one head a group": {"group": 1, "size": 16, "page_size": 4, **JOINED},
    "seven heads a group": {"group": 7, "size": 16, "page_size": 4, "kv_heads": 1, **JOINED},
    "values of another size": {"group": 2, "size": 16, "v_size": 80, "page_size": 4, **JOINED},
    "window": {"group": 2, "size": 16, "page_size": 4, "window": 30, **JOINED},
    "softcap": {"group": 2, "size": 16, "page_size": 4, "softcap": 1.5, **JOINED},
    "sinks": {"group": 2, "size": 16, "page_size": 4, "sinks": True, **JOINED},
    "all at once": {"group": 2, "size": 16, "page_size": 4, "window": 9, "softcap": 2.0, "sinks": True, **JOINED},
    "latents": {"group": 40, "kv_heads": 1, "size": 600, "v_size": 512, "page_size": 4, "sinks": True, **JOINED},
    "ghosts": {"group": 2, "size": 16, "page_size": 4, "ghosts": 5, "ghost_tail": 1, **JOINED},
    "beside prompts": {
        "group": 4,
        "size": 16,
        "page_size": 4,
        **JOINED,
        "counts": (100, 3, 1, 70, 2, 1),
    },
}


# The interpreter takes a second a case: each is run in float32 and, in turn, in one of the short types.
SHORT = [(name, (torch.bfloat16, torch.float16)[i % 2]) for i, name in enumerate(GRID)]
IN_SPLITS = {
    "seven heads a group": torch.float32,
    "all at once": torch.bfloat16,
    "trees under a window": torch.float16,
    "trees": torch.float32,
    "ghosts": torch.float32,
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in GRID), *SHORT], ids=str)
def test_gpu_is_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(make_case(len(name), dtype=dtype, **GRID[name]), device)


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize(("name", "dtype"), IN_SPLITS.items(), ids=str)
def test_gpu_in_splits_is_the_reference(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(len(name) + 1, dtype=dtype, **GRID[name])
    assert shape_of(case).n_splits == 4
    check(case, device)


def joined(case: Case) -> Case:
    """The case as the host knows it if all rows see one run of slots."""
    few = all(count < FEW_ROWS for _, count, _ in case.lens)
    return replace(case, rows=case.rows._replace(joined=True, few=few))


@pytest.mark.parametrize("splits", [False, True], ids=["one program", "splits"])
@pytest.mark.parametrize(("i", "name"), list(enumerate(FEW)), ids=str)
def test_few_rows_are_the_reference(
    i: int,
    name: str,
    splits: bool,
    device: torch.device,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if splits:
        request.getfixturevalue("many_splits")
    cuts = []
    launch = gpu._attend_few

    def watched(work: Any, cut: gpu_shape.Stream) -> None:
        cuts.append(cut)
        launch(work, cut)

    monkeypatch.setattr(gpu, "_attend_few", watched)
    for dtype in (torch.float32, (torch.bfloat16, torch.float16)[i % 2]):
        case = make_case(i, dtype=dtype, **FEW[name])
        check(joined(case), device)
    # Exact float32 has no wider tiles for prompts.
    assert [cut.most_splits > 1 for cut in cuts] == [splits] * (1 if name == "beside prompts" else 2)


def test_few_rows_are_found(device: torch.device) -> None:
    """What the tiles of few rows leave in the counters and in a second layer."""
    case = on(make_case(3, dtype=torch.float32, group=2, size=16, page_size=4, **JOINED), device)
    case = joined(case)
    plan = gpu.GpuPlan(case.rows, case.page_table_BP, case.kv_len_B, case.k_KPSD.shape[2])
    first, second = (case.run(gpu.attend, plan=plan)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not any(bool(x.any()) for x in plan._arrived.values())


def plan_of(case: Case) -> tuple[gpu.GpuPlan, Heads]:
    """A plan of the case, and its heads."""
    kv_heads, _, page_size, size = case.k_KPSD.shape
    heads = Heads(case.q_RHD.shape[1] // kv_heads, kv_heads, size, case.v_KPSD.shape[3], case.q_RHD.itemsize)
    return gpu.GpuPlan(case.rows, case.page_table_BP, case.kv_len_B, page_size), heads


def shape_of(case: Case) -> gpu_shape.Shape:
    """The cut that the GPU form chooses for a case."""
    plan, heads = plan_of(case)
    return plan.shape(heads)


def most_splits(case: Case) -> int:
    """Of a tile of the case, whose rows are joined."""
    plan, heads = plan_of(case)
    return int(plan.items(plan.stream(heads), case.options["window"])[0][:, 7].max())


@pytest.mark.usefixtures("many_splits")
def test_gpu_with_random_tables_is_the_reference(
    events: Counter[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = "windows,softcap,sinks,empty rows,rows with a hole,ghost rows,values of another size,whole blocks,splits"
    masks = "masks,masks of several words,masks without a set bit,words below zero,windows over masks"
    events.update(dict.fromkeys([*names.split(","), *masks.split(","), *map(str, TOLERANCE)], 0))
    monkeypatch.setattr(gpu_shape, "MAX_SPLITS", 2)

    @settings(PROFILE, max_examples=12)
    @given(case=cases(dtypes=tuple(TOLERANCE), masks=True))
    def check_one(case: Case) -> None:
        check(case, device)
        count_events(events, case, 0)
        events["whole blocks"] += int(case.kv_len_B.max()) >= 16
        events["splits"] += shape_of(case).n_splits > 1

    check_one()


@pytest.mark.usefixtures("many_splits")
def test_few_rows_with_random_tables_are_the_reference(events: Counter[str], device: torch.device) -> None:
    names = "windows,softcap,sinks,empty rows,ghost rows,values of another size,whole blocks,splits,few rows,prompts"
    events.update(dict.fromkeys([*names.split(","), *map(str, TOLERANCE)], 0))

    @settings(PROFILE, max_examples=40)
    @given(case=cases(dtypes=tuple(TOLERANCE), largest=80, kinds=("causal", "causal", "block", "empty")))
    def check_one(case: Case) -> None:
        check(joined(case), device)
        count_events(events, case, 0)
        events["whole blocks"] += int(case.kv_len_B.max()) >= 16
        events["splits"] += most_splits(joined(case)) > 1
        events["few rows" if joined(case).rows.few else "prompts"] += 1

    check_one()


def test_split_counts_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One long context, read by 1 to 16 programs a head; each count gives the same to rounding."""
    sinks = {"sinks": True, "softcap": 3.0, "window": 200}
    case = make_case(3, dtype=torch.float32, group=2, size=16, counts=(2,), committed=(300,), kinds=["causal"], **sinks)
    expected = by_reference(case)
    monkeypatch.setattr(gpu_shape, "PROGRAMS_A_PROCESSOR", 2**16)
    monkeypatch.setattr(gpu_shape, "MAX_BLOCK_N", 16)
    counts = []
    for most in (1, 2, 4, 16):
        monkeypatch.setattr(gpu_shape, "MAX_SPLITS", most)
        monkeypatch.setattr(gpu_shape, "MIN_SPLIT_SLOTS", 16)
        counts.append(shape_of(case).n_splits)
        compare(case, run(case, device), expected, TOLERANCE[torch.float32])
    assert counts == [1, 2, 4, 16]


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("need_lse", [True, False])
def test_lse_is_optional(need_lse: bool, device: torch.device) -> None:
    case = on(make_case(5, dtype=torch.float32, group=2, size=16, page_size=4), device)
    tables: Any = (case.rows, case.k_KPSD, case.v_KPSD, case.page_table_BP, case.kv_len_B)
    out, lse = gpu.attend(case.q_RHD, *tables, **case.options, need_lse=need_lse)
    assert (lse is not None) == need_lse
    torch.testing.assert_close(out, case.run(gpu.attend)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("splits", [False, True], ids=["one program", "splits"])
def test_large_scores(splits: bool, device: torch.device, request: pytest.FixtureRequest) -> None:
    """Scores far beyond the range of exp: the largest one takes all, and nothing overflows."""
    if splits:
        request.getfixturevalue("many_splits")
    case = make_case(3, dtype=torch.float32, counts=(1, 12), committed=(90, 20), kinds=["causal"] * 2, size=16)
    case.options["scale"] = 1000.0
    out, lse = run(case, device)
    expected_out, expected_lse = by_reference(case)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("splits", [False, True], ids=["one program", "splits"])
@pytest.mark.parametrize("slots", ["one slot", "all slots"])
@pytest.mark.parametrize("pool", ["keys", "values"])
def test_what_a_row_sees_is_not_hidden(
    pool: str, slots: str, splits: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """NaN that a model wrote reaches the rows that see it, and no other request."""
    if splits:
        request.getfixturevalue("many_splits")
    case = make_case(5, dtype=torch.float32, counts=(1, 12), committed=(30, 30), kinds=["causal"] * 2, page_size=16)
    for page in case.page_table_BP[int(case.rows.reqs_B[0])].tolist():
        at = slice(3, 4) if slots == "one slot" else slice(0, 16)
        (case.k_KPSD if pool == "keys" else case.v_KPSD)[:, page, at] = math.nan
    out, lse = run(case, device)
    assert bool(out[0].isnan().all())
    assert bool(lse[0].isnan().all()) == (pool == "keys")
    assert bool(out[1:].isfinite().all())


# --- steps of a fixed size -------------------------------------------------------------------------------------------


def padded(case: Case, n_rows: int, n_reqs: int) -> Case:
    """The step in a bucket of `n_rows` rows and `n_reqs` requests: ghost rows lie behind the last row of a request, and
    requests without rows behind the last one."""
    ghost = case.page_table_BP.shape[0] - 1
    n_more = n_rows - len(case.seen)
    fills: Any = dict(zip(("req_R", "t_R", "a_R", "b_R", "c_R", "bits_R"), (ghost, 0, NONE, 0, 1, -1), strict=True))

    def more(x: Tensor, count: int, fill: int) -> Tensor:
        return torch.cat([x, x.new_full((count,), fill)])

    columns = {
        name: more(getattr(case.rows, name), n_more, fill)
        for name, fill in fills.items()
        if getattr(case.rows, name) is not None
    }
    more_reqs = n_reqs - len(case.rows.reqs_B)
    columns["row_ptr_B1"] = more(case.rows.row_ptr_B1, more_reqs, len(case.seen))
    columns["reqs_B"] = more(case.rows.reqs_B, more_reqs, ghost)
    return replace(
        case,
        q_RHD=torch.cat([case.q_RHD, case.q_RHD.new_full((n_more, *case.q_RHD.shape[1:]), math.nan)]),
        rows=case.rows._replace(**columns),
        seen=case.seen + [[]] * n_more,
        real=case.real + [False] * n_more,
    )


def first_requests(case: Case, count: int) -> Case:
    """The step of the first `count` requests alone."""
    end = case.lens[count - 1][0] + case.lens[count - 1][1]
    columns = [x[:end] for x in case.rows[:5]]
    masks = () if case.rows.bits_R is None else (case.rows.bits_R[:end], case.rows.words_W)
    rows = AttentionRows(*columns, case.rows.row_ptr_B1[: count + 1], case.rows.reqs_B[:count], *masks)
    return replace(case, q_RHD=case.q_RHD[:end], rows=rows, seen=case.seen[:end], real=case.real[:end])


@pytest.mark.parametrize("splits", [False, True], ids=["one program", "splits"])
@pytest.mark.parametrize("name", ["trees", "window"])
def test_padded_steps(name: str, splits: bool, device: torch.device, request: pytest.FixtureRequest) -> None:
    """Padding changes nothing but roundings; in one bucket a request has the same bits whoever else is there."""
    if splits:
        request.getfixturevalue("many_splits")
    case = make_case(len(name), dtype=torch.float32, **{**GRID[name], "kv_heads": 1})
    bucket = (56, 7)
    check(padded(case, *bucket), device)
    outs = []
    for count in (len(case.lens), 2):
        fewer = first_requests(case, count)
        out, lse = run(padded(fewer, *bucket), device)
        assert not out[len(fewer.seen) :].any()
        assert bool((lse[len(fewer.seen) :] == -math.inf).all())
        outs.append(torch.cat([out[: len(fewer.seen)].flatten(1), lse[: len(fewer.seen)]], 1))
    for fewer_RX in outs[1:]:
        assert torch.equal(fewer_RX, outs[0][: len(fewer_RX)])


def test_a_step_of_padding_alone(device: torch.device) -> None:
    """What a graph runs when it is captured: ghosts everywhere."""
    case = make_case(1, dtype=torch.float32, size=16, counts=(2,), committed=(5,), kinds=["causal"])
    rows = AttentionRows(*(x[:0] for x in case.rows[:5]), case.rows.row_ptr_B1[:1], case.rows.reqs_B[:0])
    none = replace(case, q_RHD=case.q_RHD[:0], rows=rows, seen=[], real=[])
    out, lse = run(padded(none, 8, 4), device)
    assert not out.any()
    assert bool((lse == -math.inf).all())


class Launches:
    """Takes the place of a kernel and writes down what it was launched with."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.seen.append((grid, [a for a in args if not isinstance(a, Tensor)], options))

        return launch


@pytest.mark.usefixtures("many_splits")
def test_nothing_reads_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without contents: a length or a row that the host asked for would raise."""
    from headrace.kernels.attention import gpu_kernel

    kernels = {name: Launches() for name in ("list_tiles", "attend_tiles", "merge_splits", "write_rows")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(gpu_kernel, name, kernel)
    for window in (0, 7):
        case = on(make_case(2, dtype=torch.bfloat16, size=16, window=window, sinks=True, **TREES), torch.device("meta"))
        with pytest.raises((RuntimeError, NotImplementedError)):
            case.rows.row_ptr_B1.tolist()
        plan = gpu.GpuPlan(case.rows, case.page_table_BP, case.kv_len_B, case.k_KPSD.shape[2])
        case.run(gpu.attend, plan=plan)
        case.run(gpu.attend, plan=plan)
        keys = case.q_RHD[:, : len(case.k_KPSD)]
        gpu.write_kv(keys, keys, case.k_KPSD, case.v_KPSD, torch.empty(len(keys), dtype=torch.int64, device="meta"))
    met = {name: len(kernel.seen) for name, kernel in kernels.items()}
    # A plan lists its tiles once.
    assert met == {"list_tiles": 2, "attend_tiles": 4, "merge_splits": 4, "write_rows": 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_a_graph_serves_other_tables() -> None:
    """Plan, write and attention captured once over ghosts; replayed, they serve whatever stands in the tables."""
    device = torch.device("cuda")
    kinds: Any = {"dtype": torch.bfloat16, "group": 4, "size": 64, "page_size": 16, "kv_heads": 2}
    steps = []
    for seed in (2, 4):
        case = make_case(seed, counts=(1, 1, 9, 1), committed=(700, 3, 90, 33), kinds=["causal"] * 4, **kinds)
        steps.append(case)
    pages = max(case.k_KPSD.shape[1] for case in steps)
    width = max(case.page_table_BP.shape[1] for case in steps)

    def fitted(case: Case) -> Case:
        def pool(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_full((x.shape[0], pages - x.shape[1], *x.shape[2:]), math.nan)], 1)

        more = width - case.page_table_BP.shape[1]
        table_BP = torch.nn.functional.pad(case.page_table_BP, (0, more))
        fixed = replace(case, k_KPSD=pool(case.k_KPSD), v_KPSD=pool(case.v_KPSD), page_table_BP=table_BP)
        return padded(fixed, 16, 8)

    steps = [fitted(case) for case in steps]
    static = on(padded(replace(steps[0]), 16, 8), device)
    place_R = torch.zeros(16, dtype=torch.int64, device=device)
    k_RKD, v_RKD = (torch.randn(16, 2, 64, device=device).bfloat16() for _ in "kv")

    def step() -> tuple[Tensor, Tensor]:
        write_kv(k_RKD, v_RKD, static.k_KPSD, static.v_KPSD, place_R)
        plan = plan_attention(static.rows, static.page_table_BP, static.kv_len_B, 16)
        return static.run(attend, plan=plan)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for case in steps:
        pairs = [(static.q_RHD, case.q_RHD), (static.k_KPSD, case.k_KPSD), (static.v_KPSD, case.v_KPSD)]
        pairs += [(static.page_table_BP, case.page_table_BP), (static.kv_len_B, case.kv_len_B)]
        pairs += [(x, y) for x, y in zip(static.rows, case.rows, strict=True) if isinstance(x, Tensor)]
        for x, y in pairs:
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        expected_out, expected_lse = by_reference(case)
        compare(case, (out.cpu(),) * 2, (expected_out,) * 2, TOLERANCE[torch.bfloat16])
        compare(case, (lse.cpu(),) * 2, (expected_lse,) * 2, LSE_TOLERANCE)


# --- the cut ---------------------------------------------------------------------------------------------------------


def test_tiles_hold_every_row_once(device: torch.device) -> None:
    """Tiles of requests of any lengths, empty ones and rows behind the last request among them."""
    generator = torch.Generator().manual_seed(0)
    for n_reqs in (1, 2, 7, 33):
        counts = torch.randint(0, 12, (n_reqs,), generator=generator)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        n_rows = int(ptr[-1]) + n_reqs // 2 + 1
        owner_R = torch.full((n_rows,), n_reqs)
        owner_R[: int(ptr[-1])] = torch.arange(n_reqs).repeat_interleave(counts)
        zero_R = torch.zeros(n_rows, dtype=torch.int32, device=device)
        rows = AttentionRows(
            owner_R.int().to(device),
            *[zero_R] * 3,
            zero_R + 1,
            ptr.int().to(device),
            torch.arange(n_reqs, dtype=torch.int32, device=device),
        )
        table_BP = torch.zeros(n_reqs + 1, 4, dtype=torch.int32, device=device)
        plan = gpu.GpuPlan(rows, table_BP, torch.zeros(n_reqs + 1, dtype=torch.int32, device=device), 4)
        shape = plan.shape(Heads(4, 1, 16, 16, 4))
        assert shape.tile_rows == 4
        held = []
        for req, row0, end, *_ in plan.tiles(shape, 0).tolist():
            assert end - row0 <= shape.tile_rows
            held += [(row, req) for row in range(row0, end)]
        owners = [req if req < n_reqs else -1 for req in owner_R.tolist()]
        assert sorted(held) == list(enumerate(owners))


@pytest.mark.parametrize("group", [1, 2, 4, 7, 8, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_cuts_fit_the_chip(size: int, itemsize: int, group: int) -> None:
    """Grids stay within a few programs a processor and the work there is, blocks within shared memory."""
    for n_rows, n_reqs, max_slots in [(1, 1, 2**17), (8, 8, 4096), (64, 64, 2**15), (512, 512, 2**17), (8192, 1, 8192)]:
        heads = Heads(group, 8, size, size, itemsize)
        shape = choose_shape(n_rows, n_reqs, max_slots, heads, H100)
        assert shape.tile_rows * group <= shape.block_m
        assert shape.block_n & (shape.block_n - 1) == 0
        assert shape.n_splits & (shape.n_splits - 1) == 0
        tiles = -(-n_rows // shape.tile_rows)
        full = max(tiles, n_reqs) * 8 * shape.n_splits
        assert shape.n_splits == 1 or full <= H100.processors * gpu_shape.PROGRAMS_A_PROCESSOR
        assert shape.n_tiles * 8 * shape.n_splits <= 2 * full + 8 * (n_reqs + 1) * shape.n_splits
        width = gpu_shape.padded(size)
        blocks = shape.n_stages * shape.block_n * 2 * width
        assert (blocks + shape.block_m * width) * itemsize <= H100.shared_bytes


def test_cuts_of_a_model_of_8b() -> None:
    heads = Heads(4, 8, 128, 128, 2)
    one = choose_shape(1, 1, 2**17, heads, H100)
    assert (one.block_m, one.block_n, one.n_splits) == (16, 64, 32)
    many = choose_shape(512, 512, 2**15, heads, H100)
    assert (many.block_m, many.n_splits) == (16, 1)
    prompt = choose_shape(8192, 1, 2**15, heads, H100)
    assert (prompt.block_m, prompt.block_n, prompt.n_splits, prompt.n_warps) == (128, 64, 1, 8)
    streams = [gpu_shape.choose_stream(n, n, 2**14, heads, H100) for n in (1, 8, 32, 64)]
    assert [(s.block_n, s.n_stages, s.room, s.most_splits) for s in streams] == [
        (64, 4, 33, 128),
        (64, 4, 33, 128),
        (64, 4, 33, 128),
        (32, 4, 66, 128),
    ]
    # At most a tile for each request, one more, and what is split in front of them.
    assert [s.n_items for s in streams] == [2 + 33, 2 + 8 + 1 + 33, 8 + 32 + 1 + 2 * 33, 16 + 64 + 1 + 2 * 66]


def listed(
    counts: list[int], lens: list[int], cut: gpu_shape.Stream, device: torch.device, window: int = 0, behind: int = 0
) -> list[list[int]]:
    """Items of requests with so many rows behind so many slots, and of rows behind the last request."""
    n_reqs, n_rows = len(counts), sum(counts)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    owner_R = torch.arange(n_reqs).repeat_interleave(torch.tensor(counts))
    first = [0, *torch.tensor(counts).cumsum(0).tolist()]
    own_R = torch.arange(n_rows) - torch.tensor(first)[owner_R]
    padding = [0] * behind
    rows = AttentionRows(
        torch.tensor([*owner_R.tolist(), *[n_reqs] * behind], **ints),
        torch.tensor([*(torch.tensor(lens)[owner_R] + own_R).tolist(), *padding], **ints),
        torch.zeros(n_rows + behind, **ints),
        torch.zeros(n_rows + behind, **ints),
        torch.tensor([*(own_R + 1).tolist(), *padding], **ints),
        torch.tensor(first, **ints),
        torch.arange(n_reqs, **ints),
        joined=True,
    )
    table_BP = torch.zeros(n_reqs + 1, -(-max(c + n for c, n in zip(counts, lens, strict=True)) // 16), **ints)
    plan = gpu.GpuPlan(rows, table_BP, torch.tensor([*lens, 0], **ints), 16)
    return plan.items(cut, window)[0].tolist()


CUT = gpu_shape.Stream(
    tile_rows=4,
    block_m=16,
    block_n=16,
    n_items=40,
    n_parts=40,
    room=6,
    least=2,
    splits=0,
    most_splits=32,
    least_rows=0,
    most_rows=0,
    n_warps=4,
    n_stages=2,
)


@settings(PROFILE, max_examples=14)
@given(data=st.data())
def check_items(data: st.DataObject, device: torch.device, events: Counter[str]) -> None:
    """Every row and every block of its tile are in one item, items are not longer than the step asks for, the largest
    come first."""
    requests = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 900)), min_size=1, max_size=5))
    behind, window = data.draw(st.integers(0, 6)), data.draw(st.sampled_from([0, 0, 50]))
    cut = CUT._replace(
        room=data.draw(st.sampled_from([1, 6])),
        least_rows=data.draw(st.sampled_from([0, 0, 3])),
        most_rows=data.draw(st.sampled_from([0, 4])),
        splits=data.draw(st.sampled_from([0, 0, 2])),
    )
    if sum(count for count, _ in requests) == 0:
        return
    items = listed([r[0] for r in requests], [r[1] for r in requests], cut, device, window, behind)
    counts = dict(enumerate(r[0] for r in requests)) | {-1: behind}
    tiles = Counter[tuple[int, ...]]()
    sizes, is_small, is_over = [], [], False
    parts = set()
    for req, row0, end, _, begin, stop, split, active, part in items:
        assert not (is_over and end > row0)  # empty ones are the last
        is_over = end <= row0
        if is_over:
            continue
        assert end - row0 <= cut.tile_rows
        assert 0 <= split < active <= cut.most_splits
        assert active == cut.splits or not cut.splits
        tiles[req, row0, end, begin, stop, active] += 1
        sizes.append(-(-max(stop - begin, 0) // active))
        is_small.append(active == cut.most_splits)
        events["split"] += active > 1
        if active > 1:
            assert part + active <= (cut.n_items if cut.splits else 2 * cut.room)
            assert part + split not in parts  # a result of its own
            parts.add(part + split)
    assert all(count == tile[-1] for tile, count in tiles.items())
    held = sorted((row, req) for req, row0, end, *_ in tiles for row in range(row0, end))
    owners = [i for i, (count, _) in enumerate(requests) for _ in range(count)] + [-1] * behind
    wanted = [
        (row, owner)
        for row, owner in enumerate(owners)
        if (not cut.most_rows or (owner >= 0 and counts[owner] <= cut.most_rows))
        and (owner < 0 or counts[owner] >= cut.least_rows)
    ]
    assert held == wanted
    events["rows left to another pass"] += len(held) < len(owners)
    events["rows behind the last request"] += -1 in [tile[0] for tile in tiles]
    if cut.splits or not tiles:
        return
    total = sum(max(stop - begin, 0) for _, _, _, begin, stop, _ in tiles)
    # Blocks are counted for whole requests: a tile may see less than its request, with a block at either end.
    rows = [rows for rows, _ in requests]
    asked = max(-(-2 * (total + len(tiles) * (2 + max(rows) // 16)) // cut.room), cut.least)
    assert all(size <= asked + 2 or small for size, small in zip(sizes, is_small, strict=True))
    assert len(sizes) <= len(tiles) + 2 * cut.room
    # A class of sizes is an eighth of the largest.
    step = max(sizes) // 8 + 3
    assert all(b <= a + step for a, b in itertools.pairwise(sizes))


def test_items_hold_every_row_and_block_once(events: Counter[str], device: torch.device) -> None:
    events.update(dict.fromkeys(["split", "rows left to another pass", "rows behind the last request"], 0))
    check_items(device=device, events=events)


def test_one_long_request_among_short_ones(device: torch.device) -> None:
    """It is split by its share of all blocks and comes first; they are not, but for the last ones."""
    items = listed([1] * 12, [64] * 5 + [64 * 16 * 2] + [64] * 6, CUT, device)
    # 11 requests of 5 blocks and one of 129, on 6 programs.
    assert [item[6] for item in items[:4]] == list(range(4))
    assert {(item[0], item[7]) for item in items[:4]} == {(5, 4)}
    # 8 more fill the second round, and 3 are left for a third one.
    assert [item[7] for item in items[4:18]] == [1] * 8 + [2] * 6
    assert sorted({item[0] for item in items[4:18]}) == [i for i in range(12) if i != 5]


def test_equal_requests_fill_one_round(device: torch.device) -> None:
    """Each gets as many items as all get, and none has one that would begin a second round; those that have to are
    split until they fill it."""
    for count, splits in ((1, 6), (2, 3), (4, 1), (5, 1), (6, 1), (12, 1)):
        items = [item for item in listed([1] * count, [899] * count, CUT, device) if item[2] > item[1]]
        assert [item[7] for item in items] == [splits] * (count * splits)
    for count, last, splits in ((7, 1, 6), (8, 2, 3), (10, 4, 1), (13, 1, 6)):
        items = [item for item in listed([1] * count, [899] * count, CUT, device) if item[2] > item[1]]
        assert [item[7] for item in items] == [1] * (count - last) + [splits] * (last * splits)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    case = on(make_case(1, dtype=torch.float32), device)
    with pytest.raises(ValueError, match=r"queries are torch\.float32, pools torch\.float64"):
        replace(case, k_KPSD=case.k_KPSD.double()).run(gpu.attend)
    with pytest.raises(ValueError, match="pool strides"):
        replace(case, v_KPSD=case.v_KPSD.transpose(1, 2).contiguous().transpose(1, 2)).run(gpu.attend)
    with pytest.raises(ValueError, match="rows have words_W but no bits_R"):
        replace(case, rows=case.rows._replace(words_W=case.rows.req_R)).run(gpu.attend)


def test_float64_is_the_reference_itself(device: torch.device) -> None:
    case = on(make_case(1), device)
    for x, y in zip(case.run(gpu.attend), case.run(reference.attend), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0, equal_nan=True)


def test_step_without_rows(device: torch.device) -> None:
    case = on(make_case(1, dtype=torch.float32), device)
    none = AttentionRows(*(x[:0] for x in case.rows[:5]), case.rows.row_ptr_B1[:1], case.rows.reqs_B[:0])
    out, lse = replace(case, q_RHD=case.q_RHD[:0], rows=none).run(gpu.attend)
    assert (out.shape, lse.shape) == ((0, 6, 5), (0, 6))


# --- write_kv --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 20])
@pytest.mark.parametrize("v_size", [5, 16])
def test_write_kv(dtype: torch.dtype, rows: int, v_size: int, device: torch.device) -> None:
    """What is written is read back, from strided rows into strided pools, and nothing else changes."""
    generator = torch.Generator().manual_seed(rows)
    kv_heads, pages, page_size, size = 3, 23, 4, 5
    both = torch.randn(rows, 2 * kv_heads, size, generator=generator).to(device, dtype)
    k_RKD = both[:, kv_heads:]
    v_RKD = torch.randn(rows, v_size, kv_heads, generator=generator).to(device, dtype).transpose(1, 2)
    layers = torch.randn(kv_heads, 4, pages, page_size, size, generator=generator).to(device, dtype).transpose(0, 1)
    v_pool = torch.randn(kv_heads, pages, page_size, v_size, generator=generator).to(device, dtype)
    place_R = torch.randperm(pages * page_size, generator=generator)[:rows].to(device)
    expected_layers, expected_v = layers.clone(), v_pool.clone()
    expected_layers[2].view(kv_heads, -1, size)[:, place_R] = k_RKD.transpose(0, 1)
    expected_v.view(kv_heads, -1, v_size)[:, place_R] = v_RKD.transpose(0, 1)
    gpu.write_kv(k_RKD, v_RKD, layers[2], v_pool, place_R)
    assert torch.equal(layers, expected_layers)
    assert torch.equal(v_pool, expected_v)


def test_write_kv_converts(device: torch.device) -> None:
    """Rows of another type are rounded to the pools'."""
    rows = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)).to(device)
    k_pool, v_pool = (torch.zeros(2, 3, 4, 16, dtype=torch.float16, device=device) for _ in "kv")
    place_R = torch.tensor([5, 0, 11], device=device)
    gpu.write_kv(rows, -rows, k_pool, v_pool, place_R)
    assert torch.equal(k_pool.view(2, 12, 16)[:, place_R], rows.half().transpose(0, 1))
    assert torch.equal(v_pool.view(2, 12, 16)[:, place_R], -rows.half().transpose(0, 1))


def test_trash_takes_many_rows(device: torch.device) -> None:
    """Ghost rows all write to page 0, and no other slot changes."""
    pools = [torch.zeros(1, 3, 4, 16, device=device) for _ in "kv"]
    gpu.write_kv(*[torch.ones(6, 1, 16, device=device)] * 2, *pools, torch.zeros(6, dtype=torch.int64, device=device))
    for pool in pools:
        assert bool((pool[0, 0, 0] == 1).all())
        assert float(pool.sum()) == 16.0


# --- the benchmark ---------------------------------------------------------------------------------------------------

SMALL = benchmark_gpu.Geometry(heads=4, kv_heads=2, size=16, page_size=4)


@pytest.mark.parametrize(("n_reqs", "n_rows", "committed"), [(3, 1, 20), (2, 9, 0)], ids=["decode", "prefill"])
def test_benchmark_measures_attention(n_reqs: int, n_rows: int, committed: int, device: torch.device) -> None:
    """Its steps are what torch's fused attention gets in one piece."""
    torch.manual_seed(0)
    step = benchmark_gpu.make_step(n_reqs, n_rows, committed, 1, device, SMALL)
    gpu.write_kv(*step.kv_RKD, *step.pools[0], step.place_R)
    q, k, v = benchmark_gpu.in_one_piece(step, n_reqs)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not committed, enable_gqa=True)
    got = step.attend(0, step.plan()).unflatten(0, (n_reqs, -1)).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    # The rows' own keys are the last ones of each request.
    k_rows = step.kv_RKD[0].unflatten(0, (n_reqs, -1)).transpose(1, 2)
    assert torch.equal(k[:, :, committed:], k_rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
def test_benchmark_runs() -> None:
    table = benchmark_gpu.benchmark([(2, 40)], [(1, 20, 0), (1, 20, 30)], SMALL, 0.01)
    assert [row["work"] for row in table] == ["decode", "prefill", "prefill"]
    assert all(row["us"] > 0 for row in table)


@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": True}, {"masks": ["none", "some rows"] * 3}])
def test_few_rows_beside_prompts(options: dict[str, Any], device: torch.device) -> None:
    """Requests with a row or two have a pass of their own, with tiles of their size."""
    counts = (1, 70, 2, 60, 8, 9)
    case = make_case(
        31,
        dtype=torch.float16,
        counts=counts,
        committed=(70, 0, 33, 20, 5, 0),
        kinds=["any"] * 6,
        group=2,
        size=16,
        page_size=4,
        ghosts=3,
        **options,
    )
    shape = shape_of(case)
    few = gpu_shape.rows_beside_prompts(shape, len(case.rows.reqs_B), Heads(2, 2, 16, 16, 2))
    assert few is not None
    assert (few.tile_rows, shape.tile_rows) == (8, 64)
    check(case, device)
