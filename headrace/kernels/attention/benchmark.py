"""Time of `attend` on the CPU against gathering all pages, padded to the longest request, and torch's fused attention.

Decode: requests with one row each, contexts from a sixteenth of the longest to the longest. Prefill: one chunk of a
prompt behind committed slots. Several layers' pools take turns, as in a model, so that the caches do not hold them.
Both forms get masks and gather indices made beforehand, as a step makes them once for all its layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.attention import AttentionRows, attend, plan_attention

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, LAYERS = 6, 2, 64, 16, 4
DECODE = [(1, 128), (1, 1024), (1, 4096), (16, 128), (16, 1024), (16, 4096), (64, 128), (64, 256), (64, 1024)]
"""Requests and the longest context."""
PREFILL = [(1, 128, 0), (1, 512, 0), (1, 128, 1024), (1, 512, 1024), (1, 512, 3584), (8, 16, 64)]
"""Requests, rows of each and slots committed before."""


class Step(NamedTuple):
    """One step over several layers' pools."""

    q_RHD: Tensor
    rows: AttentionRows
    pools: list[tuple[Tensor, Tensor]]
    page_table_BP: Tensor
    kv_len_B: Tensor
    lens: list[tuple[int, int, int]]


def make_step(committed: Sequence[int], n_rows: int, dtype: torch.dtype) -> Step:
    """A step in which every request has `n_rows` rows, one behind the other, its pages scattered over the pool."""
    generator = torch.Generator().manual_seed(0)
    requests, longest = len(committed), max(committed) + n_rows
    width = -(-longest // PAGE_SIZE)
    n_pages = requests * width + 1
    page_table_BP = torch.zeros(requests + 1, width, dtype=torch.int32)
    page_table_BP[:-1] = torch.randperm(n_pages - 1, generator=generator).view(requests, width) + 1
    kv_len_B = torch.tensor([*committed, 0], dtype=torch.int32)
    req_R = torch.arange(requests, dtype=torch.int32).repeat_interleave(n_rows)
    k_R = torch.arange(n_rows, dtype=torch.int32).repeat(requests)
    zero_R = torch.zeros_like(k_R)
    ptr_B1 = torch.arange(0, requests * n_rows + 1, n_rows, dtype=torch.int32)
    t_R = kv_len_B[req_R.long()] + k_R
    rows = AttentionRows(req_R, t_R, zero_R, zero_R, k_R + 1, ptr_B1, torch.arange(requests, dtype=torch.int32))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shape = (KV_HEADS, n_pages, PAGE_SIZE, HEAD_DIM)
    pools = [(normal(*shape), normal(*shape)) for _ in range(LAYERS)]
    q_RHD = normal(len(req_R), HEADS + 2 * KV_HEADS, HEAD_DIM)[:, :HEADS]
    lens = [(i * n_rows, n_rows, n + n_rows) for i, n in enumerate(committed)]
    return Step(q_RHD, rows, pools, page_table_BP, kv_len_B, lens)


def padded_sdpa(step: Step, n_rows: int) -> Callable[[int], Tensor]:
    """The usual torch way: gather every request's pages, padded to the longest, then one fused attention."""
    requests, width = step.page_table_BP.shape[0] - 1, step.page_table_BP.shape[1]
    pages = step.page_table_BP[:-1].flatten()
    slot_m = torch.arange(width * PAGE_SIZE)
    last_Br = step.kv_len_B[:-1, None] + torch.arange(n_rows)
    seen_B1rm = (slot_m <= last_Br[..., None])[:, None]
    bias_B1rm = torch.zeros(seen_B1rm.shape, dtype=step.q_RHD.dtype).masked_fill(~seen_B1rm, float("-inf"))
    square = requests == 1 and not int(step.kv_len_B[0])

    def run(layer: int) -> Tensor:
        k_BKmD, v_BKmD = (
            pool.index_select(1, pages).view(KV_HEADS, requests, -1, HEAD_DIM).transpose(0, 1)
            for pool in step.pools[layer % LAYERS]
        )
        if square:
            k_BKmD, v_BKmD = k_BKmD[:, :, :n_rows], v_BKmD[:, :, :n_rows]
        q_BHrD = step.q_RHD.view(requests, n_rows, HEADS, HEAD_DIM).transpose(1, 2)
        mask = None if square else bias_B1rm
        out = F.scaled_dot_product_attention(q_BHrD, k_BKmD, v_BKmD, mask, is_causal=square, enable_gqa=True)
        return out.transpose(1, 2).reshape(step.q_RHD.shape)

    return run


def _fastest_s(calls: Sequence[Callable[[int], object]], seconds: float) -> list[float]:
    """Shortest time of each call: what the work takes when no other process has the cores. The calls take turns."""
    best = [float("inf")] * len(calls)
    for call in calls:
        call(0)
    end, i = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        for which, call in enumerate(calls):
            for _ in range(5):
                i += 1
                start = time.perf_counter()
                call(i)
                best[which] = min(best[which], time.perf_counter() - start)
    return best


def benchmark(
    decode: Sequence[tuple[int, int]] = DECODE,
    prefill: Sequence[tuple[int, int, int]] = PREFILL,
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.5,
) -> list[dict[str, Any]]:
    """One row a case: milliseconds a layer of both forms, their ratio (above 1, `attend` is faster), and the plan's.

    `seconds` is the time spent on each case.
    """
    work = [("decode", torch.linspace(longest // 16, longest, b).long().sub(1).tolist(), 1) for b, longest in decode]
    work = [
        (name, [longest - 1] if len(n) == 1 else n, 1) for (name, n, _), (_, longest) in zip(work, decode, strict=True)
    ]
    work += [("prefill", [n] * b, n_rows) for b, n_rows, n in prefill]
    table = []
    for name, committed, n_rows in work:
        step = make_step(committed, n_rows, dtype)
        tables = (step.page_table_BP, step.kv_len_B)

        def make_plan(_: int, step: Step = step, tables: tuple[Tensor, Tensor] = tables) -> Any:
            plan = plan_attention(step.rows, *tables, PAGE_SIZE, step.lens)
            plan.work(0)  # type: ignore[union-attr]
            return plan

        plan = make_plan(0)

        def ours(layer: int, step: Step = step, tables: tuple[Tensor, Tensor] = tables, plan: Any = plan) -> Tensor:
            pools = step.pools[layer % LAYERS]
            return attend(step.q_RHD, step.rows, *pools, *tables, scale=HEAD_DIM**-0.5, plan=plan)[0]

        sdpa = padded_sdpa(step, n_rows)
        torch.testing.assert_close(ours(0), sdpa(0), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)
        ours_s, sdpa_s = _fastest_s([ours, sdpa], seconds)
        (plan_s,) = _fastest_s([make_plan], seconds / 10)
        table.append(
            {
                "work": name,
                "requests": len(committed),
                "rows_each": n_rows,
                "longest_slots": max(committed) + n_rows,
                "ours_ms": round(ours_s * 1e3, 4),
                "sdpa_ms": round(sdpa_s * 1e3, 4),
                "ratio": round(sdpa_s / ours_s, 2),
                "plan_ms": round(plan_s * 1e3, 4),
                "read_gb_per_s": round(
                    2
                    * KV_HEADS
                    * HEAD_DIM
                    * step.pools[0][0].element_size()
                    * sum(x[2] for x in step.lens)
                    / ours_s
                    / 1e9,
                    1,
                ),
            }
        )
    return table
