"""The Triton kernel of paged attention for few rows a request: one stream over the context, splits joined on the spot.

Decoding reads all keys and values of a request for a handful of rows, so all that counts is to keep memory busy. The
pages of the block after next are looked up while a block is multiplied, blocks at either end are masked by two bounds
alone, so all of them go through one pipeline, and the last split to arrive joins the results of all (Flash-Decoding)
in the order of the splits: no other launch, and the sum depends on no race.

What the programs do stands in a list of items, one a tile and split. The items that the chip takes at once are dealt
out to the tiles by their blocks: a tile that would get several is split among them, so that one long request among
short ones holds nothing up. The largest items come first, and what would be left for a last round is split until it
fills it. The list is made on the device, by one launch a step: no length is known outside.

For rows whose visible slots are one run, [low, end); see `AttentionRows.joined`. Tiles and exponents: see
`gpu_kernel.py`.
"""

from __future__ import annotations

from headrace.kernels.attention.gpu_kernel import TABLES, blocks_of_tile, write_tile
from headrace.kernels.gpu_runtime import tl, triton

ITEM_FIELDS = 9
"""Numbers of an item: request, first row, end of the tile's rows, n, begin and end as blocks of slots, which of the
tile's splits it is, how many there are, and where the result of the first one goes until they are joined."""

LINE = tl.constexpr(64)
"""Elements of 16 bits in a line of the L2 cache."""
KINDS = tl.constexpr(8)
"""Classes of items by size."""


@triton.jit
def _kinds(blocks_B, splits_B):
    """Classes of the items of requests by size, [B]: an eighth of the largest size each."""
    size_B = (blocks_B + splits_B - 1) // splits_B
    return tl.minimum(size_B * KINDS // tl.maximum(tl.max(size_B, 0), 1), KINDS - 1)


@triton.jit
def _share_last_round(splits_B, blocks_B, tiles_B, room, least, MOST_SPLITS: tl.constexpr):
    """More splits for the tiles behind the last `room` items that run at once, so that they fill a round as well."""
    items_B = tl.where(blocks_B > 0, tiles_B * splits_B, 0)
    count = tl.sum(items_B, 0)
    full = count // room * room
    more = room // tl.maximum(count - full, 1)
    kind_B = _kinds(blocks_B, splits_B)
    before_B = tl.zeros_like(items_B)
    begun = 0
    for down in tl.static_range(KINDS):
        mine_B = tl.where(kind_B == KINDS - 1 - down, items_B, 0)
        before_B += tl.where(kind_B == KINDS - 1 - down, begun + tl.cumsum(mine_B, 0) - mine_B, 0)
        begun += tl.sum(mine_B, 0)
    is_last = (full > 0) & (before_B >= full) & (splits_B == 1)
    more_B = tl.minimum(tl.minimum((blocks_B + least - 1) // least, more), MOST_SPLITS)
    return tl.where(is_last, tl.maximum(more_B, 1), splits_B)


@triton.jit(
    do_not_specialize=["n_rows", "n_reqs", "max_slots", "window", "room", "least", "splits", "least_rows", "most_rows"],
    do_not_specialize_on_alignment=TABLES,
)
def list_items(
    items_I9,
    row_ptr_B1,
    reqs_B,
    req_R,
    t_R,
    a_R,
    b_R,
    c_R,
    kv_len_B,
    n_rows,
    n_reqs,
    max_slots,
    window,
    room,
    least,
    splits,
    least_rows,
    most_rows,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    FIXED: tl.constexpr,
):
    """One program an item; those behind the last one are empty. The largest come first.

    A tile has as many of `room` splits as it has of all blocks, each of `least` blocks at least; at most MOST_SPLITS.
    If there are more than `room` items all the same, those that would run in a last round alone share all of it.
    FIXED: `splits` for every tile. Entry `n_reqs` stands for the rows behind the last request, which see nothing.
    Requests with fewer than `least_rows` have no items; nor, if `most_rows` is no 0, have requests with more rows than
    that and the rows behind the last one.
    """
    item = tl.program_id(0)
    i = tl.arange(0, BLOCK_REQS)
    is_request = i < n_reqs
    first_B = tl.load(row_ptr_B1 + i, mask=i <= n_reqs, other=n_rows)
    rows_B = tl.load(row_ptr_B1 + i + 1, mask=is_request, other=n_rows) - first_B
    rows_B = tl.where(is_request & (rows_B < least_rows), 0, rows_B)
    if most_rows > 0:
        rows_B = tl.where(is_request & (rows_B <= most_rows), rows_B, 0)
    tiles_B = (rows_B + TILE_ROWS - 1) // TILE_ROWS
    asked = is_request & (rows_B > 0)
    n_B = tl.load(kv_len_B + tl.load(reqs_B + i, mask=asked, other=0), mask=asked, other=0)
    # As many slots as its last row sees. A tile may see fewer; an item without a block does no harm.
    last_B = first_B + rows_B - 1
    b_B = tl.load(b_R + last_B, mask=asked, other=0)
    c_B = tl.load(c_R + last_B, mask=asked, other=0)
    slots_B = tl.maximum(n_B + tl.load(a_R + last_B, mask=asked, other=0), tl.where(c_B > b_B, n_B + c_B, 0))
    slots_B = tl.minimum(slots_B, max_slots)
    if window > 0:
        slots_B = tl.minimum(slots_B, window + rows_B)
    blocks_B = tl.where(asked, (slots_B + BLOCK_N - 1) // BLOCK_N, 0)
    if FIXED:
        splits_B = tl.zeros_like(blocks_B) + splits
    else:
        # Rounded down: a few more items than run at once would take as long as twice as many.
        share_B = room * blocks_B // tl.maximum(tl.sum(tiles_B * blocks_B, 0), 1)
        splits_B = tl.minimum(tl.minimum(share_B, (blocks_B + least - 1) // least), MOST_SPLITS)
        splits_B = tl.maximum(splits_B, 1)
        splits_B = _share_last_round(splits_B, blocks_B, tiles_B, room, least, MOST_SPLITS)
    items_B = tiles_B * splits_B

    # The class of the item, and the first item of the class.
    kind_B = _kinds(blocks_B, splits_B)
    end = 0
    base = 0
    kind = 0
    for down in tl.static_range(KINDS):
        begun = end
        end += tl.sum(tl.where(kind_B == KINDS - 1 - down, items_B, 0), 0)
        is_here = (item >= begun) & (item < end)
        base = tl.where(is_here, begun, base)
        kind = tl.where(is_here, KINDS - 1 - down, kind)
    is_used = item < end
    mine_B = tl.where(kind_B == kind, items_B, 0)
    ends_B = base + tl.cumsum(mine_B, 0)
    entry = tl.minimum(tl.sum((ends_B <= item).to(tl.int32), 0), n_reqs)
    is_entry = i == entry
    number = item - tl.sum(tl.where(is_entry, ends_B - mine_B, 0), 0)
    active = tl.maximum(tl.sum(tl.where(is_entry, splits_B, 0), 0), 1)
    # Only what is split needs room for results that are no whole ones.
    parts_B = tl.where(splits_B > 1, items_B, 0)
    part = tl.sum(tl.where(i < entry, parts_B, 0), 0) + number // active * active
    row0 = tl.sum(tl.where(is_entry, first_B, 0), 0) + number // active * TILE_ROWS
    row_end = tl.minimum(tl.sum(tl.where(is_entry, first_B + rows_B, 0), 0), row0 + TILE_ROWS)
    row0 = tl.where(is_used, row0, 0)
    row_end = tl.where(is_used, row_end, 0)
    req = tl.load(reqs_B + entry, mask=entry < n_reqs, other=-1)
    n = tl.load(kv_len_B + req, mask=entry < n_reqs, other=0)
    begin, _whole_begin, _whole_end, stop = blocks_of_tile(
        req, row0, row_end, n, req_R, t_R, a_R, b_R, c_R, req_R, max_slots, window, BLOCK_ROWS, BLOCK_N, False
    )
    at = items_I9 + item * 9
    tl.store(at, req)
    tl.store(at + 1, row0)
    tl.store(at + 2, row_end)
    tl.store(at + 3, n)
    tl.store(at + 4, begin)
    tl.store(at + 5, stop)
    tl.store(at + 6, number % active)
    tl.store(at + 7, active)
    tl.store(at + 8, part)


@triton.jit
def _ask_l2(at):
    """Ask the L2 cache for lines; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _join(
    out_RHD,
    lse_RH,
    part_out_NXD,
    part_lse_NX,
    part_size,
    sinks_H,
    row0,
    n_lines,
    first_head,
    active,
    heads,
    GROUP: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Results of the lines of a tile from those of its `active` splits, which lie `part_size` lines apart.

    LINES lines and PART splits at a time. A split that saw nothing left a log-sum-exp of -inf, and nothing else.
    """
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, MOST_SPLITS)
    for line0 in range(0, n_lines, LINES):
        line = line0 + tl.arange(0, LINES)
        is_line = line < n_lines
        row = row0 + line // GROUP
        head = first_head + line % GROUP
        # Past the L1 cache, which knows nothing of what other processors wrote.
        lse_LN = tl.load(
            part_lse_NX + n[None, :] * part_size + line[:, None],
            mask=is_line[:, None] & (n < active)[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        top = tl.max(lse_LN, 1)
        # A log-sum-exp of NaN is no nothing.
        nothing = tl.max((lse_LN != float("-inf")).to(tl.int32), 1) == 0
        if HAS_SINKS:
            sink = tl.load(sinks_H + head, mask=is_line, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(top, sink)
        top = tl.where(nothing, 0.0, top)
        mass = tl.sum(tl.exp2(lse_LN - top[:, None]), 1)
        if HAS_SINKS:
            mass += tl.exp2(sink - top)
        mass = tl.where(nothing, 1.0, mass)
        acc = tl.zeros([LINES, BLOCK_DV], tl.float32)
        for first in range(0, active, PART):
            p = first + tl.arange(0, PART)
            at = p[None, :].to(tl.int64) * part_size + line[:, None]
            lse = tl.load(
                part_lse_NX + at,
                mask=is_line[:, None] & (p < active)[None, :],
                other=float("-inf"),
                cache_modifier=".cg",
            )
            used = lse != float("-inf")
            out = tl.load(
                part_out_NXD + at[:, :, None] * DV + dv[None, None, :],
                mask=(is_line[:, None] & (p < active)[None, :])[:, :, None] & (dv < DV)[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            weight = tl.where(used, tl.exp2(lse - top[:, None]), 0.0)
            acc += tl.sum(tl.where(used[:, :, None], out, 0.0) * weight[:, :, None], 1)
        result = tl.where(nothing[:, None], 0.0, acc / mass[:, None])
        where = row.to(tl.int64) * heads + head
        tl.store(
            out_RHD + where[:, None] * DV + dv[None, :],
            result.to(out_RHD.dtype.element_ty),
            mask=is_line[:, None] & (dv < DV)[None, :],
        )
        if HAS_LSE:
            lse_L = tl.where(nothing, float("-inf"), (top + tl.log2(mass)) * 0.6931471805599453)
            tl.store(lse_RH + where, lse_L, mask=is_line)


@triton.jit(
    do_not_specialize=["window", "table_row", "max_slots", "heads", "is_listed"],
    do_not_specialize_on_alignment=TABLES,
)
def attend_few(
    out_RHD,
    lse_RH,
    part_out_PKMD,
    part_lse_PKM,
    arrived_PK,
    q_RHD,
    k_pool_KPSD,
    v_pool_KPSD,
    page_table_BP,
    items_I9,
    req_R,
    t_R,
    a_R,
    b_R,
    c_R,
    sinks_H,
    scale,
    softcap,
    window,
    q_row,
    q_head,
    k_head,
    v_head,
    table_row,
    max_slots,
    heads,
    is_listed,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    STAGES: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    FIXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program an item and key/value head; of n splits of a tile, split j visits the blocks begin + j, begin + j +
    n, ... FIXED: those whose number leaves j when divided by n, so that what a row sums in which order follows from no
    other row of its tile.

    A tile that is not split has its result written at once. `arrived_PK` is zero between launches. `is_listed`: 0 if
    the launch before this one makes the list.
    """
    kv_heads = heads // GROUP
    item = tl.program_id(0) // kv_heads
    kv_head = tl.program_id(0) % kv_heads
    # What is read before the wait was written by no launch that this one may overlap with. Every program waits: the
    # launch behind this one relies on it.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        if is_listed == 0:
            tl.extra.cuda.gdc_wait()
    at = items_I9 + item * 9
    row0 = tl.load(at + 1)
    row_end = tl.load(at + 2)
    if row0 >= row_end:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        return
    req = tl.load(at)
    n = tl.load(at + 3)
    begin = tl.load(at + 4)
    stop = tl.load(at + 5)
    split = tl.load(at + 6)
    active = tl.load(at + 7)
    if FIXED:
        begin = begin // active * active

    # The first pages are looked up beside the rows: neither lookup waits for the other.
    offset = tl.arange(0, BLOCK_N)
    pages = page_table_BP + req.to(tl.int64) * table_row
    s = (begin + split) * BLOCK_N + offset
    # A tile that sees nothing may be no request's.
    page = tl.load(pages + s // S, mask=s < tl.where(begin < stop, max_slots, 0), other=0)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    row = row0 + m // GROUP
    head = kv_head * GROUP + m % GROUP
    mine = (m < TILE_ROWS * GROUP) & (row < row_end)
    live = mine & (tl.load(req_R + row, mask=mine, other=-2) == req)
    a = tl.load(a_R + row, mask=live, other=0)
    b = tl.load(b_R + row, mask=live, other=0)
    c = tl.load(c_R + row, mask=live, other=0)
    ends = tl.minimum(tl.maximum(n + a, tl.where(c > b, n + c, 0)), max_slots)
    lows = tl.zeros_like(row)
    if HAS_WINDOW:
        lows = tl.maximum(tl.load(t_R + row, mask=live, other=0) - window + 1, 0)
    # A line without a live row sees nothing.
    ends = tl.where(live, ends, -1)
    # Slots in [low, end) are seen by some line; what no line sees may be NaN, and 0 * NaN is NaN.
    end = tl.max(ends, 0)
    low = tl.min(tl.where(live, lows, max_slots), 0)
    keys = k_pool_KPSD + kv_head.to(tl.int64) * k_head
    values = v_pool_KPSD + kv_head.to(tl.int64) * v_head
    if OVERLAP:
        # Slots of earlier steps: no kernel of this one writes them, and what it writes the cache has, too.
        place = page.to(tl.int64) * S + s % S
        k_lines: tl.constexpr = BLOCK_D // LINE if BLOCK_D > LINE else 1
        v_lines: tl.constexpr = BLOCK_DV // LINE if BLOCK_DV > LINE else 1
        _ask_l2(keys + place[:, None] * D + tl.minimum(tl.arange(0, k_lines) * LINE, D - 1)[None, :])
        _ask_l2(values + place[:, None] * V_SLOT + tl.minimum(tl.arange(0, v_lines) * LINE, DV - 1)[None, :])
        tl.extra.cuda.gdc_wait()
    q_at = q_RHD + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for block in tl.range(begin + split, stop, active, num_stages=STAGES):
        s = block * BLOCK_N + offset
        place = page.to(tl.int64) * S + s % S
        ahead = s + active * BLOCK_N
        page = tl.load(pages + ahead // S, mask=ahead < max_slots, other=0)
        used = (s >= low) & (s < end)
        k = tl.load(keys + place[None, :] * D + d[:, None], mask=used[None, :] & (d < D)[:, None], other=0.0)
        v = tl.load(values + place[:, None] * V_SLOT + dv[None, :], mask=used[:, None] & (dv < DV)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # softcap arrives with the factor log2(e) and scale with 1 / softcap: tanh(x) = 1 - 2 / (exp(2x) + 1)
            score = softcap * (1.0 - 2.0 / (tl.exp2(2.8853900817779268 * score) + 1.0))
        seen = s[None, :] < ends[:, None]
        if HAS_WINDOW:
            seen = seen & (s[None, :] >= lows[:, None])
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # -inf - -inf is NaN.
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - safe_top)
        p = tl.exp2(score - safe_top[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top

    # A mass of NaN is no nothing: its row saw NaN.
    nothing = (mass == 0.0) | (live == 0)
    top = tl.where(nothing, float("-inf"), top)
    mass = tl.where(nothing, 1.0, mass)
    where = row.to(tl.int64) * heads + head
    if MOST_SPLITS == 1:
        write_tile(
            out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV, BLOCK_DV, HAS_SINKS, HAS_LSE
        )
    else:
        if active == 1:
            write_tile(out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV, BLOCK_DV, HAS_SINKS,
                   HAS_LSE)  # fmt: skip
        else:
            first = tl.load(at + 8).to(tl.int64) * kv_heads + kv_head
            at_line = (first + split * kv_heads) * BLOCK_M + m
            tl.store(part_lse_PKM + at_line, top + tl.log2(mass), mask=mine)
            # Nobody reads a result whose log-sum-exp is -inf.
            tl.store(
                part_out_PKMD + at_line[:, None] * DV + dv[None, :],
                acc / mass[:, None],
                mask=(mine & (nothing == 0))[:, None] & (dv < DV)[None, :],
            )
            # All threads' results come before the count, which one thread raises, and behind it they are seen by all.
            tl.debug_barrier()
            if tl.atomic_add(arrived_PK + first, 1, sem="acq_rel") == active - 1:
                tl.store(arrived_PK + first, 0)  # as the next launch expects it
                _join(
                    out_RHD, lse_RH, part_out_PKMD + first * BLOCK_M * DV, part_lse_PKM + first * BLOCK_M,
                    kv_heads * BLOCK_M, sinks_H, row0, (row_end - row0) * GROUP, kv_head * GROUP, active, heads,
                    GROUP, MOST_SPLITS, PART, LINES, DV, BLOCK_DV, HAS_SINKS, HAS_LSE,
                )  # fmt: skip
