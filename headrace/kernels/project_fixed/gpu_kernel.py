"""The Triton kernel of products with a fixed order of sums.

A program owns a block of rows and a block of outputs. It goes over the inputs in rising order, a split at a time, and
adds the splits' sums in rising order; or, for few rows, it makes the sum of one split, and the last program to arrive
adds those of all in the same order. Outputs behind the last one are computed like it and not stored; rows behind the
last one are zeros that nobody reads.
Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from headrace.kernels.gpu_runtime import tl, triton

LINE = tl.constexpr(64)
"""Elements of 16 bits in a line of the L2 cache."""


@triton.jit
def _ask_l2(at_1N, begin, n_inputs, AHEAD: tl.constexpr):
    """Ask the L2 cache for AHEAD inputs of every output from `begin` on; nothing waits for them."""
    line_L1 = tl.minimum(begin + tl.arange(0, AHEAD // LINE) * LINE, n_inputs - 1)[:, None]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [at_1N + line_L1], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sum_split(
    x_R1,
    has_row_R1,
    weight_1N,
    begin,
    end,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN: tl.constexpr,
):
    """float32 [BLOCK_R, BLOCK_N]: products with the inputs [begin, end), summed in rising order."""
    i_E = tl.arange(0, BLOCK_E)
    x_RE = x_R1 + (begin + i_E)[None, :]
    weight_EN = weight_1N + (begin + i_E)[:, None]
    sum_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for at in range(begin, end, BLOCK_E):
        if EVEN:
            x = tl.load(x_RE, mask=has_row_R1, other=0.0)
            weight = tl.load(weight_EN, eviction_policy="evict_first")
        else:
            here = at + i_E < end
            x = tl.load(x_RE, mask=has_row_R1 & here[None, :], other=0.0)
            weight = tl.load(weight_EN, mask=here[:, None], other=0.0)
        sum_RN = tl.dot(x, weight, sum_RN, input_precision="ieee")
        x_RE += BLOCK_E
        weight_EN += BLOCK_E
    return sum_RN


@triton.jit
def _store(y, sum_RN, bias, r_R, n_N, n_rows, n_outputs, y_row, HAS_BIAS: tl.constexpr, ONTO: tl.constexpr):
    """Bias or sum, and out. Rounded where the composed operations round."""
    here = (r_R < n_rows)[:, None] & (n_N < n_outputs)[None, :]
    at = y + r_R.to(tl.int64)[:, None] * y_row + n_N[None, :]
    element = y.dtype.element_ty
    if ONTO:
        sum_RN += tl.load(at, mask=here, other=0.0).to(tl.float32)
    if HAS_BIAS:
        if ONTO:
            sum_RN = sum_RN.to(element).to(tl.float32)
        sum_RN += tl.load(bias + n_N, mask=n_N < n_outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(at, sum_RN.to(element), mask=here)


@triton.jit(do_not_specialize=["n_rows", "n_outputs"])
def multiply_fixed(
    y,
    x,
    weight,
    bias,
    parts,
    arrived_T,
    n_rows,
    n_outputs,
    n_inputs,
    share,
    y_row,
    x_row,
    weight_row,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,
    GROUP_R: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONTO: tl.constexpr,
    AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`share`: inputs of a split. `parts`: float32 [tiles, splits, BLOCK_R, BLOCK_N]; `arrived_T`: zeros, and again."""
    tile = tl.program_id(0)
    blocks_r = (n_rows + BLOCK_R - 1) // BLOCK_R
    blocks_n = (n_outputs + BLOCK_N - 1) // BLOCK_N
    # Neighbouring programs share blocks of rows and of outputs.
    group = tile // (GROUP_R * blocks_n)
    size = tl.minimum(blocks_r - group * GROUP_R, GROUP_R)
    inside = tile - group * GROUP_R * blocks_n
    r_R = (group * GROUP_R + inside % size) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_N = (inside // size) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row_R1 = (r_R < n_rows)[:, None]
    x_R1 = x + r_R.to(tl.int64)[:, None] * x_row
    weight_1N = weight + tl.minimum(n_N, n_outputs - 1).to(tl.int64)[None, :] * weight_row
    if OVERLAP:
        # Until the wait only weights are touched, which no kernel writes. Every program waits: the launch behind this
        # one relies on it.
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD > 0:
            _ask_l2(weight_1N, tl.program_id(1) * share, n_inputs, AHEAD)
        tl.extra.cuda.gdc_wait()
    if SPLITS == 1:
        sum_RN = _sum_split(x_R1, has_row_R1, weight_1N, 0, n_inputs, BLOCK_R, BLOCK_N, BLOCK_E, EVEN)
        _store(y, sum_RN, bias, r_R, n_N, n_rows, n_outputs, y_row, HAS_BIAS, ONTO)
    elif not APART:
        total_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for split in range(SPLITS):
            begin = split * share
            end = tl.minimum(begin + share, n_inputs)
            total_RN += _sum_split(x_R1, has_row_R1, weight_1N, begin, end, BLOCK_R, BLOCK_N, BLOCK_E, EVEN)
        _store(y, total_RN, bias, r_R, n_N, n_rows, n_outputs, y_row, HAS_BIAS, ONTO)
    else:
        split = tl.program_id(1)
        begin = split * share
        end = tl.minimum(begin + share, n_inputs)
        sum_RN = _sum_split(x_R1, has_row_R1, weight_1N, begin, end, BLOCK_R, BLOCK_N, BLOCK_E, EVEN)
        i_RN = tl.arange(0, BLOCK_R)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        at_RN = parts + tile.to(tl.int64) * (SPLITS * BLOCK_R * BLOCK_N) + i_RN
        here = (r_R < n_rows)[:, None] & (n_N >= 0)[None, :]
        tl.store(at_RN + split * (BLOCK_R * BLOCK_N), sum_RN, mask=here)
        # All threads' parts come before the count, which one thread raises, and behind it they are seen by all.
        tl.debug_barrier()
        before = tl.atomic_add(arrived_T + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.store(arrived_T + tile, 0)  # as the next launch expects it
            total_RN = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for s in tl.static_range(SPLITS):
                # Past the L1 cache, which knows nothing of what other processors wrote.
                at = at_RN + s * (BLOCK_R * BLOCK_N)
                total_RN += tl.load(at, mask=here, other=0.0, cache_modifier=".cg")
            _store(y, total_RN, bias, r_R, n_N, n_rows, n_outputs, y_row, HAS_BIAS, ONTO)
