"""Time of `attend` and `write_kv` on a GPU, with the heads of an 8B model: decode by memory rate, prompts by TFLOP/s.

Each case is captured in a CUDA graph over as many layers as it takes that the pools do not stay in the L2 cache, up to
the 32 of such a model, and replayed; times are of one layer. Prompts are also timed with torch's fused attention over
keys and values that lie in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.attention import FEW_ROWS, AttentionRows, gpu
from headrace.kernels.attention.gpu_shape import Heads, Shape, Stream
from headrace.kernels.gpu_replay import replay_us

DECODE = [(b, context) for context in (1024, 4096, 32768) for b in (1, 8, 64)]
"""Requests with one row each, and their slots."""
PREFILL = [(1, 8192, 0), (1, 2048, 0), (1, 2048, 6144), (8, 1024, 0)]
"""Requests, rows of each and slots committed before."""
COLD_BYTES = 256 * 2**20
"""Bytes of keys and values that a replay reads at least, if 32 layers bring as many: several times an L2 cache."""
MAX_LAYERS = 32


class Geometry(NamedTuple):
    """The heads and pages that a case is measured with."""

    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16


MODEL_8B = Geometry()


class Step(NamedTuple):
    """One step of equal requests; every layer has pools of its own."""

    q_RHD: Tensor
    kv_RKD: tuple[Tensor, Tensor]
    rows: AttentionRows
    pools: list[tuple[Tensor, Tensor]]
    page_table_BP: Tensor
    kv_len_B: Tensor
    place_R: Tensor

    def plan(self) -> gpu.GpuPlan:
        """A new plan of the step."""
        return gpu.GpuPlan(self.rows, self.page_table_BP, self.kv_len_B, self.pools[0][0].shape[2])

    def attend(self, layer: int, plan: gpu.GpuPlan) -> Tensor:
        """One layer's attention."""
        tables = (self.page_table_BP, self.kv_len_B)
        scale = self.q_RHD.shape[2] ** -0.5
        return gpu.attend(self.q_RHD, self.rows, *self.pools[layer], *tables, scale=scale, plan=plan)[0]


def make_step(
    n_reqs: int, n_rows: int, committed: int, layers: int, device: torch.device, geometry: Geometry = MODEL_8B
) -> Step:
    """A step of `n_reqs` requests with `n_rows` rows behind `committed` slots each, pages scattered over the pools."""
    heads, kv_heads, size, page_size, dtype = geometry
    ints: Any = {"dtype": torch.int32, "device": device}
    floats: Any = {"dtype": dtype, "device": device}
    width = -(-(committed + n_rows) // page_size)
    n_pages = n_reqs * width + 1
    page_table_BP = torch.zeros(n_reqs + 1, width, **ints)
    page_table_BP[:-1] = torch.randperm(n_pages - 1, device=device).view(n_reqs, width) + 1
    kv_len_B = torch.full((n_reqs + 1,), committed, **ints)
    req_R = torch.arange(n_reqs, **ints).repeat_interleave(n_rows)
    k_R = torch.arange(n_rows, **ints).repeat(n_reqs)
    zero_R = torch.zeros_like(k_R)
    ptr_B1 = torch.arange(0, n_reqs * n_rows + 1, n_rows, **ints)
    reqs_B = torch.arange(n_reqs, **ints)
    rows = AttentionRows(
        req_R, committed + k_R, zero_R, zero_R, k_R + 1, ptr_B1, reqs_B, joined=True, few=n_rows < FEW_ROWS
    )
    slot_R = (committed + k_R).long()
    place_R = page_table_BP[req_R.long(), slot_R // page_size].long() * page_size + slot_R % page_size
    shape = (kv_heads, n_pages, page_size, size)
    pools = [(torch.randn(shape, **floats), torch.randn(shape, **floats)) for _ in range(layers)]
    qkv_RHD = torch.randn(n_reqs * n_rows, heads + 2 * kv_heads, size, **floats)
    q_RHD, k_RKD, v_RKD = qkv_RHD.split([heads, kv_heads, kv_heads], 1)
    return Step(q_RHD, (k_RKD, v_RKD), rows, pools, page_table_BP, kv_len_B, place_R)


def in_one_piece(step: Step, n_reqs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the first layer as torch's fused attention takes them: [B, H or K, slots, D]."""
    pages = step.page_table_BP[:-1].flatten()
    k_BKmD, v_BKmD = (
        pool.index_select(1, pages).view(pool.shape[0], n_reqs, -1, pool.shape[3]).transpose(0, 1).contiguous()
        for pool in step.pools[0]
    )
    q_BHrD = step.q_RHD.unflatten(0, (n_reqs, -1)).transpose(1, 2).contiguous()
    m = int(step.kv_len_B[0]) + q_BHrD.shape[2]
    return q_BHrD, k_BKmD[:, :, :m], v_BKmD[:, :, :m]


def benchmark(
    decode: Sequence[tuple[int, int]] = DECODE,
    prefill: Sequence[tuple[int, int, int]] = PREFILL,
    geometry: Geometry = MODEL_8B,
    seconds: float = 0.3,
) -> list[dict[str, Any]]:
    """One row a case: microseconds a layer, the rate of keys and values read, TFLOP/s, and what was launched.

    `plan_us` is the time of listing tiles, once a step. `seconds` is the time spent on each measurement.
    """
    work = [("decode", (b, 1, context - 1)) for b, context in decode] + [("prefill", case) for case in prefill]
    return [_measure(name, case, geometry, seconds) for name, case in work]


def _listed(plan: gpu.GpuPlan, cut: Stream | Shape) -> Tensor:
    """The list that a step makes once."""
    return plan.items(cut, 0)[0] if isinstance(cut, Stream) else plan.tiles(cut, 0)


def _measure(name: str, case: tuple[int, int, int], geometry: Geometry, seconds: float) -> dict[str, Any]:
    n_reqs, n_rows, committed = case
    heads, kv_heads, size, _, dtype = geometry
    context = committed + n_rows
    read_bytes = 2 * n_reqs * context * kv_heads * size * dtype.itemsize
    layers = min(MAX_LAYERS, -(-COLD_BYTES // read_bytes))
    step = make_step(n_reqs, n_rows, committed, layers, torch.device("cuda"), geometry)
    plan = step.plan()
    kind = Heads(heads // kv_heads, kv_heads, size, size, dtype.itemsize)
    cut = plan.stream(kind) if plan.is_stream else plan.shape(kind)

    def all_layers() -> None:
        for layer in range(layers):
            step.attend(layer, plan)

    def write_all_layers() -> None:
        for pools in step.pools:
            gpu.write_kv(*step.kv_RKD, *pools, step.place_R)

    us = replay_us(all_layers, seconds) / layers
    visible = n_reqs * (n_rows * committed + n_rows * (n_rows + 1) // 2)
    result = {
        "work": name,
        "requests": n_reqs,
        "rows_each": n_rows,
        "slots": context,
        "us": round(us, 1),
        "read_gb_per_s": round(read_bytes / us / 1e3, 1),
        "tflop_per_s": round(4 * heads * size * visible / us / 1e6, 1),
        "sdpa_us": None,
        "write_us": round(replay_us(write_all_layers, seconds / 3) / layers, 1),
        "plan_us": round(replay_us(lambda: _listed(step.plan(), cut), seconds / 3), 1),
        "tile": f"{cut.block_m}x{cut.block_n}",
    }
    if name == "prefill" and not committed:
        q, k, v = in_one_piece(step, n_reqs)
        sdpa_us = replay_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), seconds)
        result["sdpa_us"] = round(sdpa_us, 1)
    return result
