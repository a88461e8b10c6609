"""Listing the work of attention on the CPU, compiled: what each row sees, and the items of the kernel.

The same in numpy would take thirty calls a step, longer than a layer's attention over a few short requests.
Letters: see `cpu.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.kernels.attention.cpu_kernel import BLOCK_ROWS, CHUNK_SLOTS, TILE_SLOTS
from headrace.kernels.cpu_runtime import njit_serial

ITEM_SLOTS = 24
"""Slots that cost as much as starting and finishing an item."""


@njit_serial()
def list_seen(rows: Any, bits_R: Any, n_words: Any, lens_B3: Any, kv_len_B: Any, window: Any) -> Any:
    """Slots that each row sees, int32 [R, 7].

    By row: request index; two intervals of slots as [begin, end); the first word of the mask over the second
    interval, or -1; the slot of the mask's first bit.

    `rows` are the columns of AttentionRows up to `reqs_B`; `bits_R` is empty if no row of the step has a mask;
    `n_words` is the length of the table of words; `lens_B3` says first row, number of rows and bound on the slots. A
    row that belongs to no entry of `lens_B3`, or to a request that is not the entry's, sees nothing.

    Raises:
        ValueError: a mask reaches behind the table of words.
    """
    req_R, t_R, a_R, b_R, c_R, _, reqs_B = rows
    sees_R7 = np.zeros((len(req_R), 7), np.int32)
    sees_R7[:, 0] = req_R
    sees_R7[:, 5] = -1
    for entry in range(len(lens_B3)):
        first, count, limit = lens_B3[entry]
        for r in range(first, first + count):
            if req_R[r] != reqs_B[entry]:
                continue
            n = np.int64(kv_len_B[req_R[r]])
            low = max(t_R[r] - window + 1, 0) if window > 0 else 0
            end = min(max(n + a_R[r], 0), limit)
            sees_R7[r, 1] = low
            sees_R7[r, 2] = end
            sees_R7[r, 3] = max(n + b_R[r], low, end)
            sees_R7[r, 4] = min(n + c_R[r], limit)
            if len(bits_R) > 0 and bits_R[r] >= 0:
                sees_R7[r, 5] = bits_R[r]
                sees_R7[r, 6] = n + b_R[r]
                last = sees_R7[r, 4] - 1
                if last >= sees_R7[r, 3] and bits_R[r] + (last - sees_R7[r, 6]) // 32 >= n_words:
                    raise ValueError("a row's mask reaches behind the end of words_W: make the table longer")
    return sees_R7


@njit_serial()
def _range_of(sees_R7: Any, first: Any, count: Any) -> Any:
    """Slots that a block of rows sees, from a tile's beginning; (0, 0) if none."""
    begin, end = np.int64(2**40), np.int64(0)
    for r in range(first, first + count):
        for i in (1, 3):
            low, high = np.int64(sees_R7[r, i]), np.int64(sees_R7[r, i + 1])
            if high > low:
                begin, end = min(begin, low), max(end, high)
    begin = min(begin, end)
    return begin - begin % TILE_SLOTS, end


@njit_serial()
def _chunks_of(begin: Any, end: Any) -> Any:
    """How many chunks lie in a range of slots; a block that sees nothing still has one, which writes its zeros."""
    return max((end + CHUNK_SLOTS - 1) // CHUNK_SLOTS - begin // CHUNK_SLOTS, 1)


@njit_serial()
def list_items(sees_R7: Any, lens_B3: Any, wide_B: Any) -> Any:
    """Cut the rows of requests that are not wide into blocks, and what a block sees into chunks.

    Returns:
        items int64 [N, 5]: first row, rows, begin and end of the slots, first partial result or -1 where the item
        gives the result; joins int64 [X, 4]: row, first partial result, number of them, step from one to the next;
        and the number of partial results.
    """
    n_items = n_joins = n_parts = 0
    for entry in range(len(lens_B3)):
        first, count, _ = lens_B3[entry]
        if not wide_B[entry]:
            for skip in range(0, count, BLOCK_ROWS):
                size = min(count - skip, BLOCK_ROWS)
                begin, end = _range_of(sees_R7, first + skip, size)
                chunks = _chunks_of(begin, end)
                n_items += chunks
                if chunks > 1:
                    n_joins += size
                    n_parts += size * chunks
    items_N5 = np.empty((n_items, 5), np.int64)
    joins_X4 = np.empty((n_joins, 4), np.int64)
    item = join = part = 0
    for entry in range(len(lens_B3)):
        first, count, _ = lens_B3[entry]
        if not wide_B[entry]:
            for skip in range(0, count, BLOCK_ROWS):
                size = min(count - skip, BLOCK_ROWS)
                begin, end = _range_of(sees_R7, first + skip, size)
                chunk, chunks = begin // CHUNK_SLOTS, _chunks_of(begin, end)
                for i in range(chunks):
                    items_N5[item, 0] = first + skip
                    items_N5[item, 1] = size
                    items_N5[item, 2] = max((chunk + i) * CHUNK_SLOTS, begin)
                    items_N5[item, 3] = min((chunk + i + 1) * CHUNK_SLOTS, end)
                    items_N5[item, 4] = part + i * size if chunks > 1 else -1
                    item += 1
                if chunks > 1:
                    for r in range(size):
                        joins_X4[join, 0] = first + skip + r
                        joins_X4[join, 1] = part + r
                        joins_X4[join, 2] = chunks
                        joins_X4[join, 3] = size
                        join += 1
                    part += size * chunks
    return items_N5, joins_X4, n_parts


@njit_serial()
def share_out(items_N5: Any, kv_heads: Any, threads: Any) -> Any:
    """Where the share of each thread begins, int64 [threads + 1], in pairs of item and key/value head, by cost."""
    bounds_T1 = np.zeros(threads + 1, np.int64)
    total = np.int64(0)
    for n in range(len(items_N5)):
        total += kv_heads * ((items_N5[n, 3] - items_N5[n, 2]) * items_N5[n, 1] + ITEM_SLOTS)
    done, unit, share = np.int64(0), 0, 1
    for n in range(len(items_N5)):
        cost = (items_N5[n, 3] - items_N5[n, 2]) * items_N5[n, 1] + ITEM_SLOTS
        for _ in range(kv_heads):
            while share < threads and done >= total * share // threads:
                bounds_T1[share] = unit
                share += 1
            done += cost
            unit += 1
    while share <= threads:
        bounds_T1[share] = unit
        share += 1
    return bounds_T1
