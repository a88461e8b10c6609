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
    Stream,
    choose_shape,
    choose_stream,
    fixed_shape,
    fixed_stream,
    padded,
    parts_of_group,
    rows_beside_prompts,
    stream_beside_prompts,
    stream_of_prompts,
)
from headrace.kernels.attention.pools import pool_strides
from headrace.kernels.attention.reference import AttentionRows
from headrace.kernels.attention.squares import Chain, attend_square, find_squares, join
from headrace.kernels.gpu_sizes import next_power, overlaps, processors, shared_bytes

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernels know."""
_LOG2_E = 1.4426950408889634


class GpuPlan:
    """What all layers of a step share: its tables, and lists of tiles and items, made when first asked for."""

    def __init__(
        self,
        rows: AttentionRows,
        page_table_BP: Tensor,
        kv_len_B: Tensor,
        page_size: int,
        chains: Sequence[Chain] = (),
        parity: bool = False,
        is_rest: bool = False,
    ) -> None:
        reference.check_bits(rows)
        self.rows, self.kv_len_B = rows, kv_len_B
        self.parity, self.is_rest = parity, is_rest
        self.squares = [] if parity else find_squares(chains)
        self._paged: GpuPlan | None = None
        self._tables = page_table_BP, page_size
        self.max_slots = page_table_BP.shape[1] * page_size
        self.n_rows, self.n_reqs = rows.req_R.shape[0], rows.reqs_B.shape[0]
        self.is_joined = rows.joined and rows.bits_R is None
        # In parity prompts take the way of few rows too.
        self.is_stream = self.is_joined and (parity or rows.few)
        self._tiles: dict[tuple[int, int, int, int, bool], Tensor] = {}
        self._items: dict[tuple[Stream, int], Tensor] = {}
        self._parts: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._arrived: dict[int, Tensor] = {}

    def paged(self) -> GpuPlan:
        """The plan of what the squares leave: their rows see the committed slots only.

        A request ends there where its square does, and goes on as another one: so each has rows that see alike.
        """
        if self._paged is None:
            rows, ends = self.rows, [square.first + square.rows for square in self.squares]
            c_R = rows.c_R.clone()
            for first, count, _ in self.squares:
                c_R[first : first + count] = rows.b_R[first : first + count]
            # A number from the host makes a launch; a tensor of them would make the host wait.
            row_ptr_B1 = torch.cat([rows.row_ptr_B1, *(rows.row_ptr_B1.new_full((1,), end) for end in ends)]).sort()[0]
            reqs_B = rows.req_R[row_ptr_B1[:-1].clamp(max=self.n_rows - 1)]
            rows = rows._replace(c_R=c_R, row_ptr_B1=row_ptr_B1, reqs_B=reqs_B)
            self._paged = GpuPlan(rows, self._tables[0], self.kv_len_B, self._tables[1], is_rest=True)
        return self._paged

    def shape(self, heads: Heads) -> Shape:
        """The cut of the step for heads of one kind; see `gpu_shape`."""
        if self.parity:
            return fixed_shape(self.n_rows, self.n_reqs, heads, self.chip())
        # Of rows that are joined and not few, those of requests with few rows have a pass of their own.
        sizes = self.n_rows, self.n_reqs, self.max_slots, heads, self.chip()
        return choose_shape(*sizes, prompts=self.is_joined)

    def stream(self, heads: Heads) -> Stream:
        """The cut for the kernel of few rows."""
        if self.parity:
            return fixed_stream(self.n_rows, self.n_reqs, heads, self.chip())
        return choose_stream(self.n_rows, self.n_reqs, self.max_slots, heads, self.chip())

    def chip(self) -> Chip:
        """Where the step runs."""
        return Chip(processors(self.kv_len_B.device), shared_bytes(self.kv_len_B.device))

    def items(self, cut: Stream, window: int) -> tuple[Tensor, bool]:
        """The items under a window, int32 [I, 9], and whether they stand there since an earlier layer; see
        `gpu_kernel_few.list_items`."""
        is_listed = (cut, window) in self._items
        if not is_listed:
            from headrace.kernels.attention.gpu_kernel_few import ITEM_FIELDS, list_items

            rows = self.rows
            items_I9 = torch.empty((cut.n_items, ITEM_FIELDS), dtype=torch.int32, device=self.kv_len_B.device)
            list_items[(cut.n_items,)](
                items_I9,
                rows.row_ptr_B1,
                rows.reqs_B,
                rows.req_R,
                rows.t_R,
                rows.a_R,
                rows.b_R,
                rows.c_R,
                self.kv_len_B,
                self.n_rows,
                self.n_reqs,
                self.max_slots,
                window,
                cut.room,
                cut.least,
                cut.splits,
                cut.least_rows,
                cut.most_rows,
                TILE_ROWS=cut.tile_rows,
                BLOCK_ROWS=next_power(cut.tile_rows),
                BLOCK_REQS=self.block_reqs,
                BLOCK_N=cut.block_n,
                MOST_SPLITS=cut.most_splits,
                FIXED=cut.splits > 0,
                num_warps=1 if self.block_reqs < 256 else 4,
            )
            self._items[cut, window] = items_I9
        return self._items[cut, window], is_listed

    @property
    def block_reqs(self) -> int:
        """Requests and one more, as a kernel holds them: few sizes, since each is compiled."""
        return 64 if self.n_reqs < 64 else max(next_power(self.n_reqs + 1), 512)

    def tiles(self, shape: Shape, window: int, least_rows: int = 0, one_each: bool = False) -> Tensor:
        """The tiles under a window, int32 [T, 8]; see `gpu_kernel.list_tiles`."""
        key = (shape.tile_rows, shape.block_n, window, least_rows, one_each)
        if key not in self._tiles:
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
                least_rows,
                TILE_ROWS=shape.tile_rows,
                BLOCK_ROWS=next_power(shape.tile_rows),
                BLOCK_REQS=self.block_reqs,
                BLOCK_N=shape.block_n,
                HAS_BITS=rows.bits_R is not None,
                ONE_EACH=one_each,
                num_warps=1,
            )
            self._tiles[key] = tiles_T8
        return self._tiles[key]

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
    if plan.is_stream:
        _attend_few(work, plan.stream(kinds))
        return out_RHD, lse_RH
    shape = plan.shape(kinds)
    few: Stream | Shape | None = None
    if not plan.parity:
        few = (
            stream_beside_prompts(shape, plan.n_reqs, plan.max_slots, kinds, plan.chip())
            if plan.is_joined
            else rows_beside_prompts(shape, plan.n_reqs, kinds)
        )
    least_rows = few.tile_rows + 1 if few else 0
    if plan.is_rest and plan.is_joined:
        # Little is left of prompts, and none of it may take long.
        rest = stream_of_prompts(shape, plan.max_slots, kinds, plan.chip())
        _attend_few(work, rest._replace(least_rows=least_rows))
    else:
        _attend_tiles(work, shape, plan.tiles(shape, window, least_rows))
    # After the others, whose merge of splits goes over all rows.
    if isinstance(few, Stream):
        _attend_few(work, few)
    elif few:
        _attend_tiles(work, few, plan.tiles(few, window, one_each=True))
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

    def constants(self, cut: Shape | Stream) -> dict[str, Any]:
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


def _attend_few(work: _Work, cut: Stream) -> None:
    """The rows in a list of items, if each sees one run of slots."""
    from headrace.kernels.attention.gpu_kernel_few import attend_few

    rows, kv_heads = work.plan.rows, work.heads.kv_heads
    items_I9, is_listed = work.plan.items(cut, work.window)
    overlap = overlaps(work.out_RHD.device)
    part_out_PKMD, part_lse_PKM, arrived_PK = work.out_RHD, work.out_RHD, rows.req_R
    if cut.most_splits > 1:
        part_out_PKMD, part_lse_PKM = work.plan.parts(cut.n_parts, kv_heads, cut.block_m, work.heads.v_size)
        arrived_PK = work.plan.arrived(cut.n_parts * kv_heads)
    attend_few[(cut.n_items * kv_heads,)](
        *work.results,
        part_out_PKMD,
        part_lse_PKM,
        arrived_PK,
        work.q_RHD,
        work.k_pool_KPSD,
        work.v_pool_KPSD,
        work.page_table_BP,
        items_I9,
        rows.req_R,
        rows.t_R,
        rows.a_R,
        rows.b_R,
        rows.c_R,
        work.sinks,
        *work.numbers,
        work.out_RHD.shape[1],
        int(is_listed),
        MOST_SPLITS=cut.most_splits,
        PART=min(cut.most_splits, JOINED_PARTS),
        LINES=min(next_power(work.heads.group * cut.tile_rows), JOINED_LINES),
        STAGES=cut.n_stages,
        FIXED=cut.splits > 0,
        # What is inside and in front of a loop is compiled apart, and in parity must not round in two ways.
        enable_fp_fusion=not work.plan.parity,
        OVERLAP=overlap,
        launch_pdl=overlap,
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
