"""The compiled kernel of paged attention over rows on the CPU: what `cpu.py` gives requests with few rows.

An item is a block of rows of one request, one key/value head and one chunk of slots. Inside, tiles of slots are joined
by online softmax (Milakov & Gimelshein, arXiv 1805.02867), and chunks by their largest score and sum, as in flash
decoding. Tiles and chunks begin at absolute multiples of slots and are joined in ascending order, so a row's bits
depend on its own request only: not on the batch, the number of threads or its neighbours.

Arrays come as addresses: a tensor's address costs 0.1 microseconds a call, a numpy array of it 3. `like` carries an
element type. Letters: see `reference.py`; also N items, T threads, X query heads of a block or rows to join.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, prange, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from headrace.kernels.cpu_runtime import FAST_SUMS, exp_f32, njit_parallel, njit_serial

CHUNK_SLOTS = 256
"""Slots of one item: the unit that threads share."""
TILE_SLOTS = 64
"""Slots whose keys and values stay in the first cache while all query heads of an item read them."""
BLOCK_ROWS = 8
"""Rows of one request that an item serves together."""
AHEAD_SLOTS = 16
"""How far memory is asked for before it is read. Pages lie anywhere, so the processor cannot guess the next one: 0.325
against 0.375 ms for 64 requests of 16 to 256 slots (H 6, K 2, D 64, float32, two cores); 0.335 with 24, 0.35 with 32.
"""
CACHE_LINE_BYTES = 64

_TANH = tuple(np.float32(x) for x in (-1 / 3, 2 / 15, -17 / 315, 62 / 2835))
_TANH_SERIES_BELOW = np.float32(0.3)


def _emit_pointer(typing_context: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like.dtype)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), code


_pointer: Any = intrinsic(_emit_pointer)
"""A pointer to elements of the type of `like`; compiled only."""


@njit_serial()
def _vector(address: Any, offset: Any, size: Any, like: Any) -> Any:
    """`size` elements from `offset` on. Indices into a view are known not to be negative: without that, no vectors."""
    return carray(_pointer(address + offset * like.itemsize, like), (size,))


def _emit_prefetch(typing_context: Any, address: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        call = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        # for reading, to be kept in all caches, data
        builder.call(call, [builder.inttoptr(args[0], byte), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(address), code


_prefetch_line: Any = intrinsic(_emit_prefetch)
"""Ask for the cache line of an address; compiled only."""


@njit_serial()
def _prefetch(address: Any, n_bytes: Any) -> None:
    for line in range(0, n_bytes, CACHE_LINE_BYTES):
        _prefetch_line(address + line)


def _widen(x: Any) -> Any:
    """An element as a number; compiled only."""
    raise NotImplementedError


@overload(_widen, strict=False)
def _compile_widen(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def _exp(x: Any) -> Any:
    """exp(x), NaN for NaN; compiled only."""
    raise NotImplementedError


@overload(_exp, strict=False)
def _compile_exp(x: Any) -> Any:
    if x == types.float32:
        return lambda x: exp_f32(x) if x == x else x
    return lambda x: math.exp(x)


def _tanh(x: Any) -> Any:
    """tanh(x); compiled only. In float32 a series near zero, where 1 - 2 / (exp(2x) + 1) cancels."""
    raise NotImplementedError


@overload(_tanh, strict=False)
def _compile_tanh(x: Any) -> Any:
    if x == types.float32:
        c3, c5, c7, c9 = _TANH
        one, two, near = np.float32(1), np.float32(2), _TANH_SERIES_BELOW

        def tanh_f32(x: Any) -> Any:
            xx = x * x
            series = x + x * xx * (c3 + xx * (c5 + xx * (c7 + xx * c9)))
            return series if abs(x) < near else one - two / (_exp(two * x) + one)

        return tanh_f32
    return lambda x: math.tanh(x)


@njit_serial()
def _list_masked(
    sees: Any, begin: Any, end: Any, pages: Any, page_size: Any, words: Any, place: Any, n: Any
) -> Any:  # fmt: skip
    """List the slots of the second interval whose bits are set, behind the `n` listed before."""
    for slot in range(max(sees[3], begin), min(sees[4], end)):
        j = slot - sees[6]
        word = _vector(words, sees[5] + (j >> 5), 1, sees)[0]
        if (word >> (j & 31)) & 1:
            page = slot // page_size
            place[n] = np.int64(pages[page]) * page_size + slot - page * page_size
            n += 1
    return n


@njit_serial()
def _list_slots(sees: Any, begin: Any, end: Any, pages: Any, page_size: Any, words: Any, place: Any) -> Any:
    """Physical slots that a row sees among [begin, end), padded to a multiple of 4 by repeating the first.

    Then the list begins again, for `AHEAD_SLOTS` entries.
    """
    n = 0
    masked = sees[5] >= 0
    for i in range(1, 3 if masked else 5, 2):
        slot, last = max(sees[i], begin), min(sees[i + 1], end)
        while slot < last:
            page = slot // page_size
            offset = slot - page * page_size
            run = min(page_size - offset, last - slot)
            first = np.int64(pages[page]) * page_size + offset
            for j in range(run):
                place[n + j] = first + j
            n += run
            slot += run
    if masked:
        n = _list_masked(sees, begin, end, pages, page_size, words, place, n)
    padded = (n + 3) // 4 * 4
    for j in range(n, padded):
        place[j] = place[0]
    for j in range(AHEAD_SLOTS):
        place[padded + j] = place[j]
    return n


@njit_serial(fastmath=FAST_SUMS)
def _score(
    q_GD: Any, keys: Any, values: Any, v_bytes: Any, v_slot: Any, like: Any, place: Any, n: Any, s_GT: Any
) -> None:
    """s[g, j] = q_g k_j, for all query heads of a key head while its keys pass by.

    Four slots at a time, so that q is loaded once for them. When the keys end, the first values are asked for.
    """
    size = q_GD.shape[1]
    zero = s_GT.dtype.type(0)
    for j in range(0, n, 4):
        for ahead in range(j + AHEAD_SLOTS, j + AHEAD_SLOTS + 4):
            if ahead < n:
                _prefetch(keys + place[ahead] * size * like.itemsize, size * like.itemsize)
            else:
                _prefetch(values + place[ahead] * v_slot * like.itemsize, v_bytes)
        k0, k1 = _vector(keys, place[j] * size, size, like), _vector(keys, place[j + 1] * size, size, like)
        k2, k3 = _vector(keys, place[j + 2] * size, size, like), _vector(keys, place[j + 3] * size, size, like)
        for g in range(len(q_GD)):
            s0, s1, s2, s3 = zero, zero, zero, zero
            for d in range(size):
                s0 += q_GD[g, d] * _widen(k0[d])
                s1 += q_GD[g, d] * _widen(k1[d])
                s2 += q_GD[g, d] * _widen(k2[d])
                s3 += q_GD[g, d] * _widen(k3[d])
            s_GT[g, j], s_GT[g, j + 1], s_GT[g, j + 2], s_GT[g, j + 3] = s0, s1, s2, s3


@njit_serial(fastmath={"contract"})
def _cap(s: Any, n: Any, softcap: Any) -> None:
    for j in range(n):
        s[j] = softcap * _tanh(s[j] / softcap)


@njit_serial()
def _largest(s: Any, n: Any) -> Any:
    """The largest of s[:n], n a multiple of 4; four chains, because a chain waits for each comparison."""
    m0, m1, m2, m3 = s[0], s[1], s[2], s[3]
    for j in range(4, n, 4):
        m0 = s[j] if s[j] > m0 else m0
        m1 = s[j + 1] if s[j + 1] > m1 else m1
        m2 = s[j + 2] if s[j + 2] > m2 else m2
        m3 = s[j + 3] if s[j + 3] > m3 else m3
    m0 = m1 if m1 > m0 else m0
    m2 = m3 if m3 > m2 else m2
    return m2 if m2 > m0 else m0


@njit_serial(fastmath={"contract"})
def _exponentiate(s: Any, n: Any, top: Any) -> None:
    # Not among the functions whose sums may be reordered: exp_f32 rounds by adding and subtracting a constant.
    for j in range(n):
        s[j] = _exp(s[j] - top)


@njit_serial(fastmath=FAST_SUMS)
def _sum(s: Any, n: Any) -> Any:
    total = s.dtype.type(0)
    for j in range(n):
        total += s[j]
    return total


@njit_serial(fastmath=FAST_SUMS)
def _add_values(p_GT: Any, values: Any, v_slot: Any, like: Any, place: Any, n: Any, acc_GD: Any) -> None:
    """acc[g] += sum_j p[g, j] v_j, four slots at a time so that acc is loaded and stored once for them."""
    size = acc_GD.shape[1]
    for j in range(0, n, 4):
        for ahead in range(j + AHEAD_SLOTS, min(j + AHEAD_SLOTS + 4, n)):
            _prefetch(values + place[ahead] * v_slot * like.itemsize, size * like.itemsize)
        v0, v1 = _vector(values, place[j] * v_slot, size, like), _vector(values, place[j + 1] * v_slot, size, like)
        v2 = _vector(values, place[j + 2] * v_slot, size, like)
        v3 = _vector(values, place[j + 3] * v_slot, size, like)
        for g in range(len(acc_GD)):
            p0, p1, p2, p3 = p_GT[g, j], p_GT[g, j + 1], p_GT[g, j + 2], p_GT[g, j + 3]
            for d in range(size):
                acc_GD[g, d] += (p0 * _widen(v0[d]) + p1 * _widen(v1[d])) + (p2 * _widen(v2[d]) + p3 * _widen(v3[d]))


@njit_serial()
def _attend_tile(
    q_GD: Any,
    keys: Any,
    values: Any,
    v_slot: Any,
    like: Any,
    place: Any,
    n: Any,
    softcap: Any,
    s_GT: Any,
    state_G2: Any,
    acc_GD: Any,
) -> None:
    """Join the listed slots into the running softmax: state = (largest score, sum of exponentials)."""
    padded = (n + 3) // 4 * 4
    _score(q_GD, keys, values, acc_GD.shape[1] * like.itemsize, v_slot, like, place, padded, s_GT)
    for g in range(len(q_GD)):
        s, state = s_GT[g], state_G2[g]
        if softcap > 0:
            _cap(s, padded, softcap)
        tile_top = _largest(s, padded)  # the padding repeats a score
        top = tile_top if tile_top > state[0] else state[0]
        _exponentiate(s, n, top)
        for j in range(n, padded):
            s[j] = 0
        shrink = _exp(state[0] - top)
        state[0] = top
        state[1] = state[1] * shrink + _sum(s, n)
        if shrink != 1:
            for d in range(acc_GD.shape[1]):
                acc_GD[g, d] *= shrink
    _add_values(s_GT, values, v_slot, like, place, padded, acc_GD)


@njit_serial()
def _finish(acc_D: Any, state: Any, sinks: Any, head: Any, out_D: Any, lses: Any, at: Any) -> None:
    """out = acc / denominator, and its logarithm; the sink joins the denominator of rows that see something."""
    top, total = state[0], state[1]
    factor = state.dtype.type(1)
    if sinks != 0 and total != 0:
        sink = _vector(sinks, head, 1, state)[0]
        if sink > top:
            factor = _exp(top - sink)
            total = total * factor + 1
            top = sink
        else:
            total += _exp(sink - top)
    factor = factor / total if total != 0 else factor * 0
    for d in range(len(acc_D)):
        out_D[d] = acc_D[d] * factor
    if lses != 0:
        _vector(lses, at, 1, state)[0] = top + math.log(total) if total != 0 else -np.inf


@njit_serial()
def _attend_item(
    item: Any, k: Any, io: Any, shape: Any, like: Any, scale: Any, softcap: Any, sees_R7: Any, table_BP: Any,
    q_XD: Any, acc_XD: Any, state_X2: Any, s_GT: Any, place: Any,
) -> None:  # fmt: skip
    """One block of rows, one key/value head, one chunk of slots."""
    q, keys, values, out, lse, sinks, parts, part_states, words = io
    q_row, q_head, k_head, v_head, heads, group, size, v_size, page_size, v_slot = shape
    first, count, begin, end, part = item[0], item[1], item[2], item[3], item[4]
    for r in range(count):
        for g in range(group):
            x = r * group + g
            from_D = _vector(q, (first + r) * q_row + (k * group + g) * q_head, size, like)
            for d in range(size):
                q_XD[x, d] = _widen(from_D[d]) * scale
            for d in range(v_size):
                acc_XD[x, d] = 0
            state_X2[x, 0], state_X2[x, 1] = -np.inf, 0
    keys, values = keys + k * k_head * like.itemsize, values + k * v_head * like.itemsize
    for tile in range(begin, end, TILE_SLOTS):
        for r in range(count):
            sees = sees_R7[first + r]
            n = _list_slots(sees, tile, min(tile + TILE_SLOTS, end), table_BP[sees[0]], page_size, words, place)
            if n > 0:
                x = slice(r * group, r * group + group)
                _attend_tile(q_XD[x], keys, values, v_slot, like, place, n, softcap, s_GT, state_X2[x], acc_XD[x])
    for r in range(count):
        for g in range(group):
            x, head = r * group + g, k * group + g
            if part < 0:
                at = (first + r) * heads + head
                _finish(acc_XD[x], state_X2[x], sinks, head, _vector(out, at * v_size, v_size, acc_XD), lse, at)
            else:
                at = (part + r) * heads + head
                part_D, part_state = _vector(parts, at * v_size, v_size, s_GT), _vector(part_states, at * 2, 2, s_GT)
                for d in range(v_size):
                    part_D[d] = acc_XD[x, d]
                part_state[0], part_state[1] = state_X2[x, 0], state_X2[x, 1]


@njit_serial()
def _join_chunks(join: Any, head: Any, io: Any, shape: Any, acc_D: Any, state: Any) -> None:
    """Join what the chunks of one row and query head found, in ascending order."""
    _, _, _, out, lse, sinks, parts, part_states, _ = io
    heads, v_size = shape[4], shape[7]
    row, first, count, stride = join[0], join[1], join[2], join[3]
    state[0] = -np.inf
    state[1] = 0
    for d in range(v_size):
        acc_D[d] = 0
    for i in range(count):
        top = _vector(part_states, ((first + i * stride) * heads + head) * 2, 2, acc_D)[0]
        if not top <= state[0]:  # NaN counts as larger: it must not get lost
            state[0] = top
    for i in range(count):
        at = (first + i * stride) * heads + head
        part = _vector(part_states, at * 2, 2, acc_D)
        if part[1] != 0:
            weight = _exp(part[0] - state[0])
            state[1] += part[1] * weight
            part_D = _vector(parts, at * v_size, v_size, acc_D)
            for d in range(v_size):
                acc_D[d] += part_D[d] * weight
    at = row * heads + head
    _finish(acc_D, state, sinks, head, _vector(out, at * v_size, v_size, acc_D), lse, at)


@njit_parallel()
def attend_narrow(
    io: Any, shape: Any, like: Any, acc_like: Any, scale: Any, softcap: Any, sees_R7: Any, table_BP: Any,
    items_N5: Any, joins_X4: Any, bounds_T1: Any,
) -> None:  # fmt: skip
    """All items; thread t computes those in [bounds[t], bounds[t + 1]), counted by item and key/value head."""
    heads, group, size, v_size = shape[4], shape[5], shape[6], shape[7]
    kv_heads = heads // group
    scale, softcap = acc_like.dtype.type(scale), acc_like.dtype.type(softcap)
    for t in prange(len(bounds_T1) - 1):
        q_XD = np.empty((BLOCK_ROWS * group, size), acc_like.dtype)
        acc_XD = np.empty((BLOCK_ROWS * group, v_size), acc_like.dtype)
        state_X2 = np.empty((BLOCK_ROWS * group, 2), acc_like.dtype)
        s_GT = np.empty((group, TILE_SLOTS), acc_like.dtype)
        place = np.empty(TILE_SLOTS + AHEAD_SLOTS, np.int64)
        for unit in range(bounds_T1[t], bounds_T1[t + 1]):
            _attend_item(
                items_N5[unit // kv_heads], unit % kv_heads, io, shape, like, scale, softcap, sees_R7, table_BP,
                q_XD, acc_XD, state_X2, s_GT, place,
            )  # fmt: skip
    if len(joins_X4) > 0:
        acc_D, state = np.empty(v_size, acc_like.dtype), np.empty(2, acc_like.dtype)
        for i in range(len(joins_X4)):
            for head in range(heads):
                _join_chunks(joins_X4[i], head, io, shape, acc_D, state)


@njit_serial()
def write_rows(k: Any, v: Any, keys: Any, values: Any, places: Any, shape: Any, like: Any, place_like: Any) -> None:
    """Copy the rows' keys and values to their places."""
    rows, kv_heads, k_row, k_step, v_row, v_step, k_head, v_head, size, v_size, v_slot = shape
    place_R = _vector(places, 0, rows, place_like)
    for head in range(kv_heads):
        for row in range(rows):
            to = _vector(keys, head * k_head + place_R[row] * size, size, like)
            source = _vector(k, row * k_row + head * k_step, size, like)
            for d in range(size):
                to[d] = source[d]
            to = _vector(values, head * v_head + place_R[row] * v_slot, v_size, like)
            source = _vector(v, row * v_row + head * v_step, v_size, like)
            for d in range(v_size):
                to[d] = source[d]
