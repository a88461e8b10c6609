"""The Triton kernels of the keyed draw: one pass for maxima, one for noise, one program a row for filters and the end.

z <= 0, so the bits of |z|, its `key`, order tokens as z does, turned around: key 0 is the most probable token, and a
filter keeps the tokens with key < K and the first few, by id, of those with key = K. Top-k and top-p look for K in a
shrinking interval of keys, each pass over those groups of tokens alone whose largest logit can still matter. Masses are
exponentials and sums in float64, in an order that follows from the row only.
Letters: M output rows, V vocabulary, C chunks of a row, G groups of GROUP tokens.
"""

from __future__ import annotations

from headrace.kernels.gpu_runtime import tl, triton

GROUP = 128
"""Neighbouring tokens under one maximum."""

_GROUP = tl.constexpr(GROUP)
_NO_ID = tl.constexpr(2**31 - 1)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_LARGEST_KEY = tl.constexpr(0x7F7FFFFF)
"""Key of the lowest finite number: a masked token, z = -inf, lies beyond."""
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_ONE_BITS = tl.constexpr(0x3F800000)
_ALL = tl.constexpr(2.0**31)
"""More tokens than a row has."""
_TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
_U_MAX = tl.constexpr(1.0 - 2.0**-24)
_LN2_HIGH = tl.constexpr(0.693138123)
_LN2_LOW = tl.constexpr(9.05800061e-6)


TABLES = ["temperature_M", "top_k_M", "top_p_M", "min_p_M", "stream_M2", "t_out_M", "nth_M"]
"""Arguments of a few bytes a row: no kernel is compiled again for where they begin, which follows from the rows."""


@triton.jit
def log_f32(x):
    """log of normal positive float32, below one unit in the last place (FreeBSD's logf): also right next to 1.

    x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2). The hardware's logarithm has an absolute error near 1, and noise
    takes the logarithm of a logarithm.
    """
    bits = x.to(tl.int32, bitcast=True) + (_ONE_BITS - _SQRT_HALF_BITS)
    k = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    s2 = s * s
    s4 = s2 * s2
    rest = s2 * (0.66666662693 + s4 * 0.28498786688) + s4 * (0.40000972152 + s4 * 0.24279078841)
    half = 0.5 * f * f
    return s * (half + rest) + k * _LN2_LOW - half + f + k * _LN2_HIGH


@triton.jit
def gumbel_f32(word):
    """-log(-log1p(-u)), u = min((word + 0.5) 2^-32, 1 - 2^-24) in float32.

    log1p(-u) = log(w) - (u - (1 - w)) / w with w = 1 - u as rounded: exact to the last bits however small u is.
    """
    u = tl.minimum((word.to(tl.float32) + 0.5) * _TWO_TO_MINUS_32, _U_MAX)
    w = 1.0 - u
    return -log_f32((u - (1.0 - w)) / w - log_f32(w))


@triton.jit
def words_of(block_Q, t_out, nth, purpose, key):
    """Random words of the tokens of blocks of four, [4 Q] in the order of ids."""
    zero_Q = tl.zeros_like(block_Q)
    a, b, c, d = tl.philox(key, zero_Q + t_out, zero_Q + nth, zero_Q + purpose, block_Q)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def mass_of(z):
    return tl.exp(z.to(tl.float64))


@triton.jit
def key_of(z):
    """Bits of |z|; z is at most 0."""
    return z.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def z_of(x, shift, temperature):
    """(x - shift) / temperature, rounded as torch does it: equal numbers stay equal, and order stays order."""
    return tl.div_rn(x - shift, tl.zeros_like(x) + temperature)


@triton.jit
def best_of(score, id_):
    """Best score, and the lowest id that has it."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, id_, _NO_ID), 0)


@triton.jit
def scan(
    logits_MV,
    raw_MV,
    top_MG,
    max_MC,
    first_MC,
    bad_MC,
    raw_max_MC,
    raw_sum_MC,
    vocab,
    n_groups,
    logits_row,
    raw_row,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One chunk: maxima of groups, maximum and its first id, whether NaN or +inf is there, sum of raw exponentials."""
    row, chunk, n_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    best_id = tl.full([TILE], _NO_ID, tl.int32)
    raw_best = tl.full([TILE], float("-inf"), tl.float32)
    bad = tl.zeros([TILE], tl.int32)
    for start in range(0, CHUNK, TILE):
        token = chunk * CHUNK + start + i
        here = token < vocab
        x = tl.load(logits_MV + row * logits_row + token, mask=here, other=float("-inf")).to(tl.float32)
        raw = tl.load(raw_MV + row * raw_row + token, mask=here, other=float("-inf")).to(tl.float32)
        # What is not below +inf is +inf or NaN.
        bad |= (~((x < float("inf")) & (raw < float("inf")))).to(tl.int32)
        x = tl.where(x < float("inf"), x, float("-inf"))
        raw_best = tl.maximum(raw_best, tl.where(raw < float("inf"), raw, float("-inf")))
        better = (x > best) | ((best_id == _NO_ID) & here)
        best = tl.where(better, x, best)
        best_id = tl.where(better, token, best_id)
        group = (chunk * CHUNK + start) // _GROUP + tl.arange(0, TILE // _GROUP)
        top = tl.max(tl.reshape(x, (TILE // _GROUP, _GROUP)), 1)
        tl.store(top_MG + row * n_groups + group, top, mask=group < n_groups)
    top, first = best_of(best, best_id)
    raw_top = tl.max(raw_best, 0)
    total = tl.zeros([TILE], tl.float64)
    # Without anything finite, any finite shift gives the sum 0.
    raw_shift = tl.where(raw_top > float("-inf"), raw_top, 0.0)
    for start in range(0, CHUNK, TILE):
        token = chunk * CHUNK + start + i
        raw = tl.load(raw_MV + row * raw_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        total += mass_of(tl.where(raw < float("inf"), raw, float("-inf")).to(tl.float64) - raw_shift.to(tl.float64))
    at = row * n_chunks + chunk
    tl.store(max_MC + at, top)
    tl.store(first_MC + at, first)
    tl.store(bad_MC + at, tl.max(bad, 0))
    tl.store(raw_max_MC + at, raw_top)
    tl.store(raw_sum_MC + at, tl.sum(total, 0))


@triton.jit
def row_maximum(
    row,
    max_MC,
    raw_max_MC,
    bad_MC,
    n_chunks,
    BLOCK_C: tl.constexpr,
):
    """Maximum of a row and of its raw logits, and whether the row is bad."""
    c = tl.arange(0, BLOCK_C)
    here = c < n_chunks
    top = tl.max(tl.load(max_MC + row * n_chunks + c, mask=here, other=float("-inf")), 0)
    raw_top = tl.max(tl.load(raw_max_MC + row * n_chunks + c, mask=here, other=float("-inf")), 0)
    bad = tl.max(tl.load(bad_MC + row * n_chunks + c, mask=here, other=0), 0) > 0
    return top, raw_top, bad | (top == float("-inf")) | (raw_top == float("-inf"))


@triton.jit
def bound_of(min_p):
    """Largest key that min-p and the mask leave."""
    # In logarithms the bound is exact at min_p = 1, where exp would round close runners-up to equals.
    fraction = tl.minimum(tl.maximum(min_p.to(tl.float64), 1e-300), 1.0)
    return tl.where(min_p > 0.0, key_of(tl.log(fraction).to(tl.float32)), _LARGEST_KEY)


@triton.jit
def top_k_of(row, top_k_M, vocab):
    """Top-k of a row, 0 where it leaves every token."""
    top_k = tl.load(top_k_M + row)
    return tl.where((top_k > 0) & (top_k < vocab), top_k, 0)


@triton.jit(do_not_specialize=["nth", "purpose"], do_not_specialize_on_alignment=TABLES)
def contest(
    logits_MV,
    temperature_M,
    top_k_M,
    top_p_M,
    min_p_M,
    stream_M2,
    t_out_M,
    nth_M,
    nth,
    purpose,
    max_MC,
    raw_max_MC,
    bad_MC,
    mass_MC,
    score_MC,
    winner_MC,
    vocab,
    logits_row,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_NTH: tl.constexpr,
):
    """One chunk: mass of what min-p leaves and, if the row has no other filter, its winner."""
    row, chunk, n_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperature_M + row)
    top_k, top_p = top_k_of(row, top_k_M, vocab), tl.load(top_p_M + row)
    shift, _, bad = row_maximum(row, max_MC, raw_max_MC, bad_MC, n_chunks, BLOCK_C)
    # Top-k counts its own mass.
    if bad | (temperature <= 0.0) | (top_k > 0):
        return
    at = row * n_chunks + chunk
    last = bound_of(tl.load(min_p_M + row))
    i = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    if top_p < 1.0:
        for start in range(0, CHUNK, TILE):
            token = chunk * CHUNK + start + i
            x = tl.load(logits_MV + row * logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
            z = z_of(x, shift, temperature)
            total += tl.where(key_of(z) <= last, mass_of(z), 0.0)
    else:
        key, t_out, step = place_of(row, stream_M2, t_out_M, nth_M, nth, HAS_NTH)
        best = tl.full([TILE], float("-inf"), tl.float32)
        best_id = tl.full([TILE], _NO_ID, tl.int32)
        for start in range(0, CHUNK, TILE):
            token = chunk * CHUNK + start + i
            x = tl.load(logits_MV + row * logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
            z = z_of(x, shift, temperature)
            keep = key_of(z) <= last
            total += tl.where(keep, mass_of(z), 0.0)
            block = (chunk * CHUNK + start) // 4 + tl.arange(0, TILE // 4)
            score = z + gumbel_f32(words_of(block, t_out, step, purpose.to(tl.int32), key))
            better = keep & (score > best)
            best = tl.where(better, score, best)
            best_id = tl.where(better, token, best_id)
        score, winner = best_of(best, best_id)
        tl.store(score_MC + at, score)
        tl.store(winner_MC + at, winner)
    tl.store(mass_MC + at, tl.sum(total, 0))


@triton.jit
def place_of(row, stream_M2, t_out_M, nth_M, nth, HAS_NTH: tl.constexpr):
    """Key of a row's noise, and the words of its counter that differ from row to row."""
    low = tl.load(stream_M2 + 2 * row).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(stream_M2 + 2 * row + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    step = nth.to(tl.int32)
    if HAS_NTH:
        step = tl.load(nth_M + row)
    return low | (high << 32), tl.load(t_out_M + row), step


@triton.jit
def list_groups(list_G, key_G, last):
    """Write the groups that hold a key up to `last`, in rising order; their number.

    The barriers: all threads have read the old list before it is overwritten, and see the new one.
    """
    wanted = (key_G <= last).to(tl.int32)
    tl.debug_barrier()
    group = tl.arange(0, key_G.shape[0])
    tl.store(list_G + tl.cumsum(wanted, 0) - wanted, group, mask=wanted > 0)
    tl.debug_barrier()
    return tl.sum(wanted, 0)


@triton.jit
def load_listed(
    logits_V,
    list_G,
    start,
    n_listed,
    vocab,
    shift,
    temperature,
    TILE: tl.constexpr,
):
    """Ids and z of the tokens of TILE // GROUP listed groups; z is -inf behind the end."""
    slot = start + tl.arange(0, TILE) // _GROUP
    group = tl.load(list_G + slot, mask=slot < n_listed, other=0)
    token = group * _GROUP + tl.arange(0, TILE) % _GROUP
    x = tl.load(logits_V + token, mask=(slot < n_listed) & (token < vocab), other=float("-inf")).to(tl.float32)
    return token, z_of(x, shift, temperature)


@triton.jit
def worth(z, BY_MASS: tl.constexpr):
    if BY_MASS:
        value = mass_of(z)
    else:
        value = tl.full(z.shape, 1.0, tl.float64)
    return value


@triton.jit
def cut(
    logits_V,
    list_G,
    key_G,
    last,
    target,
    vocab,
    shift,
    temperature,
    BY_MASS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The smallest key K such that the tokens up to K weigh `target`, at most `last`; and the weight of those below K.

    A token weighs its mass, or one. Tokens up to `last` are taken to reach the target. An interval (low, high] of keys
    is cut at half of its keys, which bounds the number of passes by 31, and at a quarter of its z, which is nearer to
    how tokens lie; and one pass more finds that `high`, a key that occurs, is the last one needed.
    """
    low = tl.full([], -1, tl.int32)  # tokens up to `low` weigh `below`, which is less than the target
    high = last
    below = tl.zeros([], tl.float64)
    while high - low > 1:
        half = low + (high - low) // 2
        z_low = tl.maximum(low, 0).to(tl.float32, bitcast=True)
        z_high = high.to(tl.float32, bitcast=True)
        quarter = tl.maximum(tl.minimum(key_of(z_low + 0.25 * (z_high - z_low)), high - 1), low)
        one, two, three = tl.minimum(half, quarter), tl.maximum(half, quarter), high - 1
        n_listed = list_groups(list_G, key_G, three)
        sum1 = tl.zeros([TILE], tl.float64)
        sum2 = tl.zeros([TILE], tl.float64)
        sum3 = tl.zeros([TILE], tl.float64)
        last1 = tl.zeros([TILE], tl.int32)
        last2 = tl.zeros([TILE], tl.int32)
        last3 = tl.zeros([TILE], tl.int32)
        for start in range(0, n_listed, TILE // _GROUP):
            _, z = load_listed(logits_V, list_G, start, n_listed, vocab, shift, temperature, TILE)
            key = key_of(z)
            value = tl.where(key > low, worth(z, BY_MASS), 0.0)
            sum1 += tl.where(key <= one, value, 0.0)
            sum2 += tl.where(key <= two, value, 0.0)
            sum3 += tl.where(key <= three, value, 0.0)
            last1 = tl.maximum(last1, tl.where(key <= one, key, 0))
            last2 = tl.maximum(last2, tl.where(key <= two, key, 0))
            last3 = tl.maximum(last3, tl.where(key <= three, key, 0))
        up_to1 = below + tl.sum(sum1, 0)
        up_to2 = below + tl.sum(sum2, 0)
        up_to3 = below + tl.sum(sum3, 0)
        if up_to3 < target:
            low = three
            below = up_to3
        else:
            if up_to2 < target:
                low = two
                below = up_to2
                high = tl.max(last3, 0)
            else:
                if up_to1 < target:
                    low = one
                    below = up_to1
                    high = tl.max(last2, 0)
                else:
                    high = tl.max(last1, 0)
    return high, below


@triton.jit(
    do_not_specialize=["nth", "purpose", "rows", "n_groups", "n_chunks"],
    do_not_specialize_on_alignment=[*TABLES, "id_M", "logp_M"],
)
def finish(
    logits_MV,
    raw_MV,
    temperature_M,
    top_k_M,
    top_p_M,
    min_p_M,
    stream_M2,
    t_out_M,
    nth_M,
    nth,
    purpose,
    top_MG,
    list_MG,
    max_MC,
    first_MC,
    bad_MC,
    raw_max_MC,
    raw_sum_MC,
    mass_MC,
    score_MC,
    winner_MC,
    id_M,
    logp_M,
    rows,
    vocab,
    n_groups,
    n_chunks,
    logits_row,
    raw_row,
    TILE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_NTH: tl.constexpr,
):
    """One row: its filters if it has any, its winner, the log-probs. `logp_M`: logp_raw, logp_draw, lse."""
    row = tl.program_id(0).to(tl.int64)
    shift, raw_top, bad = row_maximum(row, max_MC, raw_max_MC, bad_MC, n_chunks, BLOCK_C)
    if bad:
        nan = float("nan")
        tl.store(id_M + row, -1)
        tl.store(logp_M + row, nan)
        tl.store(logp_M + rows + row, nan)
        tl.store(logp_M + 2 * rows + row, nan)
        return
    logits_V = logits_MV + row * logits_row
    c = tl.arange(0, BLOCK_C)
    is_chunk = c < n_chunks
    at_C = row * n_chunks + c
    raw_max_C = tl.load(raw_max_MC + at_C, mask=is_chunk, other=float("-inf"))
    raw_sum_C = tl.load(raw_sum_MC + at_C, mask=is_chunk, other=0.0)
    raw_sum = tl.sum(raw_sum_C * mass_of(raw_max_C.to(tl.float64) - raw_top.to(tl.float64)), 0)
    lse = raw_top.to(tl.float64) + tl.log(raw_sum)
    temperature = tl.load(temperature_M + row)
    top_k, top_p, min_p = top_k_of(row, top_k_M, vocab), tl.load(top_p_M + row), tl.load(min_p_M + row)
    logp_draw = tl.zeros([], tl.float64)

    if temperature <= 0.0:
        max_C = tl.load(max_MC + at_C, mask=is_chunk, other=float("-inf"))
        _, token = best_of(max_C, tl.load(first_MC + at_C, mask=is_chunk, other=_NO_ID))
    else:
        mass = tl.zeros([], tl.float64)
        if top_k <= 0:
            mass = tl.sum(tl.load(mass_MC + at_C, mask=is_chunk, other=0.0), 0)
        if (top_k <= 0) & (top_p >= 1.0):
            score_C = tl.load(score_MC + at_C, mask=is_chunk, other=float("-inf"))
            _, token = best_of(score_C, tl.load(winner_MC + at_C, mask=is_chunk, other=_NO_ID))
        else:
            list_G = list_MG + row * n_groups
            g = tl.arange(0, BLOCK_G)
            top_G = tl.load(top_MG + row * n_groups + g, mask=g < n_groups, other=float("-inf"))
            key_G = key_of(z_of(top_G, shift, temperature))
            last = bound_of(min_p)
            # Of the tokens with the key `last`, so many stay, the lowest ids.
            ties = tl.full([], _ALL, tl.float64)
            if top_k > 0:
                first_groups = last
                if top_k <= n_groups:
                    # At least k tokens reach the k-th largest maximum, so nothing below is among the first k.
                    low = tl.full([], -1, tl.int32)
                    high = last
                    while high - low > 1:
                        middle = low + (high - low) // 2
                        if tl.sum((key_G <= middle).to(tl.int32), 0) >= top_k:
                            high = middle
                        else:
                            low = middle
                    first_groups = high
                k = top_k.to(tl.float64)
                new_last, before = cut(
                    logits_V, list_G, key_G, first_groups, k, vocab, shift, temperature, False, TILE
                )  # fmt: skip
                last = new_last
                ties = k - before
            if top_p < 1.0:
                if top_k > 0:
                    total = tl.zeros([TILE], tl.float64)
                    n_equal = tl.zeros([TILE], tl.float64)
                    n_listed = list_groups(list_G, key_G, last)
                    for start in range(0, n_listed, TILE // _GROUP):
                        _, z = load_listed(logits_V, list_G, start, n_listed, vocab, shift, temperature, TILE)
                        total += tl.where(key_of(z) < last, mass_of(z), 0.0)
                        n_equal += (key_of(z) == last).to(tl.float64)
                    ties = tl.minimum(ties, tl.sum(n_equal, 0))
                    mass = tl.sum(total, 0) + ties * mass_of(-last.to(tl.float32, bitcast=True))
                else:
                    # Tokens below this bound hold less than 1 - top_p together; 0.01 is room for rounding.
                    spare = (1.0 - tl.maximum(top_p, 0.0).to(tl.float64)) * mass / vocab
                    lowest = (tl.log(spare) - 0.01).to(tl.float32)
                    last = tl.minimum(last, key_of(tl.minimum(lowest, 0.0)))
                target = top_p.to(tl.float64) * mass
                new_last, before = cut(
                    logits_V, list_G, key_G, last, target, vocab, shift, temperature, True, TILE
                )  # fmt: skip
                room = tl.where(new_last == last, ties, _ALL)
                each = mass_of(-new_last.to(tl.float32, bitcast=True))
                # The token that crosses the target stays. One that weighs nothing is never reached by rounding.
                wanted = tl.ceil((target - before) / tl.maximum(each, 1e-300))
                ties = tl.minimum(tl.maximum(wanted, 1.0), room)
                last = new_last
            # The survivors compete.
            key, t_out, step = place_of(row, stream_M2, t_out_M, nth_M, nth, HAS_NTH)
            best = tl.full([TILE], float("-inf"), tl.float32)
            best_id = tl.full([TILE], _NO_ID, tl.int32)
            kept = tl.zeros([TILE], tl.float64)
            seen = tl.zeros([], tl.int32)
            n_listed = list_groups(list_G, key_G, last)
            for start in range(0, n_listed, TILE // _GROUP):
                token_T, z = load_listed(logits_V, list_G, start, n_listed, vocab, shift, temperature, TILE)
                equal = (key_of(z) == last).to(tl.int32)
                rank = seen + tl.cumsum(equal, 0) - equal
                seen += tl.sum(equal, 0)
                keep = (key_of(z) < last) | ((equal > 0) & (rank.to(tl.float64) < ties))
                kept += tl.where(keep, mass_of(z), 0.0)
                quad = tl.arange(0, TILE // 4)
                slot = start + quad // (_GROUP // 4)
                group = tl.load(list_G + slot, mask=slot < n_listed, other=0)
                block = group * (_GROUP // 4) + quad % (_GROUP // 4)
                score = z + gumbel_f32(words_of(block, t_out, step, purpose.to(tl.int32), key))
                better = keep & (score > best)
                best = tl.where(better, score, best)
                best_id = tl.where(better, token_T, best_id)
            mass = tl.sum(kept, 0)
            _, token = best_of(best, best_id)
        x = tl.load(logits_V + token).to(tl.float32)
        logp_draw = z_of(x, shift, temperature).to(tl.float64) - tl.log(mass)
    raw = tl.load(raw_MV + row * raw_row + token).to(tl.float64)
    tl.store(id_M + row, token)
    tl.store(logp_M + row, (raw - lse).to(tl.float32))
    tl.store(logp_M + rows + row, logp_draw.to(tl.float32))
    tl.store(logp_M + 2 * rows + row, lse.to(tl.float32))
