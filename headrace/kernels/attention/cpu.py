"""Paged attention over rows on the CPU. (First form: the reference; the compiled kernel follows.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from headrace.kernels.attention import reference
from headrace.kernels.attention.reference import AttentionRows


class CpuPlan(NamedTuple):
    """What all layers of a step share."""

    spans: reference.ReferencePlan


def plan_attention(
    rows: AttentionRows,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    page_size: int,
    lens: Sequence[tuple[int, int, int]] | None = None,
) -> CpuPlan:
    """The plan of a step."""
    return CpuPlan(reference.plan_attention(rows, kv_len_B, lens))


def attend(
    q_RHD: Tensor,
    rows: AttentionRows,
    k_pool_KPSD: Tensor,
    v_pool_KPSD: Tensor,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    need_lse: bool = False,
    plan: CpuPlan,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step."""
    return reference.attend(
        q_RHD,
        rows,
        k_pool_KPSD,
        v_pool_KPSD,
        page_table_BP,
        kv_len_B,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_H=sinks_H,
        need_lse=need_lse,
        plan=plan.spans,
    )


write_kv = reference.write_kv
