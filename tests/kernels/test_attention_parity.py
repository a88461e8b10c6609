"""Attention whose rows' bits follow from the row and what it sees: whole prompts, chunks, decode, any neighbours.

Over the CPU's form wherever tests run, over the GPU's form compiled on a GPU, and that one in Triton's interpreter too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_attention import make_case
from test_attention_gpu import GRID, LSE_TOLERANCE, TOLERANCE, by_reference, compare, on
from torch import Tensor

from headrace.kernels.attention import AttentionRows, attend, gpu, plan_attention

HAS_GPU = torch.cuda.is_available()
SLOTS = 700
PAGE = 16
CONTEXTS = (1, 2, 17, 64, 65, 150, 300, 699)


class Cache:
    """Pools with the keys and values of some requests, and queries for all their tokens."""

    def __init__(
        self, dtype: torch.dtype, device: str, heads: int, kv_heads: int, size: int, joined: bool = True
    ) -> None:
        self.joined = joined
        generator = torch.Generator().manual_seed(heads + size)
        n_pages = -(-SLOTS // PAGE)
        count = len(CONTEXTS)
        pages = torch.randperm(count * n_pages, generator=generator) + 1
        self.table_BP = torch.zeros(count + 1, n_pages, dtype=torch.int32)
        self.table_BP[:count] = pages.view(count, n_pages)
        shape = (kv_heads, count * n_pages + 1, PAGE, size)
        self.pools = [torch.randn(shape, generator=generator).to(device, dtype) for _ in "kv"]
        self.q_BTHD = torch.randn(count, SLOTS, heads, size, generator=generator).to(device, dtype)
        self.table_BP, self.device = self.table_BP.to(device), device

    def attend(self, work: list[tuple[int, int, int]], form: Callable[..., Any], **options: Any) -> list[Tensor]:
        """Outputs of requests in one step: (request, first token, behind the last), chains over all before them."""
        tokens = [(req, first, t) for req, first, last in work for t in range(first, last)]
        req, n, t = (torch.tensor(x, dtype=torch.int32) for x in zip(*tokens, strict=True))
        sizes = [last - first for _, first, last in work]
        zero = torch.zeros_like(req)
        row_ptr = torch.tensor([0, *sizes]).cumsum(0).int()
        reqs = torch.tensor([req for req, _, _ in work], dtype=torch.int32)
        kv_len = torch.zeros(len(CONTEXTS) + 1, dtype=torch.int32)
        for one, first, _ in work:
            kv_len[one] = first
        columns = (req, t, zero, zero, t - n + 1, row_ptr, reqs)
        rows = AttentionRows(*(x.to(self.device) for x in columns), joined=self.joined)
        lens = [(int(row_ptr[i]), sizes[i], work[i][2]) for i in range(len(work))]
        q_RHD = torch.cat([self.q_BTHD[req, first:last] for req, first, last in work])
        out_RHD, _ = form(
            q_RHD, rows, *self.pools, self.table_BP, kv_len.to(self.device), lens=lens, scale=0.2, **options
        )
        return list(out_RHD.split(sizes))


def by_package(
    q_RHD: Tensor, rows: AttentionRows, *tables: Tensor, lens: Any, parity: bool = True, **options: Any
) -> Any:
    plan = plan_attention(rows, tables[2], tables[3], PAGE, lens, parity=parity)
    return attend(q_RHD, rows, *tables, plan=plan, **options)


def by_gpu_form(q_RHD: Tensor, rows: AttentionRows, *tables: Tensor, lens: Any, **options: Any) -> Any:
    plan = gpu.GpuPlan(rows, tables[2], tables[3], PAGE, parity=True)
    return gpu.attend(q_RHD, rows, *tables, plan=plan, **options)


def differing(cache: Cache, form: Callable[..., Any], contexts: tuple[int, ...], **options: Any) -> tuple[int, int]:
    """Rows compared, and those whose bits are not the ones that they have in a whole prompt by itself."""
    rng = random.Random(3)
    whole = [cache.attend([(i, 0, contexts[i])], form, **options)[0] for i in range(len(contexts))]
    rows = bad = 0
    works = [
        [(i, 0, n) for i, n in enumerate(contexts)],  # all prompts in one step
        [(i, n - 1, n) for i, n in enumerate(contexts)],  # all decode
        [(i, n - 1 if i % 2 else n // 3, n) for i, n in enumerate(contexts)][::-1],  # decode beside chunks
        *([(i, n - 1, n)] for i, n in enumerate(contexts)),  # each by itself
    ]
    for _ in range(2):
        cuts = [sorted(rng.sample(range(n + 1), 2)) if n > 1 else [0, 1] for n in contexts]
        works.append([(i, first, last) for i, (first, last) in enumerate(cuts)])
    for work in works:
        for (req, first, last), out_rHD in zip(work, cache.attend(work, form, **options), strict=True):
            rows += last - first
            bad += int((out_rHD != whole[req][first:last]).flatten(1).any(1).sum())
    return rows, bad


OPTIONS: dict[str, dict[str, Any]] = {"all slots": {}, "window": {"window": 100}, "softcap": {"softcap": 5.0}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_bits_on_the_cpu(name: str, dtype: torch.dtype, events: Counter[str]) -> None:
    cache = Cache(dtype, "cpu", 6, 2, 16)
    rows, bad = differing(cache, by_package, CONTEXTS, **OPTIONS[name])
    events["rows"] += rows
    assert not bad


def test_without_parity_bits_differ_on_the_cpu(events: Counter[str]) -> None:
    """The comparison can fail: chunks go to torch, which sums otherwise."""
    cache = Cache(torch.float32, "cpu", 6, 2, 16)
    events["rows that differ"] += differing(cache, by_package, CONTEXTS, parity=False)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", [(32, 8, 128), (16, 8, 128), (7, 1, 64), (8, 4, 256)])
@pytest.mark.parametrize(("name", "joined"), [*((name, True) for name in OPTIONS), ("all slots", False)])
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="what a GPU's instructions add up first is known to the GPU only")
def test_bits_on_the_gpu(
    name: str,
    joined: bool,
    geometry: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    events: Counter[str],
) -> None:
    """Whichever kernel is behind `attend`. How many rows differ without parity is shown."""
    cache = Cache(dtype, str(device), *geometry, joined=joined)
    rows, bad = differing(cache, by_package, CONTEXTS, **OPTIONS[name])
    assert not bad, f"{bad} of {rows} rows"
    events["rows"] += rows
    if name == "all slots" and dtype == torch.bfloat16:
        events["rows that differ without"] += differing(cache, by_package, CONTEXTS, parity=False)[1]


@pytest.mark.parametrize(("joined", "window"), [(True, 0), (True, 20), (False, 30)])
def test_bits_of_the_gpu_form(joined: bool, window: int, device: torch.device, events: Counter[str]) -> None:
    """The same tiles and splits for one row as for a prompt."""
    cache = Cache(torch.float32, str(device), 4, 2, 16, joined=joined)
    rows, bad = differing(cache, by_gpu_form, (1, 30, 70) if joined else (1, 40), window=window)
    events["rows"] += rows
    assert not bad, f"{bad} of {rows} rows"


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "any rows"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("prompts and decode", torch.float16), ("window", torch.bfloat16), ("sinks", torch.float32)],
    ids=str,
)
def test_parity_is_the_reference(name: str, joined: bool, dtype: torch.dtype, device: torch.device) -> None:
    """In tiles of one form and a fixed number of splits."""
    work = GRID[name] | {"kinds": ("causal",) * 6} if joined else GRID[name]
    case = make_case(len(name), dtype=dtype, **work)
    case = on(replace(case, rows=case.rows._replace(joined=joined)), device)
    plan = gpu.GpuPlan(case.rows, case.page_table_BP, case.kv_len_B, case.k_KPSD.shape[2], parity=True)
    out, lse = case.run(gpu.attend, plan=plan)
    expected_out, expected_lse = by_reference(case)
    compare(case, (out.cpu(), out.cpu()), (expected_out.cpu(), expected_out.cpu()), TOLERANCE[dtype])
    compare(case, (lse.cpu(), lse.cpu()), (expected_lse.cpu(), expected_lse.cpu()), LSE_TOLERANCE)
