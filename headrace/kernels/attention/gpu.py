"""Paged attention over rows on a GPU: what `reference.py` defines, by the Triton kernels of `gpu_kernel.py`.

Nothing here waits for the device or asks the host for a length: launches depend on shapes alone, so a step can be
captured in a graph. float64 runs `by_rows.py`. Letters: see `reference.py`; also T tiles, N splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.kernels.attention import by_rows, reference, squares
from headrace.kernels.attention.gpu_shape import (
    JOINED_LINES,
    JOINED_PARTS,
    Chip,
    Heads,
    Shape,
    choose_shape,
    choose_stream,
    fixed_shape,
    least_blocks,
    padded,
    parts_of_group,
    rows_beside_prompts,
)
from headrace.kernels.attention.pools import pool_strides
from headrace.kernels.attention.reference import AttentionRows
from headrace.kernels.attention.squares import Chain, attend_square, find_squares, join
from headrace.kernels.gpu_sizes import next_power, overlaps, processors, shared_bytes

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernels know."""
_LOG2_E = 1.4426950408889634


class GpuPlan:
    """What all layers of a step share: the tables of the step, and lists of tiles, made when first asked for."""

    def __init__(
        self,
        rows: AttentionRows,
        page_table_BP: Tensor,
        kv_len_B: Tensor,
        page_size: int,
        chains: Sequence[Chain] = (),
        parity: bool = False,
    ) -> None:
        reference.check_bits(rows)
        self.rows, self.kv_len_B = rows, kv_len_B
        self.parity = parity
        self.squares = [] if parity else find_squares(chains)
        self._paged: GpuPlan | None = None
        self._tables = page_table_BP, page_size
        self.max_slots = page_table_BP.shape[1] * page_size
        self.n_rows, self.n_reqs = rows.req_R.shape[0], rows.reqs_B.shape[0]
        self.is_joined = rows.joined and rows.bits_R is None
        # In parity prompts take the way of few rows too.
        self.is_stream = self.is_joined and (parity or rows.few)
        self._tiles: dict[tuple[int, int, int, int, bool], Tensor] = {}
        self._parts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._arrived: dict[int, Tensor] = {}

    def paged(self) -> GpuPlan:
        """The plan of what the squares leave: their rows see the committed slots only."""
        if self._paged is None:
            c_R = self.rows.c_R.clone()
            for first, rows, _ in self.squares:
                c_R[first : first + rows] = self.rows.b_R[first : first + rows]
            page_table_BP, page_size = self._tables
            self._paged = GpuPlan(self.rows._replace(c_R=c_R), page_table_BP, self.kv_len_B, page_size)
        return self._paged

    def shape(self, heads: Heads) -> Shape:
        """The cut of the step for heads of one kind; see `gpu_shape`."""
        if self.parity:
            return fixed_shape(self.n_rows, self.n_reqs, heads, self.chip(), self.is_stream)
        sizes = self.n_rows, self.n_reqs, self.max_slots, heads, self.chip()
        # Of rows that are joined and not few, those of requests with few rows have a pass of their own.
        return choose_stream(*sizes) if self.is_stream else choose_shape(*sizes, prompts=self.is_joined)

    def chip(self) -> Chip:
        """Where the step runs."""
        return Chip(processors(self.kv_len_B.device), shared_bytes(self.kv_len_B.device))

    def tiles(self, shape: Shape, window: int, least_rows: int = 0, one_each: bool = False) -> tuple[Tensor, bool]:
        """The tiles under a window, int32 [T, 8], and whether they stand there since an earlier layer; see
        `gpu_kernel.list_tiles`."""
        key = (shape.tile_rows, shape.block_n, window, least_rows, one_each)
        is_listed = key in self._tiles
        if not is_listed:
            from headrace.kernels.attention.gpu_kernel import TILE_FIELDS, list_tiles

            rows = self.rows
            tiles_T8 = torch.empty((shape.n_tiles, TILE_FIELDS), dtype=torch.int32, device=self.kv_len_B.device)
            list_tiles[(shape.n_tiles,)](
                tiles_T8,
                rows.row_ptr_B1,
                rows.reqs_B,
                rows.req_R,
                rows.t_R,
                rows.a_R,
                rows.b_R,
                rows.c_R,
                rows.req_R if rows.bits_R is None else rows.bits_R,
                self.kv_len_B,
                self.n_rows,
                self.n_reqs,
                self.max_slots,
                window,
                TILE_ROWS=shape.tile_rows,
                BLOCK_ROWS=next_power(shape.tile_rows),
                BLOCK_REQS=max(next_power(self.n_reqs + 1), 32),
                BLOCK_N=shape.block_n,
                HAS_BITS=rows.bits_R is not None,
                LEAST_ROWS=least_rows,
                ONE_EACH=one_each,
                num_warps=1,
            )
            self._tiles[key] = tiles_T8
        return self._tiles[key], is_listed

    def parts(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Room for the results of splits, float32 [..., Dv] and [...]; layers use it one after the other."""
        if shape not in self._parts:
            out = torch.empty(shape, dtype=torch.float32, device=self.kv_len_B.device)
            self._parts[shape] = out, out.new_empty(shape[:-1])
        return self._parts[shape]

    def arrived(self, count: int) -> Tensor:
        """Counters of splits that have arrived, int32 [count]: zeros, which every launch leaves as it found them."""
        if count not in self._arrived:
            self._arrived[count] = torch.zeros(count, dtype=torch.int32, device=self.kv_len_B.device)
        return self._arrived[count]


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
    plan: GpuPlan | None = None,
    own: tuple[Tensor, Tensor] | None = None,
    out_RHD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of all rows of a step; see the package for arguments and results."""
    kv_heads, _, page_size, size = k_pool_KPSD.shape
    v_size, dtype = v_pool_KPSD.shape[3], q_RHD.dtype
    plan = plan or GpuPlan(rows, page_table_BP, kv_len_B, page_size)
    simple = not window and not softcap and sinks_H is None and not need_lse and rows.bits_R is None
    if plan.squares and own is not None and simple and dtype in squares.TYPES and size == v_size in squares.SIZES:
        tables = k_pool_KPSD, v_pool_KPSD, page_table_BP, kv_len_B
        return _attend_beside_squares(q_RHD, plan, *tables, scale, own, out_RHD), None
    if k_pool_KPSD.dtype != dtype or v_pool_KPSD.dtype != dtype or dtype not in (*TYPES, torch.float64):
        raise ValueError(
            f"queries are {dtype}, pools {k_pool_KPSD.dtype} and {v_pool_KPSD.dtype}: attention on a GPU takes one "
            f"type for all, of {', '.join(map(str, (*TYPES, torch.float64)))}"
        )
    if dtype == torch.float64:
        return by_rows.attend(
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
        )
    if q_RHD.stride(2) != 1:
        q_RHD = q_RHD.contiguous()
    n_rows, heads, _ = q_RHD.shape
    out_RHD = q_RHD.new_empty((n_rows, heads, v_size)) if out_RHD is None else out_RHD
    lse_RH = q_RHD.new_empty((n_rows, heads), dtype=torch.float32) if need_lse else None
    if not n_rows:
        return out_RHD, lse_RH
    group = heads // kv_heads
    kinds = Heads(group, kv_heads, size, v_size, dtype.itemsize)
    parts = parts_of_group(kinds)
    if parts > 1 and kv_heads == 1:
        # As many key/value heads, all of them the same one.
        k_pool_KPSD, v_pool_KPSD = (pool.expand(parts, -1, -1, -1) for pool in (k_pool_KPSD, v_pool_KPSD))
        kinds = kinds._replace(group=group // parts, kv_heads=parts)
    sinks_H = None if sinks_H is None else sinks_H.contiguous()
    work = _Work(
        plan,
        kinds,
        q_RHD,
        k_pool_KPSD,
        v_pool_KPSD,
        page_table_BP,
        out_RHD,
        lse_RH,
        sinks_H,
        scale / softcap if softcap > 0 else scale * _LOG2_E,
        softcap * _LOG2_E,
        window,
    )
    shape = plan.shape(kinds)
    if plan.is_stream:
        _attend_few(work, shape, *plan.tiles(shape, window))
        return out_RHD, lse_RH
    few = None
    if not plan.parity:
        few = rows_beside_prompts(shape, plan.n_reqs, plan.max_slots, kinds, plan.chip() if plan.is_joined else None)
    _attend_tiles(work, shape, plan.tiles(shape, window, few.tile_rows + 1 if few else 0)[0])
    if few:
        # After the others, whose merge of splits goes over all rows.
        tiles_T8, is_listed = plan.tiles(few, window, one_each=True)
        if plan.is_joined:
            _attend_few(work, few, tiles_T8, is_listed)
        else:
            _attend_tiles(work, few, tiles_T8)
    return out_RHD, lse_RH


class _Work(NamedTuple):
    """What a layer's launches share."""

    plan: GpuPlan
    heads: Heads
    q_RHD: Tensor
    k_pool_KPSD: Tensor
    v_pool_KPSD: Tensor
    page_table_BP: Tensor
    out_RHD: Tensor
    lse_RH: Tensor | None
    sinks_H: Tensor | None
    scale: float
    """With the factor log2(e), or 1 / softcap."""
    softcap: float
    """With the factor log2(e)."""
    window: int

    @property
    def results(self) -> tuple[Tensor, Tensor]:
        """Where results go. A kernel wants a tensor for what it does not write, too."""
        return self.out_RHD, self.out_RHD if self.lse_RH is None else self.lse_RH

    @property
    def sinks(self) -> Tensor:
        """A kernel wants a tensor for what it does not read."""
        return self.out_RHD if self.sinks_H is None else self.sinks_H

    @property
    def numbers(self) -> tuple[float | int, ...]:
        """From `scale` to `max_slots` in the kernels' arguments."""
        (k_head, _), (v_head, _) = pool_strides(self.k_pool_KPSD), pool_strides(self.v_pool_KPSD)
        q_row, q_head, _ = self.q_RHD.stride()
        strides = q_row, q_head, k_head, v_head, self.page_table_BP.stride(0)
        return self.scale, self.softcap, self.window, *strides, self.plan.max_slots

    def constants(self, cut: Shape) -> dict[str, Any]:
        """The kernels' constants that follow from the heads and the cut."""
        heads = self.heads
        return {
            "GROUP": heads.group,
            "TILE_ROWS": cut.tile_rows,
            "BLOCK_M": cut.block_m,
            "BLOCK_N": cut.block_n,
            "S": self.k_pool_KPSD.shape[2],
            "D": heads.size,
            "DV": heads.v_size,
            "V_SLOT": pool_strides(self.v_pool_KPSD)[1],
            "BLOCK_D": padded(heads.size),
            "BLOCK_DV": padded(heads.v_size),
            "HAS_WINDOW": self.window > 0,
            "HAS_SOFTCAP": self.softcap > 0,
            "HAS_SINKS": self.sinks_H is not None,
            "HAS_LSE": self.lse_RH is not None,
            "num_warps": cut.n_warps,
            "num_stages": cut.n_stages,
        }


def _attend_tiles(work: _Work, cut: Shape, tiles_T8: Tensor) -> None:
    """The rows in a list of tiles, whatever they see."""
    from headrace.kernels.attention.gpu_kernel import attend_tiles, merge_splits

    rows, is_split = work.plan.rows, cut.n_splits > 1
    n_rows, heads, _ = work.out_RHD.shape
    v_size = work.heads.v_size
    part_out_RHND, part_lse_RHN = work.out_RHD, work.out_RHD
    if is_split:
        part_out_RHND, part_lse_RHN = work.plan.parts(n_rows, heads, cut.n_splits, v_size)
    attend_tiles[(cut.n_tiles, work.heads.kv_heads, cut.n_splits)](
        *work.results,
        part_out_RHND,
        part_lse_RHN,
        work.q_RHD,
        work.k_pool_KPSD,
        work.v_pool_KPSD,
        work.page_table_BP,
        tiles_T8,
        rows.req_R,
        rows.t_R,
        rows.a_R,
        rows.b_R,
        rows.c_R,
        rows.req_R if rows.bits_R is None else rows.bits_R,
        rows.req_R if rows.words_W is None else rows.words_W,
        work.sinks,
        0 if rows.words_W is None else rows.words_W.shape[0],
        *work.numbers,
        cut.n_splits,
        heads,
        HAS_BITS=rows.bits_R is not None,
        EXACT=work.q_RHD.dtype == torch.float32,
        IS_SPLIT=is_split,
        # Blocks with and without a mask are compiled apart, and in parity must not round a score in two ways.
        enable_fp_fusion=not work.plan.parity,
        **work.constants(cut),
    )
    if is_split:
        merge_splits[(n_rows * heads,)](
            *work.results,
            part_out_RHND,
            part_lse_RHN,
            work.sinks,
            heads,
            N_SPLITS=cut.n_splits,
            PART=min(cut.n_splits, JOINED_PARTS),
            DV=v_size,
            BLOCK_DV=next_power(v_size),
            HAS_SINKS=work.sinks_H is not None,
            HAS_LSE=work.lse_RH is not None,
            num_warps=4,
        )


def _attend_few(work: _Work, cut: Shape, tiles_T8: Tensor, is_listed: bool) -> None:
    """The rows in a list of tiles, if each sees one run of slots. `is_listed`: by a launch before the last one."""
    from headrace.kernels.attention.gpu_kernel_few import attend_few

    rows, kv_heads = work.plan.rows, work.heads.kv_heads
    overlap = overlaps(work.out_RHD.device)
    part_out_TKMND, part_lse_TKMN, arrived_TK = work.out_RHD, work.out_RHD, rows.req_R
    if cut.n_splits > 1:
        sizes = cut.n_tiles, kv_heads, cut.block_m, cut.n_splits, work.heads.v_size
        part_out_TKMND, part_lse_TKMN = work.plan.parts(*sizes)
        arrived_TK = work.plan.arrived(cut.n_tiles * kv_heads)
    attend_few[(cut.n_tiles, kv_heads, cut.n_splits)](
        *work.results,
        part_out_TKMND,
        part_lse_TKMN,
        arrived_TK,
        work.q_RHD,
        work.k_pool_KPSD,
        work.v_pool_KPSD,
        work.page_table_BP,
        tiles_T8,
        rows.req_R,
        rows.t_R,
        rows.a_R,
        rows.b_R,
        rows.c_R,
        work.sinks,
        *work.numbers,
        work.out_RHD.shape[1],
        N_SPLITS=cut.n_splits,
        PART=min(cut.n_splits, JOINED_PARTS),
        LINES=min(next_power(work.heads.group * cut.tile_rows), JOINED_LINES),
        LEAST=least_blocks(cut),
        STAGES=cut.n_stages,
        FIXED=work.plan.parity,
        # What is inside and in front of a loop is compiled apart, and in parity must not round in two ways.
        enable_fp_fusion=not work.plan.parity,
        OVERLAP=overlap,
        launch_pdl=overlap and is_listed,
        **work.constants(cut),
    )


def _attend_beside_squares(
    q_RHD: Tensor,
    plan: GpuPlan,
    k_pool_KPSD: Tensor,
    v_pool_KPSD: Tensor,
    page_table_BP: Tensor,
    kv_len_B: Tensor,
    scale: float,
    own: tuple[Tensor, Tensor],
    out_RHD: Tensor | None = None,
) -> Tensor:
    """Squares by themselves, all else by pages, and the two joined."""
    n_rows = q_RHD.shape[0]
    needs_lse = any(square.committed for square in plan.squares)
    k_RKD, v_RKD = own
    whole = plan.squares[0]
    if not needs_lse and whole.rows == n_rows:
        return attend_square(q_RHD, k_RKD, v_RKD, scale, False)[0]
    paged = plan.paged()
    out_RHD, lse_RH = attend(
        q_RHD,
        paged.rows,
        k_pool_KPSD,
        v_pool_KPSD,
        page_table_BP,
        kv_len_B,
        scale=scale,
        need_lse=needs_lse,
        plan=paged,
        out_RHD=out_RHD,
    )
    for first, rows, committed in plan.squares:
        mine = slice(first, first + rows)
        part_rHD, part_lse_rH = attend_square(q_RHD[mine], k_RKD[mine], v_RKD[mine], scale, committed > 0)
        if committed and lse_RH is not None:
            join(out_RHD[mine], lse_RH[mine], part_rHD, part_lse_rH)
        else:
            out_RHD[mine] = part_rHD
    return out_RHD


def write_kv(k_RKD: Tensor, v_RKD: Tensor, k_pool_KPSD: Tensor, v_pool_KPSD: Tensor, place_R: Tensor) -> None:
    """Store the rows' keys and values at physical slots `place_R`, int64, in one launch. Any floating types."""
    from headrace.kernels.attention.gpu_kernel import write_rows

    k_RKD, v_RKD = (x if x.stride(2) == 1 else x.contiguous() for x in (k_RKD, v_RKD))
    n_rows, kv_heads, size = k_RKD.shape
    v_size = v_RKD.shape[2]
    if not n_rows:
        return
    block_d, block_dv = next_power(size), next_power(v_size)
    v_pool_head, v_slot = pool_strides(v_pool_KPSD)
    block_k = min(next_power(kv_heads), max(1, 4096 // max(block_d, block_dv)))
    write_rows[(n_rows, -(-kv_heads // block_k))](
        k_RKD,
        v_RKD,
        k_pool_KPSD,
        v_pool_KPSD,
        place_R.contiguous(),
        k_RKD.stride(0),
        k_RKD.stride(1),
        v_RKD.stride(0),
        v_RKD.stride(1),
        pool_strides(k_pool_KPSD)[0],
        v_pool_head,
        KV_HEADS=kv_heads,
        D=size,
        DV=v_size,
        V_SLOT=v_slot,
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        num_warps=4,
    )
