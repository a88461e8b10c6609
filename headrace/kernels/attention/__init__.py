"""Paged attention over rows: one operation for prompt chunks, decode rows, drafts and anything else with a mask.

`write_kv` stores the rows' keys and values, `plan_attention` prepares a step once for all its layers, `attend`
computes one layer. `reference.py` is the definition; on the CPU `cpu.py` does the work, on a GPU `gpu.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from headrace.kernels.attention import gpu, reference
from headrace.kernels.attention.gpu import GpuPlan
from headrace.kernels.attention.reference import FEW_ROWS, AttentionRows, ReferencePlan, Span
from headrace.kernels.attention.squares import Chain
from headrace.step import NONE

NEVER = 2**40
"""More rows than a request can have."""

if TYPE_CHECKING:
    from headrace.kernels.attention.cpu import CpuPlan

AttentionPlan: TypeAlias = "CpuPlan | GpuPlan | ReferencePlan"

__all__ = [
    "FEW_ROWS",
    "NONE",
    "AttentionPlan",
    "AttentionRows",
    "Chain",
    "Span",
    "attend",
    "plan_attention",
    "write_kv",
]


def plan_attention(
    rows: AttentionRows,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    page_size: int,
    lens: Sequence[tuple[int, int, int]] | None = None,
    chains: Sequence[Chain] = (),
    parity: bool = False,
) -> AttentionPlan:
    """Prepare one step of one group of layers; all layers of the group use the result.

    Make it after the rows are built and the pages are in the table, and use it until the commit: what depends on a
    layer's window is read from the tables when the first such layer runs.

    Args:
        rows: the rows of the step.
        page_table_BP: int32 [Bmax + 1, Pmax], pages by request index.
        kv_len_B: int32 [Bmax + 1], committed slots by request index.
        page_size: S, slots in a page.
        lens: by request of the step (first row, number of rows, bound on the slots its rows see), if the host knows
            them; the CPU form and the reference wait for the device without it. A GPU has no use for it.
        chains: what the host knows of requests with many rows that each see all before them: a GPU may take a faster
            way. Not for a step that is recorded and replayed with other sizes.
        parity: a row's bits follow from that row and what it sees, whatever the other rows of the step are. Not for
            rows with masks.
    """
    if kv_len_B.device.type == "cpu":
        from headrace.kernels.attention import cpu  # numba is loaded where it is used

        # In parity a request is left to the kernel, however many rows it has.
        wide_from = NEVER if parity else cpu.WIDE_FROM
        return cpu.plan_attention(rows, page_table_BP, kv_len_B, page_size, lens, wide_from)
    if kv_len_B.device.type == "cuda":
        return gpu.GpuPlan(rows, page_table_BP, kv_len_B, page_size, chains, parity)
    return reference.plan_attention(rows, kv_len_B, lens)


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
    lens: Sequence[tuple[int, int, int]] | None = None,
    plan: AttentionPlan | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    out_RHD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step in one layer.

    Args:
        q_RHD: queries; float32, float64 or bfloat16, on a GPU float16 too, the type of the pools. Query head h reads
            head h // (H // K).
        rows: the rows of the step, their own keys and values already written.
        k_pool_KPSD, v_pool_KPSD: the layer's pools; may be a part of a larger tensor along their first dimension.
        page_table_BP, kv_len_B: see `plan_attention`.
        scale: factor of the scores.
        window: tokens that a row sees, itself included; 0: all.
        softcap: scores become softcap * tanh(scores / softcap); 0: unchanged.
        sinks_H: a logit by head that joins the softmax denominator and has no value.
        need_lse: also return the logarithm of the softmax denominator.
        lens: see `plan_attention`; read only without a plan.
        plan: the step's plan.
        own: keys [R, K, D] and values [R, K, Dv] of the rows, as they were written; needed to make use of `chains`.
        out_RHD: where a GPU may put the result, contiguous; what is returned may be another tensor all the same.

    Returns:
        out [R, H, Dv] in the type of q, and lse [R, H] in float32 (float64 for float64) or None. A row that sees
        nothing has out 0 and lse -inf, sink or not. Slots that no row of a request sees may hold NaN.

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
        ValueError: types or strides that the form for this device does not know.
    """
    if plan is None:
        plan = plan_attention(rows, page_table_BP, kv_len_B, k_pool_KPSD.shape[2], lens)
    form: Any
    extra = {}
    if isinstance(plan, GpuPlan):
        form, extra = gpu.attend, {"own": own, "out_RHD": out_RHD}
    elif isinstance(plan, ReferencePlan):
        form = reference.attend
    else:
        from headrace.kernels.attention import cpu

        form = cpu.attend
    result: tuple[Tensor, Tensor | None] = form(
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
        plan=plan,
        **extra,
    )
    return result


def write_kv(k_RKD: Tensor, v_RKD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Store the rows' keys [R, K, D] and values [R, K, Dv] at the physical slots `place_R`, in place.

    `place_R` is int64 [R], page * S + offset in [0, P * S); rows that must leave no trace go to page 0.
    """
    form = {"cuda": gpu.write_kv}.get(k_pool_KPSD.device.type, reference.write_kv)
    if k_pool_KPSD.device.type == "cpu":
        from headrace.kernels.attention import cpu

        form = cpu.write_kv
    form(k_RKD, v_RKD, k_pool_KPSD, v_pool_KPSD, place_R)
