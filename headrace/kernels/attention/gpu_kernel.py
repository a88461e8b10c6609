"""The Triton kernels of paged attention over rows: lists of tiles, one pass of softmax over a split, the merge.

A tile is up to TILE_ROWS neighbouring rows of one request; all query heads of a key/value head's group in these rows
are the BLOCK_M lines of one matrix product (GQA, arXiv 2305.13245). The slots of a request are cut at absolute
multiples of BLOCK_N into blocks; split j of N visits blocks j, j + N, j + 2N, ... in rising order with a running
softmax (FlashAttention, arXiv 2205.14135), and the splits are merged by their log-sum-exp (Flash-Decoding). So no
length has to be known outside the device: the grid follows from shapes, and programs without work return at once.

Exponents are to base 2: scores carry the factor log2(e).
"""

from __future__ import annotations

from headrace.kernels.gpu_runtime import tl, triton

TABLES = ["row_ptr_B1", "reqs_B", "req_R", "t_R", "a_R", "b_R", "c_R", "bits_R", "kv_len_B"]
"""Arguments that are parts of larger tensors: no kernel is compiled again for where they begin."""
TILE_FIELDS = 8
"""Numbers of a tile: request, first row, end of its rows, n, and as blocks of slots: begin, begin and end of those that
all its live rows see whole, end."""


@triton.jit
def blocks_of_tile(req, row0, end, n, req_R, t_R, a_R, b_R, c_R, bits_R, max_slots, window, BLOCK_ROWS: tl.constexpr,
           BLOCK_N: tl.constexpr, HAS_BITS: tl.constexpr):  # fmt: skip
    """The last four numbers of a tile, see `TILE_FIELDS`: of the rows from `row0` on that belong to a request."""
    row = row0 + tl.arange(0, BLOCK_ROWS)
    mine = row < end
    live = mine & (tl.load(req_R + row, mask=mine, other=-2) == req)
    a = tl.load(a_R + row, mask=live, other=0)
    b = tl.load(b_R + row, mask=live, other=0)
    c = tl.load(c_R + row, mask=live, other=0)
    low = tl.zeros_like(row)
    if window > 0:
        low = tl.maximum(tl.load(t_R + row, mask=live, other=0) - window + 1, 0)
    has_second = c > b
    row_begin = tl.where(n + a > low, low, tl.maximum(n + b, low))
    row_end = tl.maximum(n + a, tl.where(has_second, n + c, 0))
    sees = live & (row_end > row_begin)
    # Blocks in [low, whole) need no mask: every live row sees them from end to end.
    joined = has_second & (b <= a)
    if HAS_BITS:
        joined = joined & (tl.load(bits_R + row, mask=live, other=-1) < 0)
    whole = tl.where(joined, row_end, n + a)

    begin = tl.min(tl.where(sees, row_begin, max_slots), 0) // BLOCK_N
    stop = (tl.minimum(tl.max(tl.where(sees, row_end, 0), 0), max_slots) + BLOCK_N - 1) // BLOCK_N
    whole_begin = (tl.max(tl.where(live, low, 0), 0) + BLOCK_N - 1) // BLOCK_N
    whole_end = tl.maximum(tl.min(tl.where(live, whole, max_slots), 0), 0) // BLOCK_N
    whole_begin = tl.maximum(whole_begin, begin)
    whole_end = tl.minimum(whole_end, stop)
    if whole_end <= whole_begin:
        whole_begin = begin
        whole_end = begin
    return begin, whole_begin, whole_end, stop


@triton.jit(
    do_not_specialize=["n_rows", "n_reqs", "max_slots", "window", "least_rows"],
    do_not_specialize_on_alignment=TABLES,
)
def list_tiles(
    tiles_T8,
    row_ptr_B1,
    reqs_B,
    req_R,
    t_R,
    a_R,
    b_R,
    c_R,
    bits_R,
    kv_len_B,
    n_rows,
    n_reqs,
    max_slots,
    window,
    least_rows,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ONE_EACH: tl.constexpr,
):
    """One program a tile. Request i takes the tiles from row_ptr[i] // TILE_ROWS + i on, more than it can need by one.

    Entry `n_reqs` stands for the rows behind the last request: they see nothing. A request with fewer than `least_rows`
    rows has no tiles. With ONE_EACH tile i is that of request i, and one with more than TILE_ROWS rows has none.
    """
    tile = tl.program_id(0)
    if ONE_EACH:
        entry = tile
    else:
        i = tl.arange(0, BLOCK_REQS)
        first_B = tl.load(row_ptr_B1 + i, mask=i <= n_reqs, other=0)
        begun_B = (i <= n_reqs) & (first_B // TILE_ROWS + i <= tile)
        entry = tl.max(tl.where(begun_B, i, 0), 0)
    first = tl.load(row_ptr_B1 + entry)
    is_request = entry < n_reqs
    end = tl.load(row_ptr_B1 + entry + 1, mask=is_request, other=n_rows)
    row0 = first
    left_out = is_request & (end - first < least_rows)
    if ONE_EACH:
        left_out = end - first > TILE_ROWS
    else:
        row0 = first + (tile - first // TILE_ROWS - entry) * TILE_ROWS
    end = tl.where(left_out, row0, tl.minimum(end, row0 + TILE_ROWS))
    req = tl.load(reqs_B + entry, mask=is_request, other=-1)
    n = tl.load(kv_len_B + req, mask=is_request, other=0)

    begin, whole_begin, whole_end, stop = blocks_of_tile(
        req, row0, end, n, req_R, t_R, a_R, b_R, c_R, bits_R, max_slots, window, BLOCK_ROWS, BLOCK_N, HAS_BITS
    )
    at = tiles_T8 + tile * 8
    tl.store(at, req)
    tl.store(at + 1, row0)
    tl.store(at + 2, end)
    tl.store(at + 3, n)
    tl.store(at + 4, begin)
    tl.store(at + 5, whole_begin)
    tl.store(at + 6, whole_end)
    tl.store(at + 7, stop)


@triton.jit
def _first_of(begin, split, n_splits):
    """The first block from `begin` on that belongs to a split."""
    return begin + (split + n_splits - begin % n_splits) % n_splits


@triton.jit
def _visit(
    acc,
    top,
    mass,
    q,
    block,
    keys,
    values,
    pages,
    lows,
    firsts,
    begins,
    ends,
    bits,
    words,
    n_words,
    max_slots,
    scale,
    softcap,
    S: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BITS: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile (acc [BLOCK_M, BLOCK_DV], top and mass [BLOCK_M]) goes over one block of slots.

    `lows` to `bits` are [BLOCK_M]: a line sees slots below `firsts`, and [begins, ends) under its mask, from `lows` on.
    """
    s = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    if MASKED:
        second = (s[None, :] >= begins[:, None]) & (s[None, :] < ends[:, None])
        if HAS_BITS:
            j = s[None, :] - begins[:, None]
            at = bits[:, None] + j // 32
            asked = second & (bits[:, None] >= 0)
            word = tl.load(words + at, mask=asked & (at < n_words), other=0)
            second = second & ((bits[:, None] < 0) | (((word >> (j & 31)) & 1) != 0))
        seen = (second | (s[None, :] < firsts[:, None])) & (s[None, :] >= lows[:, None])
        # What no line sees may be NaN, and 0 * NaN is NaN.
        used = tl.max(seen.to(tl.int32), 0) > 0
        # Triton 3.6 fails to compile vectors and float32 operands that are loaded under a mask that is itself a
        # reduction, and operands of half the width that are selected by one. Behind the end of the table slots are read
        # from the page of the ghosts, and forgotten like all that nobody sees.
        page = tl.load(pages + s // S, mask=s < max_slots, other=0)
        place = page.to(tl.int64) * S + s % S
        if EXACT:
            k = tl.load(keys + place[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0.0)
            v = tl.load(values + place[:, None] * V_SLOT + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
            k = tl.where(used[None, :], k, 0.0)
            v = tl.where(used[:, None], v, 0.0)
        else:
            k = tl.load(keys + place[None, :] * D + d[:, None], mask=used[None, :] & (d < D)[:, None], other=0.0)
            v = tl.load(
                values + place[:, None] * V_SLOT + dv[None, :], mask=used[:, None] & (dv < DV)[None, :], other=0.0
            )
    else:
        page = tl.load(pages + s // S)
        place = page.to(tl.int64) * S + s % S
        if BLOCK_D == D:
            k = tl.load(keys + place[None, :] * D + d[:, None])
        else:
            k = tl.load(keys + place[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0.0)
        if BLOCK_DV == DV:
            v = tl.load(values + place[:, None] * V_SLOT + dv[None, :])
        else:
            v = tl.load(values + place[:, None] * V_SLOT + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
    score = tl.dot(q, k, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # softcap arrives with the factor log2(e) and scale with 1 / softcap: tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = softcap * (1.0 - 2.0 / (tl.exp2(2.8853900817779268 * score) + 1.0))
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # -inf - -inf is NaN.
    safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - safe_top)
    p = tl.exp2(score - safe_top[:, None])
    mass = mass * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, mass


@triton.jit
def write_tile(out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV: tl.constexpr,
           BLOCK_DV: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr):  # fmt: skip
    """The result of the lines of a tile, from their running softmax."""
    dv = tl.arange(0, BLOCK_DV)
    if HAS_SINKS:
        sink = tl.load(sinks_H + head, mask=mine, other=0.0).to(tl.float32) * 1.4426950408889634
        high = tl.where(nothing, 0.0, tl.maximum(top, sink))
        shrink = tl.exp2(top - high)
        mass = tl.where(nothing, 1.0, mass * shrink + tl.exp2(sink - high))
        acc = acc * shrink[:, None]
        top = tl.where(nothing, float("-inf"), high)
    result = tl.where(nothing[:, None], 0.0, acc / mass[:, None])
    tl.store(
        out_RHD + where[:, None] * DV + dv[None, :],
        result.to(out_RHD.dtype.element_ty),
        mask=mine[:, None] & (dv < DV)[None, :],
    )
    if HAS_LSE:
        tl.store(lse_RH + where, (top + tl.log2(mass)) * 0.6931471805599453, mask=mine)


@triton.jit(
    do_not_specialize=["n_words", "window", "table_row", "max_slots", "n_splits", "heads"],
    do_not_specialize_on_alignment=TABLES,
)
def attend_tiles(
    out_RHD,
    lse_RH,
    part_out_RHND,
    part_lse_RHN,
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
    bits_R,
    words_W,
    sinks_H,
    n_words,
    scale,
    softcap,
    window,
    q_row,
    q_head,
    k_head,
    v_head,
    table_row,
    max_slots,
    n_splits,
    heads,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    EXACT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """One program a tile, key/value head and split. Without splits it writes the result, with splits a partial one."""
    # Of a prompt the last tiles see most slots; started first, they do not end last.
    at = tiles_T8 + (tl.num_programs(0) - 1 - tl.program_id(0)) * 8
    row0 = tl.load(at + 1)
    row_end = tl.load(at + 2)
    if row0 >= row_end:
        return
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    req = tl.load(at)
    n = tl.load(at + 3)
    begin = tl.load(at + 4)
    whole_begin = tl.load(at + 5)
    whole_end = tl.load(at + 6)
    stop = tl.load(at + 7)

    m = tl.arange(0, BLOCK_M)
    row = row0 + m // GROUP
    head = kv_head * GROUP + m % GROUP
    mine = (m < TILE_ROWS * GROUP) & (row < row_end)
    live = mine & (tl.load(req_R + row, mask=mine, other=-2) == req)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    if _first_of(begin, split, n_splits) < stop:
        d = tl.arange(0, BLOCK_D)
        q_at = q_RHD + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :]
        q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
        keys = k_pool_KPSD + kv_head.to(tl.int64) * k_head
        values = v_pool_KPSD + kv_head.to(tl.int64) * v_head
        pages = page_table_BP + req.to(tl.int64) * table_row
        firsts = n + tl.load(a_R + row, mask=live, other=0)
        begins = n + tl.load(b_R + row, mask=live, other=0)
        ends = n + tl.load(c_R + row, mask=live, other=0)
        lows = tl.zeros_like(row)
        if HAS_WINDOW:
            lows = tl.load(t_R + row, mask=live, other=0) - window + 1
        # A line without a live row sees nothing.
        firsts = tl.where(live, tl.minimum(firsts, max_slots), -1)
        ends = tl.where(live, tl.minimum(ends, max_slots), -1)
        lows = tl.maximum(lows, 0)
        bits = tl.full([BLOCK_M], -1, tl.int32)
        if HAS_BITS:
            bits = tl.load(bits_R + row, mask=live, other=-1)

        if HAS_WINDOW:
            for block in range(_first_of(begin, split, n_splits), whole_begin, n_splits):
                acc, top, mass = _visit(
                    acc, top, mass, q, block, keys, values, pages, lows, firsts, begins, ends, bits, words_W, n_words,
                    max_slots, scale, softcap, S, D, DV, V_SLOT, BLOCK_N, BLOCK_D, BLOCK_DV,
                    HAS_SOFTCAP, HAS_BITS, EXACT, True,
                )  # fmt: skip
        for block in range(_first_of(whole_begin, split, n_splits), whole_end, n_splits):
            acc, top, mass = _visit(
                acc, top, mass, q, block, keys, values, pages, lows, firsts, begins, ends, bits, words_W, n_words,
                max_slots, scale, softcap, S, D, DV, V_SLOT, BLOCK_N, BLOCK_D, BLOCK_DV,
                HAS_SOFTCAP, HAS_BITS, EXACT, False,
            )  # fmt: skip
        for block in range(_first_of(whole_end, split, n_splits), stop, n_splits):
            acc, top, mass = _visit(
                acc, top, mass, q, block, keys, values, pages, lows, firsts, begins, ends, bits, words_W, n_words,
                max_slots, scale, softcap, S, D, DV, V_SLOT, BLOCK_N, BLOCK_D, BLOCK_DV,
                HAS_SOFTCAP, HAS_BITS, EXACT, True,
            )  # fmt: skip

    # Whole blocks were computed for padding rows too. A mass of NaN is no nothing: its row saw NaN.
    nothing = (mass == 0.0) | (live == 0)
    top = tl.where(nothing, float("-inf"), top)
    mass = tl.where(nothing, 1.0, mass)
    dv = tl.arange(0, BLOCK_DV)
    where = row.to(tl.int64) * heads + head
    if IS_SPLIT:
        part = where * n_splits + split
        tl.store(part_lse_RHN + part, top + tl.log2(mass), mask=mine)
        # The merge reads no result whose log-sum-exp is -inf.
        tl.store(
            part_out_RHND + part[:, None] * DV + dv[None, :],
            acc / mass[:, None],
            mask=(mine & (nothing == 0))[:, None] & (dv < DV)[None, :],
        )
    else:
        write_tile(out_RHD, lse_RH, sinks_H, acc, top, mass, nothing, where, head, mine, DV, BLOCK_DV, HAS_SINKS,
                   HAS_LSE)  # fmt: skip


@triton.jit(do_not_specialize=["heads"])
def merge_splits(
    out_RHD,
    lse_RH,
    part_out_RHND,
    part_lse_RHN,
    sinks_H,
    heads,
    N_SPLITS: tl.constexpr,
    PART: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One program a row and head: out = sum of 2^lse_j out_j / sum of 2^lse_j over the splits, and the sink.

    Results are read PART splits at a time; both numbers are powers of two.
    """
    where = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    lse_N = tl.load(part_lse_RHN + where * N_SPLITS + tl.arange(0, N_SPLITS))
    top = tl.max(lse_N, 0)
    nothing = tl.max((lse_N != float("-inf")).to(tl.int32), 0) == 0
    if HAS_SINKS:
        sink = tl.load(sinks_H + tl.program_id(0) % heads).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    top = tl.where(nothing, 0.0, top)
    mass = tl.sum(tl.exp2(lse_N - top), 0)
    if HAS_SINKS:
        mass += tl.exp2(sink - top)
    mass = tl.where(nothing, 1.0, mass)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, N_SPLITS, PART):
        part = where * N_SPLITS + first + tl.arange(0, PART)
        lse = tl.load(part_lse_RHN + part)
        # Of a split that saw nothing only the -inf was written.
        used = lse != float("-inf")
        at = part_out_RHND + part[:, None] * DV + dv[None, :]
        out = tl.load(at, mask=used[:, None] & (dv < DV)[None, :], other=0.0)
        acc += tl.sum(out * tl.exp2(lse - top)[:, None], 0)
    result = tl.where(nothing, 0.0, acc / mass)
    tl.store(out_RHD + where * DV + dv, result.to(out_RHD.dtype.element_ty), mask=dv < DV)
    if HAS_LSE:
        tl.store(lse_RH + where, tl.where(nothing, float("-inf"), (top + tl.log2(mass)) * 0.6931471805599453))


@triton.jit
def write_rows(
    k_RKD,
    v_RKD,
    k_pool_KPSD,
    v_pool_KPSD,
    place_R,
    k_row,
    k_head,
    v_row,
    v_head,
    k_pool_head,
    v_pool_head,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program a row and up to BLOCK_K heads."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
    place = tl.load(place_R + row)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < D)
    k = tl.load(k_RKD + row * k_row + head * k_head + d, mask=mask)
    tl.store(k_pool_KPSD + head * k_pool_head + place * D + d, k.to(k_pool_KPSD.dtype.element_ty), mask=mask)
    d = tl.arange(0, BLOCK_DV)[None, :]
    mask = (head < KV_HEADS) & (d < DV)
    v = tl.load(v_RKD + row * v_row + head * v_head + d, mask=mask)
    tl.store(v_pool_KPSD + head * v_pool_head + place * V_SLOT + d, v.to(v_pool_KPSD.dtype.element_ty), mask=mask)
