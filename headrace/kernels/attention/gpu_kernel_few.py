"""The Triton kernel of paged attention for few rows a request: one stream over the context, splits joined on the spot.

Decoding reads all keys and values of a request for a handful of rows, so all that counts is to keep memory busy. The
pages of the block after next are looked up while a block is multiplied, blocks at either end are masked by two bounds
alone, so all of them go through one pipeline, and the last split to arrive joins the results of all (Flash-Decoding)
in the order of the splits: no other launch, and the sum depends on no race.

For rows whose visible slots are one run, [low, end); see `AttentionRows.joined`. Tiles, splits and exponents: see
`gpu_kernel.py`.
"""

from __future__ import annotations

from headrace.kernels.attention.gpu_kernel import write_tile
from headrace.kernels.gpu_runtime import tl, triton

LINE = tl.constexpr(64)
"""Elements of 16 bits in a line of the L2 cache."""


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
    part_out_XND,
    part_lse_XN,
    sinks_H,
    row0,
    n_lines,
    first_head,
    active,
    heads,
    GROUP: tl.constexpr,
    N_SPLITS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Results of the lines of a tile from those of its first `active` splits; partial results are [lines, N_SPLITS].

    LINES lines and PART splits at a time. A split that saw nothing left a log-sum-exp of -inf, and nothing else.
    """
    dv = tl.arange(0, BLOCK_DV)
    n = tl.arange(0, N_SPLITS)
    for line0 in range(0, n_lines, LINES):
        line = line0 + tl.arange(0, LINES)
        is_line = line < n_lines
        row = row0 + line // GROUP
        head = first_head + line % GROUP
        # Past the L1 cache, which knows nothing of what other processors wrote.
        lse_LN = tl.load(
            part_lse_XN + line[:, None] * N_SPLITS + n[None, :],
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
            at = line[:, None] * N_SPLITS + p[None, :]
            lse = tl.load(
                part_lse_XN + at,
                mask=is_line[:, None] & (p < active)[None, :],
                other=float("-inf"),
                cache_modifier=".cg",
            )
            used = lse != float("-inf")
            out = tl.load(
                part_out_XND + at[:, :, None] * DV + dv[None, None, :],
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


@triton.jit(do_not_specialize=["window", "table_row", "max_slots", "heads"])
def attend_few(
    out_RHD,
    lse_RH,
    part_out_TKMND,
    part_lse_TKMN,
    arrived_TK,
    q_RHD,
    k_pool_KPSD,
    v_pool_KPSD,
    page_table_BP,
    tiles_T8,
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
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_SPLITS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    LEAST: tl.constexpr,
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
    """One program a tile, key/value head and split; of n active splits, split j visits the blocks begin + j, begin + j
    + n, ... FIXED: all are active, and j visits the blocks whose number leaves j when divided by n, so that what a row
    sums in which order follows from no other row of its tile.

    A tile has an active split for every LEAST blocks, N_SPLITS at most; with one, the result is written at once.
    `arrived_TK` is zero between launches.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # What is read before the wait was written by no launch that this one may overlap with. Every program waits: the
    # launch behind this one relies on it.
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    at = tiles_T8 + tile * 8
    row0 = tl.load(at + 1)
    row_end = tl.load(at + 2)
    begin = tl.load(at + 4)
    stop = tl.load(at + 7)
    active = tl.maximum(tl.minimum((stop - begin + LEAST - 1) // LEAST, N_SPLITS), 1)
    if FIXED:
        active = tl.maximum(active, N_SPLITS)
        begin = begin // N_SPLITS * N_SPLITS
    if (row0 >= row_end) | (split >= active):
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        return
    req = tl.load(at)
    n = tl.load(at + 3)

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
    if N_SPLITS == 1:
        write_tile(
            out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV, BLOCK_DV, HAS_SINKS, HAS_LSE
        )
    else:
        if active == 1:
            write_tile(out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV, BLOCK_DV, HAS_SINKS,
                   HAS_LSE)  # fmt: skip
        else:
            part = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * (BLOCK_M * N_SPLITS)
            at_line = part + m * N_SPLITS + split
            tl.store(part_lse_TKMN + at_line, top + tl.log2(mass), mask=mine)
            # Nobody reads a result whose log-sum-exp is -inf.
            tl.store(
                part_out_TKMND + at_line[:, None] * DV + dv[None, :],
                acc / mass[:, None],
                mask=(mine & (nothing == 0))[:, None] & (dv < DV)[None, :],
            )
            # All threads' results come before the count, which one thread raises, and behind it they are seen by all.
            tl.debug_barrier()
            arrived = arrived_TK + tile * tl.num_programs(1) + kv_head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == active - 1:
                tl.store(arrived, 0)  # as the next launch expects it
                _join(
                    out_RHD, lse_RH, part_out_TKMND + part * DV, part_lse_TKMN + part, sinks_H, row0,
                    (row_end - row0) * GROUP, kv_head * GROUP, active, heads,
                    GROUP, N_SPLITS, PART, LINES, DV, BLOCK_DV, HAS_SINKS, HAS_LSE,
                )  # fmt: skip
