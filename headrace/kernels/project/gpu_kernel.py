"""The Triton kernels of products of few rows: the weight streams through once, everything else stays near.

A program owns a block of results (of a gated product the same block of gates and of ups) and goes over the inputs, or
over its split of them. The splits of a block leave float32 parts; the last program to arrive adds them in the order of
the splits, so the sum depends on no race. Of one row the norm is folded in: a program finds the row's scale first,
then normalises and rounds tile by tile.

With OVERLAP a program starts while the kernel before it still runs: until `gdc_wait` it touches weights only, which no
kernel writes. Letters: R rows, E inputs, N results.
"""

from __future__ import annotations

from headrace.kernels.gpu_runtime import tl, triton

LINE = tl.constexpr(64)
"""Elements of 16 bits in a line of the L2 cache."""


@triton.jit
def _ask_l2(at_N1, begin, n_inputs, AHEAD: tl.constexpr):
    """Ask the L2 cache for AHEAD inputs of every row of the weight from `begin` on; nothing waits for them."""
    line_1L = tl.minimum(begin + tl.arange(0, AHEAD // LINE) * LINE, n_inputs - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [at_N1 + line_1L], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _weights(at_N1, begin, end, BLOCK_E: tl.constexpr, EVEN: tl.constexpr):
    """A tile of weights; zeros from input `end` on. EVEN: a tile lies before `end` as a whole or not at all."""
    i_1E = tl.arange(0, BLOCK_E)[None, :]
    here_1E = (begin + i_1E * 0 < end) if EVEN else (begin + i_1E < end)
    return tl.load(at_N1 + (begin + i_1E), mask=here_1E, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(x, begin, end, BLOCK_E: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a vector; zeros from `end` on."""
    i_E = tl.arange(0, BLOCK_E)
    here_E = (begin + i_E * 0 < end) if EVEN else (begin + i_E < end)
    return tl.load(x + (begin + i_E), mask=here_E, other=0.0)


@triton.jit
def _store(y_RN, gate_NR, up_NR, bias_N1, up_bias_N1, old_NR, n_N, n_rows, n_results, y_row, BLOCK_R: tl.constexpr,
           HAS_BIAS: tl.constexpr, ONTO: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Bias, gate or sum, and out. Rounded where the composed operations round."""
    r_1R = tl.arange(0, BLOCK_R)[None, :]
    n_N1 = n_N[:, None]
    here = (n_N1 < n_results) & (r_1R < n_rows)
    element = y_RN.dtype.element_ty
    y_NR = gate_NR
    if ONTO:
        y_NR = gate_NR + old_NR.to(tl.float32)
        if HAS_BIAS:
            y_NR = y_NR.to(element).to(tl.float32) + bias_N1.to(tl.float32)
    elif HAS_BIAS:
        y_NR = gate_NR + bias_N1.to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up_NR += up_bias_N1.to(tl.float32)
        g_NR = y_NR.to(element).to(tl.float32)
        e_NR = tl.exp(-tl.abs(g_NR))
        silu_NR = (g_NR * tl.where(g_NR > 0.0, 1.0, e_NR) / (1.0 + e_NR)).to(element).to(tl.float32)
        y_NR = silu_NR * up_NR.to(element).to(tl.float32)
    tl.store(y_RN + r_1R.to(tl.int64) * y_row + n_N1, y_NR.to(element), mask=here)


@triton.jit
def _finish(
    y_RN,
    gate_NR,
    up_NR,
    bias_N1,
    up_bias_N1,
    old_NR,
    parts,
    arrived_T,
    n_N,
    n_rows,
    n_results,
    y_row,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONTO: tl.constexpr,
    GATED: tl.constexpr,
):
    """Results from sums over a split of the inputs. `parts`: float32 [tiles, splits, 1 or 2, BLOCK_N, BLOCK_R]."""
    if SPLITS == 1:
        _store(y_RN, gate_NR, up_NR, bias_N1, up_bias_N1, old_NR, n_N, n_rows, n_results, y_row, BLOCK_R,
               HAS_BIAS, ONTO, GATED)  # fmt: skip
    else:
        tile, split = tl.program_id(0), tl.program_id(1)
        size: tl.constexpr = BLOCK_N * BLOCK_R
        both: tl.constexpr = size * 2 if GATED else size
        r_1R = tl.arange(0, BLOCK_R)[None, :]
        at_NR = parts + tile.to(tl.int64) * (SPLITS * both) + tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + r_1R
        here_NR = (r_1R < n_rows) & (n_N[:, None] >= 0)
        tl.store(at_NR + split * both, gate_NR, mask=here_NR)
        if GATED:
            tl.store(at_NR + split * both + size, up_NR, mask=here_NR)
        # All threads' parts come before the count, which one thread raises, and behind it they are seen by all.
        tl.debug_barrier()
        before = tl.atomic_add(arrived_T + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.store(arrived_T + tile, 0)  # as the next launch expects it
            gate_NR = tl.zeros_like(gate_NR)
            up_NR = tl.zeros_like(up_NR)
            for s in tl.static_range(SPLITS):
                # Past the L1 cache, which knows nothing of what other processors wrote.
                gate_NR += tl.load(at_NR + s * both, mask=here_NR, other=0.0, cache_modifier=".cg")
                if GATED:
                    up_NR += tl.load(at_NR + s * both + size, mask=here_NR, other=0.0, cache_modifier=".cg")
            _store(y_RN, gate_NR, up_NR, bias_N1, up_bias_N1, old_NR, n_N, n_rows, n_results, y_row, BLOCK_R,
               HAS_BIAS, ONTO, GATED)  # fmt: skip


@triton.jit(do_not_specialize=["n_results"])
def multiply_row(
    y_RN,
    x_RE,
    weight_NE,
    bias_N,
    norm_E,
    parts,
    arrived_T,
    n_results,
    n_inputs,
    weight_row,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ONTO: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: products are summed in float32, lane by lane, and the lanes once at the end."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = (n_inputs + BLOCK_E * SPLITS - 1) // (BLOCK_E * SPLITS) * BLOCK_E
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, n_inputs)
    # Results past the last one are computed like it and not stored: their loads need no mask.
    gate_N1 = weight_NE + tl.minimum(n_N, n_results - 1).to(tl.int64)[:, None] * weight_row
    up_N1 = gate_N1 + n_results.to(tl.int64) * weight_row
    gate_NE = _weights(gate_N1, begin, end, BLOCK_E, EVEN)
    if GATED:
        up_NE = _weights(up_N1, begin, end, BLOCK_E, EVEN)
    if HAS_NORM:
        norm_E_ = _inputs(norm_E, begin, end, BLOCK_E, EVEN)
    bias_N1 = n_N[:, None]
    up_bias_N1 = bias_N1
    if HAS_BIAS:
        bias_N1 = tl.load(bias_N + n_N[:, None], mask=n_N[:, None] < n_results, other=0.0)
        if GATED:
            up_bias_N1 = tl.load(bias_N + n_results + n_N[:, None], mask=n_N[:, None] < n_results, other=0.0)
    if OVERLAP:
        if AHEAD > 0:
            _ask_l2(gate_N1, begin + BLOCK_E, n_inputs, AHEAD)
            if GATED:
                _ask_l2(up_N1, begin + BLOCK_E, n_inputs, AHEAD)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_E = _inputs(x_RE, begin, end, BLOCK_E, EVEN)
    old_N1 = n_N[:, None]
    if ONTO:
        old_N1 = tl.load(y_RN + n_N[:, None], mask=n_N[:, None] < n_results, other=0.0)
    if HAS_NORM:
        i_A = tl.arange(0, BLOCK_ALL)
        all_A = tl.load(x_RE + i_A, mask=i_A < n_inputs, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(all_A * all_A, 0) / n_inputs + eps)
    sum_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if GATED:
        up_sum_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for at in range(begin, end, BLOCK_E):
        # The next tile is on its way while this one is multiplied.
        next_gate_NE = _weights(gate_N1, at + BLOCK_E, end, BLOCK_E, EVEN)
        if GATED:
            next_up_NE = _weights(up_N1, at + BLOCK_E, end, BLOCK_E, EVEN)
        next_x_E = _inputs(x_RE, at + BLOCK_E, end, BLOCK_E, EVEN)
        wide_E = x_E.to(tl.float32)
        if HAS_NORM:
            next_norm_E = _inputs(norm_E, at + BLOCK_E, end, BLOCK_E, EVEN)
            wide_E = (wide_E * scale * norm_E_.to(tl.float32)).to(x_E.dtype).to(tl.float32)
            norm_E_ = next_norm_E
        sum_NE += gate_NE.to(tl.float32) * wide_E[None, :]
        gate_NE = next_gate_NE
        if GATED:
            up_sum_NE += up_NE.to(tl.float32) * wide_E[None, :]
            up_NE = next_up_NE
        x_E = next_x_E
    gate_sum_N1 = tl.sum(sum_NE, 1)[:, None]
    up_sum_N1 = gate_sum_N1
    if GATED:
        up_sum_N1 = tl.sum(up_sum_NE, 1)[:, None]
    _finish(y_RN, gate_sum_N1, up_sum_N1, bias_N1, up_bias_N1, old_N1, parts, arrived_T, n_N, 1, n_results, 0,
            BLOCK_N, 1, SPLITS, HAS_BIAS, ONTO, GATED)  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_results"])
def multiply_tile(
    y_RN,
    x_RE,
    weight_NE,
    bias_N,
    parts,
    arrived_T,
    n_rows,
    n_results,
    n_inputs,
    weight_row,
    x_row,
    y_row,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONTO: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Several rows: the tensor cores multiply tiles of weights with the rows, padded to BLOCK_R."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r_R1 = tl.arange(0, BLOCK_R)[:, None]
    share = (n_inputs + BLOCK_E * SPLITS - 1) // (BLOCK_E * SPLITS) * BLOCK_E
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, n_inputs)
    gate_N1 = weight_NE + tl.minimum(n_N, n_results - 1).to(tl.int64)[:, None] * weight_row
    up_N1 = gate_N1 + n_results.to(tl.int64) * weight_row
    x_R1 = x_RE + r_R1.to(tl.int64) * x_row
    bias_N1 = n_N[:, None]
    up_bias_N1 = bias_N1
    if HAS_BIAS:
        bias_N1 = tl.load(bias_N + n_N[:, None], mask=n_N[:, None] < n_results, other=0.0)
        if GATED:
            up_bias_N1 = tl.load(bias_N + n_results + n_N[:, None], mask=n_N[:, None] < n_results, other=0.0)
    if OVERLAP:
        if AHEAD > 0:
            _ask_l2(gate_N1, begin, n_inputs, AHEAD)
            if GATED:
                _ask_l2(up_N1, begin, n_inputs, AHEAD)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r_1R = tl.arange(0, BLOCK_R)[None, :]
    old_NR = n_N[:, None]
    if ONTO:
        here_NR = (n_N[:, None] < n_results) & (r_1R < n_rows)
        old_NR = tl.load(y_RN + r_1R.to(tl.int64) * y_row + n_N[:, None], mask=here_NR, other=0.0)
    i_1E = tl.arange(0, BLOCK_E)[None, :]
    sum_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    up_sum_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in tl.range(begin, end, BLOCK_E, num_stages=STAGES):
        gate_NE = _weights(gate_N1, at, end, BLOCK_E, EVEN)
        here_RE = r_R1 < n_rows
        if not EVEN:
            here_RE = here_RE & (at + i_1E < end)
        x_tile_RE = tl.load(x_R1 + (at + i_1E), mask=here_RE, other=0.0)
        sum_NR = tl.dot(gate_NE, tl.trans(x_tile_RE), sum_NR)
        if GATED:
            up_NE = _weights(up_N1, at, end, BLOCK_E, EVEN)
            up_sum_NR = tl.dot(up_NE, tl.trans(x_tile_RE), up_sum_NR)
    _finish(y_RN, sum_NR, up_sum_NR, bias_N1, up_bias_N1, old_NR, parts, arrived_T, n_N, n_rows, n_results, y_row,
            BLOCK_N, BLOCK_R, SPLITS, HAS_BIAS, ONTO, GATED)  # fmt: skip
