"""Keyed draw on the CPU: the same function of a row as `reference.py`, in a few passes over chunks that fit a cache.

Three facts save the work. Every filter keeps a prefix of the tokens ordered by falling z, then rising id, so the
filters together are one cut (z, id), found from the maxima of small groups without sorting a row. g <= -log(u), and
the bits of float(x) are a piecewise linear lower bound of log2(x), so one multiply-add bounds the score of a token
from its random word x and the logarithms are taken only where a token may still win. Sums run over fixed groups in a
fixed order: no result depends on the number of threads or on other rows.
Letters: M output rows, V vocabulary, G groups of a row, C chunks of a row.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from headrace.kernels.cpu_runtime import FAST_SUMS, exp_f32, njit_parallel, njit_serial, pointer, use_torch_threads
from headrace.kernels.draw.reference import Drawn, DrawParams

_GROUP = 64  # tokens under one maximum
_CHUNK = 4096  # tokens of one task: 16 KiB of logits
_NOISE = 1024  # tokens whose random words are made at once
_GROUPS_OF_CHUNK = _CHUNK // _GROUP
_BUCKETS = 1024
_SORT_BELOW = 192
# Below this many logits a second thread costs more to wake than it saves.
_SERIAL_BELOW = 24_576

_F0, _F1, _HALF = np.float32(0.0), np.float32(1.0), np.float32(0.5)
_LOWEST = np.float32(-3.4028235e38)
_INF = np.float32(np.inf)
_TWO_TO_MINUS_32 = np.float32(2.0**-32)
_U_MAX = np.float32(1.0 - 2.0**-24)
_INF_BITS = np.int32(0x7F800000)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
# -log(x 2^-32) <= ln 2 (159 - bits / 2^23) for the bits of float(x).
_BOUND_AT_ZERO = np.float32(159.0 * math.log(2.0))
_BOUND_PER_BIT = np.float32(math.log(2.0) / 2**23)
# Room for the rounding of bounds and scores, which are below 30 in size where it matters.
_SLACK = np.float32(2e-3)
_LARGEST_RATE = np.float32(1e37)


@numba.njit(forceinline=True)
def _philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    # Words live in the low halves of uint64 lanes. High halves may hold anything: they are cut before a product.
    low = np.uint64(0xFFFFFFFF)
    product0 = np.uint64(0xD2511F53) * (c0 & low)
    product1 = np.uint64(0xCD9E8D57) * (c2 & low)
    half = np.uint64(32)
    return (product1 >> half) ^ c1 ^ k0, product1, (product0 >> half) ^ c3 ^ k1, product0


@numba.njit(forceinline=True)
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Ten rounds, written out: LLVM vectorises the loop over blocks only when no loop is inside."""
    u64 = np.uint64
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(0x9E3779B9), k1 + u64(0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(2 * 0x9E3779B9), k1 + u64(2 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(3 * 0x9E3779B9), k1 + u64(3 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(4 * 0x9E3779B9), k1 + u64(4 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(5 * 0x9E3779B9), k1 + u64(5 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(6 * 0x9E3779B9), k1 + u64(6 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(7 * 0x9E3779B9), k1 + u64(7 * 0xBB67AE85))
    c0, c1, c2, c3 = _philox_round(c0, c1, c2, c3, k0 + u64(8 * 0x9E3779B9), k1 + u64(8 * 0xBB67AE85))
    return _philox_round(c0, c1, c2, c3, k0 + u64(9 * 0x9E3779B9), k1 + u64(9 * 0xBB67AE85))


@njit_serial()
def _words_of_range(words: Any, first: Any, count: Any, place: Any) -> None:
    """Random words of tokens [first, first + count); `first` is a multiple of 4. `place`: t_out, nth, purpose, key."""
    c0, c1, c2, k0, k1 = place
    block0 = np.uint64(first >> 2)
    for j in range((count + 3) >> 2):
        a, b, c, d = _philox(c0, c1, c2, block0 + np.uint64(j), k0, k1)
        i = np.uintp(4) * np.uintp(j)
        words[i] = np.uint32(a)
        words[i + np.uintp(1)] = np.uint32(b)
        words[i + np.uintp(2)] = np.uint32(c)
        words[i + np.uintp(3)] = np.uint32(d)


@njit_serial()
def _words_of_list(words: Any, ids: Any, count: Any, place: Any) -> None:
    """Random words of the listed tokens."""
    c0, c1, c2, k0, k1 = place
    for jj in range(count):
        j = np.uintp(jj)
        a, b, c, d = _philox(c0, c1, c2, np.uint64(ids[j] >> 2), k0, k1)
        word = ids[j] & 3
        even = c if word & 2 else a
        odd = d if word & 2 else b
        words[j] = np.uint32(odd if word & 1 else even)


@njit_serial()
def _gumbel(word: Any) -> Any:
    u = min((np.float32(word) + _HALF) * _TWO_TO_MINUS_32, _U_MAX)
    return -np.float32(math.log(-np.float32(math.log1p(-u))))


@njit_serial()
def _bound(z: Any, word: Any) -> Any:
    """Upper bound of z + g, up to `_SLACK`."""
    return z + (_BOUND_AT_ZERO - np.float32(np.float32(word).view(np.int32)) * _BOUND_PER_BIT)


@njit_serial()
def _row_place(stream_2: Any, t_out: Any, nth: Any, purpose: Any) -> Any:
    u32, u64 = np.uint32, np.uint64
    return u64(u32(t_out)), u64(u32(nth)), u64(u32(purpose)), u64(u32(stream_2[0])), u64(u32(stream_2[1]))


@njit_serial()
def _word_of(token: Any, place: Any) -> Any:
    c0, c1, c2, k0, k1 = place
    a, b, c, d = _philox(c0, c1, c2, np.uint64(token >> 2), k0, k1)
    word = token & 3
    return np.uint32((d if word & 1 else c) if word & 2 else (b if word & 1 else a))


@njit_serial()
def _maxima(x: Any, top_g: Any) -> Any:
    """Maximum of each group and of the chunk; the second result tells whether the chunk holds NaN or +inf.

    Floats are compared as integers in float order, which vectorises without promising the absence of NaN.
    """
    bits = x.view(np.int32)
    largest = np.int32(-0x7FFFFFFF)
    magnitude = np.int32(0)
    for g in range(top_g.shape[0]):
        top = np.int32(-0x80000000)
        for i in range(g * _GROUP, min((g + 1) * _GROUP, bits.shape[0])):
            b = bits[i]
            magnitude = max(magnitude, np.int32(b & _MAGNITUDE_BITS))
            top = max(top, np.int32(b ^ ((b >> np.int32(31)) & _MAGNITUDE_BITS)))
        top_g[g] = np.int32(top ^ ((top >> np.int32(31)) & _MAGNITUDE_BITS)).view(np.float32)
        largest = max(largest, top)
    bad = magnitude > _INF_BITS or largest >= _INF_BITS
    return np.int32(largest ^ ((largest >> np.int32(31)) & _MAGNITUDE_BITS)).view(np.float32), bad


@njit_serial(fastmath=FAST_SUMS)
def _sum_group(x: Any, shift: Any, rate: Any) -> Any:
    total = _F0
    for i in range(x.shape[0]):
        total += exp_f32((x[i] - shift) * rate)
    return total


@njit_serial()
def _sum_exp(x: Any, shift: Any, rate: Any) -> Any:
    """Sum of exp((x - shift) * rate): groups in float32, their sums in float64, which keeps errors near 1e-7."""
    total = 0.0
    for first in range(0, x.shape[0], _GROUP):
        total += np.float64(_sum_group(x[first : min(first + _GROUP, x.shape[0])], shift, rate))
    return total


@njit_serial()
def _combine(max_c: Any, sum_c: Any, rate: Any) -> Any:
    """Maximum of a row, and sum of exp((x - max) * rate), from those of its chunks."""
    top = max_c[0]
    for c in range(1, max_c.shape[0]):
        top = max(top, max_c[c])
    total = 0.0
    if top > -_INF and top < _INF:
        for c in range(max_c.shape[0]):
            if max_c[c] > -_INF:
                total += sum_c[c] * math.exp((np.float64(max_c[c]) - np.float64(top)) * rate)
    return top, total


@njit_serial()
def _collect(x: Any, top_g: Any, shift: Any, temperature: Any, bound: Any) -> Any:
    """Ids (ascending) and z of the tokens with z >= bound; bound is finite."""
    room = 0
    for g in range(top_g.shape[0]):
        if (top_g[g] - shift) / temperature >= bound:
            room += _GROUP
    ids = np.empty(room, np.int32)
    z = np.empty(room, np.float32)
    n = 0
    for g in range(top_g.shape[0]):
        if (top_g[g] - shift) / temperature >= bound:
            for i in range(g * _GROUP, min((g + 1) * _GROUP, x.shape[0])):
                value = (x[i] - shift) / temperature
                ids[n] = i
                z[n] = value
                n += value >= bound
    return ids[:n], z[:n]


@njit_serial()
def _walk(ids: Any, z: Any, by_mass: Any, below: Any, target: Any) -> Any:
    """Walks tokens in order to the one at which the sum reaches the target; the last one if none does."""
    i = 0
    total = below + (np.float64(exp_f32(z[0])) if by_mass else 1.0)
    while i + 1 < ids.shape[0] and total < target:
        i += 1
        total += np.float64(exp_f32(z[i])) if by_mass else 1.0
    return z[i], ids[i]


@njit_serial()
def _cut(ids: Any, z: Any, by_mass: Any, target: Any) -> Any:
    """Last (z, id) of the shortest prefix whose mass, or count, reaches the target; ids ascend within equal z.

    Radix selection: bucket by z, keep the bucket in which the sum crosses, repeat until it is small or all equal.
    """
    below = 0.0
    while True:
        high, low = z.max(), z.min()
        if high == low:
            return _walk(ids, z, by_mass, below, target)
        if z.shape[0] <= _SORT_BELOW:
            order = np.argsort(-z, kind="mergesort")
            return _walk(ids[order], z[order], by_mass, below, target)
        scale = _BUCKETS / (np.float64(high) - np.float64(low))
        bucket = np.empty(z.shape[0], np.int32)
        mass = np.zeros(_BUCKETS, np.float64)
        for i in range(z.shape[0]):
            b = min(np.int32((np.float64(high) - np.float64(z[i])) * scale), np.int32(_BUCKETS - 1))
            bucket[i] = b
            mass[b] += np.float64(exp_f32(z[i])) if by_mass else 1.0
        crossing = 0
        while crossing < _BUCKETS - 1 and below + mass[crossing] < target:
            below += mass[crossing]
            crossing += 1
        inside = np.empty(z.shape[0], np.int32)
        n = 0
        for i in range(z.shape[0]):
            inside[n] = i
            n += bucket[i] == crossing
        ids, z = ids[inside[:n]], z[inside[:n]]


@njit_serial()
def _keep(ids: Any, z: Any, cut_z: Any, cut_id: Any) -> Any:
    """The part of a list on this side of the cut, in place."""
    n = 0
    for i in range(ids.shape[0]):
        token, value = ids[i], z[i]
        ids[n] = token
        z[n] = value
        n += (value > cut_z) | ((value == cut_z) & (token <= cut_id))
    return ids[:n], z[:n]


@njit_serial()
def _list_mass(z: Any) -> Any:
    total = 0.0
    for i in range(z.shape[0]):
        total += np.float64(exp_f32(z[i]))
    return total


@njit_serial()
def _survivors(x: Any, top_g: Any, shift: Any, mass: Any, params: Any) -> Any:
    """Survivors of a filtered row: ids ascending, z, and their mass. `mass` is that of the row where it is needed."""
    temperature, top_k, top_p, min_p = params
    bound = np.float32(math.log(min(np.float64(min_p), 1.0))) if min_p > _F0 else _LOWEST
    if top_k > 0 and top_k <= top_g.shape[0]:
        # At least k tokens reach the k-th largest maximum, so nothing below it can be among the first k.
        kth = np.partition(top_g, top_g.shape[0] - top_k)[top_g.shape[0] - top_k]
        bound = max(bound, (kth - shift) / temperature)
    listed = min_p > _F0 or top_k > 0
    if not listed:
        # Tokens below this bound hold less than 1 - top_p together; 0.01 is room for the rounding of the mass.
        bound = max(bound, np.float32(math.log((1.0 - np.float64(top_p)) * mass / x.shape[0]) - 0.01))
    ids, z = _collect(x, top_g, shift, temperature, bound)
    if top_k > 0 and top_k < ids.shape[0]:
        cut_z, cut_id = _cut(ids, z, False, np.float64(top_k))
        ids, z = _keep(ids, z, cut_z, cut_id)
    if listed:
        mass = _list_mass(z)
    if top_p < _F1:
        cut_z, cut_id = _cut(ids, z, True, np.float64(top_p) * mass)
        ids, z = _keep(ids, z, cut_z, cut_id)
        mass = _list_mass(z)
    return ids, z, mass


@njit_serial()
def _best_of_list(ids: Any, z: Any, place: Any, best: Any, best_id: Any) -> Any:
    """Winner among listed survivors and the given one."""
    words = np.empty(_NOISE, np.uint32)
    for first in range(0, ids.shape[0], _NOISE):
        count = min(_NOISE, ids.shape[0] - first)
        _words_of_list(words, ids[first : first + count], count, place)
        for i in range(count):
            value = z[first + i]
            if _bound(value, words[i]) >= best - _SLACK:
                score = value + _gumbel(words[i])
                token = ids[first + i]
                if score > best or (score == best and token < best_id):
                    best, best_id = score, token
    return best, best_id


@njit_serial(fastmath={"contract"})
def _any_above(x: Any, words: Any, shift: Any, rate: Any, best: Any) -> Any:
    """Whether the score of any token of a group may reach `best`. A loop without branches."""
    found = np.int32(0)
    least = best - _SLACK
    for i in range(x.shape[0]):
        found |= np.int32(_bound((x[i] - shift) * rate, words[i]) >= least)
    return found != 0


@njit_serial()
def _best_of_chunk(x: Any, first: Any, shift: Any, temperature: Any, place: Any, best: Any, best_id: Any) -> Any:
    """Winner among the tokens of an unfiltered chunk, whose first id is `first`, and the given one."""
    words = np.empty(_NOISE, np.uint32)
    rate = min(_F1 / temperature, _LARGEST_RATE)
    for start in range(0, x.shape[0], _NOISE):
        _words_of_range(words, first + start, min(_NOISE, x.shape[0] - start), place)
        for low in range(start, min(start + _NOISE, x.shape[0]), _GROUP):
            high = min(low + _GROUP, x.shape[0])
            if not _any_above(x[low:high], words[low - start : high - start], shift, rate, best):
                continue
            for i in range(low, high):
                value = (x[i] - shift) / temperature
                word = words[i - start]
                if _bound(value, word) >= best - _SLACK:
                    score = value + _gumbel(word)
                    if score > best or (score == best and first + i < best_id):
                        best, best_id = score, first + i
    return best, best_id


@njit_serial()
def _first_at(x: Any, top_g: Any, top: Any) -> Any:
    """Lowest id whose logit is the row's maximum."""
    g = 0
    while top_g[g] != top:
        g += 1
    i = g * _GROUP
    while x[i] != top:
        i += 1
    return i


@njit_serial()
def _scan_chunk(x: Any, raw: Any, separate: Any, top_g: Any, raw_top_g: Any, temperature: Any, listed: Any) -> Any:
    """Of one chunk: maximum, the same of the model's logits, badness, their sum of exponentials, the tempered sum."""
    top, bad = _maxima(x, top_g)
    raw_top = top
    if separate:
        raw_top, raw_bad = _maxima(raw, raw_top_g)
        bad = bad or raw_bad
    raw_sum = tempered_sum = 0.0
    # A list of survivors gives its own mass, and greedy rows need none.
    tempered = temperature > _F0 and not listed and (separate or temperature != _F1)
    if not bad:
        # One call for both sums, so that both are compiled alike and equal inputs give equal bits.
        for which in range(2):
            source, shift = (raw, raw_top) if which == 0 else (x, top)
            if shift > -_INF and (which == 0 or tempered):
                rate = _F1 if which == 0 else min(_F1 / temperature, _LARGEST_RATE)
                total = _sum_exp(source, shift, rate)
                raw_sum, tempered_sum = (total, tempered_sum) if which == 0 else (raw_sum, total)
    return top, raw_top, bad, raw_sum, tempered_sum


@njit_serial()
def _open_row(x: Any, top_g: Any, chunks: Any, separate: Any, params: Any, place: Any) -> Any:
    """Everything of a row that is not a pass over all its tokens. Filtered and greedy rows end here.

    Returns id (-1: bad row), score, whether chunks have yet to compete, shift, mass, log-sum-exp of the model's logits.
    """
    max_c, raw_max_c, bad_c, raw_sum_c, tempered_sum_c = chunks
    temperature, top_k, top_p, min_p = params
    raw_top, raw_sum = _combine(raw_max_c, raw_sum_c, 1.0)
    shift, mass = raw_top, raw_sum
    if separate or temperature != _F1:
        shift, mass = _combine(max_c, tempered_sum_c, 1.0 / max(np.float64(temperature), 1e-37))
    if bad_c.any() or not (shift > -_INF and raw_top > -_INF):
        return -1, _F0, False, shift, mass, np.nan
    lse = np.float64(raw_top) + math.log(raw_sum)
    token = _first_at(x, top_g, shift)
    if temperature <= _F0:
        return token, _F0, False, shift, mass, lse
    best = _gumbel(_word_of(token, place))
    if top_k <= 0 and min_p <= _F0 and top_p >= _F1:
        return token, best, True, shift, mass, lse
    ids, z, mass = _survivors(x, top_g, shift, mass, params)
    best, token = _best_of_list(ids, z, place, best, token)
    return token, best, False, shift, mass, lse


@njit_serial()
def _log_probs(token: Any, x: Any, raw: Any, temperature: Any, shift: Any, mass: Any, lse: Any) -> Any:
    """logp_raw and logp_draw of the drawn token."""
    if token < 0:
        return np.nan, np.nan
    logp_draw = np.float64((x[token] - shift) / temperature) - math.log(mass) if temperature > _F0 else 0.0
    return np.float64(raw[token]) - lse, logp_draw


@njit_parallel()
def _draw_rows(rows: Any, vocab: Any, purpose: Any, logits: Any, raw: Any, inputs: Any, outputs: Any) -> None:
    """All arguments from `logits` on are addresses; `raw` equals `logits` where the model's logits are the same."""
    separate = raw != logits
    logits_mv = carray(pointer(logits), (rows, vocab), np.float32)
    raw_mv = carray(pointer(raw), (rows, vocab), np.float32)
    temperature_m = carray(pointer(inputs[0]), (rows,), np.float32)
    top_k_m = carray(pointer(inputs[1]), (rows,), np.int32)
    top_p_m = carray(pointer(inputs[2]), (rows,), np.float32)
    min_p_m = carray(pointer(inputs[3]), (rows,), np.float32)
    stream_m2 = carray(pointer(inputs[4]), (rows, 2), np.int32)
    t_out_m = carray(pointer(inputs[5]), (rows,), np.int32)
    nth_m = carray(pointer(inputs[6]), (rows,), np.int32)
    id_m = carray(pointer(outputs), (rows,), np.int32)
    logp_raw_m, logp_draw_m, lse_m = carray(pointer(outputs + 4 * rows), (3, rows), np.float32)
    n_groups = (vocab + _GROUP - 1) // _GROUP
    n_chunks = (vocab + _CHUNK - 1) // _CHUNK

    top_mg = np.empty((rows, n_groups), np.float32)
    raw_top_mg = np.empty((rows if separate else 1, n_groups), np.float32)
    max_mc = np.empty((rows, n_chunks), np.float32)
    raw_max_mc = np.empty((rows, n_chunks), np.float32)
    bad_mc = np.empty((rows, n_chunks), np.bool_)
    raw_sum_mc = np.empty((rows, n_chunks), np.float64)
    tempered_sum_mc = np.empty((rows, n_chunks), np.float64)
    for task in numba.prange(rows * n_chunks):
        m, c = task // n_chunks, task % n_chunks
        tokens = slice(c * _CHUNK, min((c + 1) * _CHUNK, vocab))
        groups = slice(c * _GROUPS_OF_CHUNK, min((c + 1) * _GROUPS_OF_CHUNK, n_groups))
        max_mc[m, c], raw_max_mc[m, c], bad_mc[m, c], raw_sum_mc[m, c], tempered_sum_mc[m, c] = _scan_chunk(
            logits_mv[m, tokens],
            raw_mv[m, tokens],
            separate,
            top_mg[m, groups],
            raw_top_mg[m if separate else 0, groups],
            temperature_m[m],
            top_k_m[m] > 0 or min_p_m[m] > _F0,
        )

    shift_m = np.empty(rows, np.float32)
    mass_m = np.empty(rows, np.float64)
    lse64_m = np.empty(rows, np.float64)
    best_m = np.empty(rows, np.float32)
    by_chunk_m = np.empty(rows, np.bool_)
    for m in numba.prange(rows):
        chunks = (max_mc[m], raw_max_mc[m], bad_mc[m], raw_sum_mc[m], tempered_sum_mc[m])
        params = (temperature_m[m], top_k_m[m], top_p_m[m], min_p_m[m])
        place = _row_place(stream_m2[m], t_out_m[m], nth_m[m], purpose)
        id_m[m], best_m[m], by_chunk_m[m], shift_m[m], mass_m[m], lse64_m[m] = _open_row(
            logits_mv[m], top_mg[m], chunks, separate, params, place
        )

    if by_chunk_m.any():
        best_mc = np.empty((rows, n_chunks), np.float32)
        id_mc = np.empty((rows, n_chunks), np.int32)
        for task in numba.prange(rows * n_chunks):
            m, c = task // n_chunks, task % n_chunks
            if by_chunk_m[m]:
                place = _row_place(stream_m2[m], t_out_m[m], nth_m[m], purpose)
                x = logits_mv[m, c * _CHUNK : min((c + 1) * _CHUNK, vocab)]
                best_mc[m, c], id_mc[m, c] = _best_of_chunk(
                    x, c * _CHUNK, shift_m[m], temperature_m[m], place, best_m[m], id_m[m]
                )
        for task in range(rows * n_chunks):
            m, c = task // n_chunks, task % n_chunks
            if by_chunk_m[m] and (best_mc[m, c] > best_m[m] or (best_mc[m, c] == best_m[m] and id_mc[m, c] < id_m[m])):
                best_m[m], id_m[m] = best_mc[m, c], id_mc[m, c]

    for m in range(rows):
        lse_m[m] = lse64_m[m]
        logp_raw_m[m], logp_draw_m[m] = _log_probs(
            id_m[m], logits_mv[m], raw_mv[m], temperature_m[m], shift_m[m], mass_m[m], lse64_m[m]
        )


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.contiguous() if tensor.dtype is dtype else tensor.to(dtype).contiguous()


def draw_cpu(
    logits_MV: Tensor,
    params: DrawParams,
    stream_M2: Tensor,
    t_out_M: Tensor,
    *,
    raw_MV: Tensor | None = None,
    nth: int | Tensor = 0,
    purpose: int = 0,
) -> Drawn:
    """See `headrace.kernels.draw.draw`, which has checked the shapes. float32 logits on the CPU."""
    rows, vocab = logits_MV.shape
    f32, i32 = torch.float32, torch.int32
    logits_MV = _plain(logits_MV, f32)
    raw_MV = logits_MV if raw_MV is None else _plain(raw_MV, f32)
    inputs = (
        _plain(params.temperature_M, f32),
        _plain(params.top_k_M, i32),
        _plain(params.top_p_M, f32),
        _plain(params.min_p_M, f32),
        _plain(stream_M2, i32),
        _plain(t_out_M, i32),
        _plain(nth, i32) if isinstance(nth, Tensor) else torch.full((rows,), nth, dtype=i32),
    )
    out_4M = torch.empty((4, rows), dtype=f32)
    use_torch_threads(1 if rows * vocab < _SERIAL_BELOW else None)
    addresses = tuple([x.data_ptr() for x in inputs])
    _draw_rows(rows, vocab, purpose, logits_MV.data_ptr(), raw_MV.data_ptr(), addresses, out_4M.data_ptr())
    id_M, logp_raw_M, logp_draw_M, lse_M = out_4M.unbind()
    return Drawn(id_M.view(i32), logp_raw_M, logp_draw_M, lse_M)
