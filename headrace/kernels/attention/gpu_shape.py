"""How a step's attention is cut for a GPU: lines and slots of a block, splits, warps. The one place to tune.

Everything follows from the shapes of tensors, the heads and the chip, never from lengths, so that a captured graph
stays right whatever its tables hold later.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.kernels.attention.reference import FEW_ROWS
from headrace.kernels.gpu_sizes import next_power

PROGRAMS_A_PROCESSOR = 3
"""Programs to have ready for each multiprocessor before slots are no longer split, if their number is one for all."""
MIN_SPLIT_SLOTS = 128
"""Slots of the longest possible context that a split is made for."""
LEAST_SLOTS = 128
"""Slots of a request that a split is made for, where requests have few rows."""
MAX_SPLITS = 128
"""Above it, merging costs more than the splits save."""
MAX_BLOCK_N = 128
PROMPT_ROWS = FEW_ROWS
"""Rows a request, on average, from which a step counts as prompts: these take the largest tile."""
QUERY_BYTES = 2**16
"""Bytes of the queries of a tile."""
PARITY_LINES = 16
"""Lines of every tile in parity, a power of two from 16 on. Decode fills a few of them, prompts all: fewer lines make
decoding faster, more make prompts faster."""
PARITY_SPLITS = 4
"""Splits of every context in parity, a power of two."""
SMALLEST_DOT = 16
"""Smallest side of a matrix product."""
JOINED_PARTS = 16
"""Results of splits that are read at once where they are joined."""
JOINED_LINES = 4


class Limits(NamedTuple):
    """What a kernel's programs are made of."""

    block_bytes: int
    """Bytes of keys in a block of slots: 2**14 are 64 slots of 128 numbers in 16 bits."""
    n_warps: int
    n_stages: int
    """Blocks in flight from memory, plus one, at most."""
    sharing: int
    """Programs that are to share a multiprocessor, so that one computes while the other waits."""


TILES = Limits(2**14, 4, 3, 2)
"""Of `gpu_kernel.attend_tiles`."""
STREAMS = Limits(2**13, 4, 4, 1)
"""Of `gpu_kernel_few.attend_few`, where there are requests enough to fill the chip."""
WIDE_STREAMS = Limits(2**14, 4, 4, 1)
"""Where there are not."""
STREAMS_AT_ONCE, WIDE_STREAMS_AT_ONCE, PROMPTS_AT_ONCE = 4, 2, 1
"""Items that share a multiprocessor: by their shared memory, and fewer by none of their registers."""
PARITY_STREAM = STREAMS
"""In parity, for any number of requests."""


class Heads(NamedTuple):
    """The heads of a layer."""

    group: int
    """Query heads a key/value head."""
    kv_heads: int
    size: int
    v_size: int
    itemsize: int
    """Bytes of an element."""


class Chip(NamedTuple):
    """What of a GPU the cut depends on."""

    processors: int
    shared_bytes: int
    """Shared memory that one program may take."""


class Stream(NamedTuple):
    """How a step is cut for `gpu_kernel_few.attend_few`, with heads of one kind."""

    tile_rows: int
    block_m: int
    block_n: int
    """These three as in `Shape`."""
    n_items: int
    """The most tiles and splits that there can be."""
    n_parts: int
    """Of these the most whose results are joined."""
    room: int
    """Items that run at once, for one key/value head."""
    least: int
    """Blocks that a split is made for."""
    splits: int
    """Of every tile, a power of two; 0: as its blocks ask for."""
    most_splits: int
    """Of a tile, a power of two."""
    least_rows: int
    """Rows of a request, below which it is left to another pass."""
    most_rows: int
    """Rows of a request, above which it is left to another pass, as are the rows behind the last one; 0: none is."""
    n_warps: int
    n_stages: int


class Shape(NamedTuple):
    """How a step is cut for heads of one kind."""

    tile_rows: int
    """Most rows of a tile."""
    block_m: int
    """Lines of a tile: its rows times the query heads of a key/value head, padded to a power of two."""
    block_n: int
    """Slots of a block, a power of two."""
    n_tiles: int
    n_splits: int
    """A power of two."""
    n_warps: int
    n_stages: int
    """Blocks in flight from memory, plus one."""


def padded(size: int) -> int:
    """The width of a head of `size` numbers in a matrix product."""
    return max(next_power(size), SMALLEST_DOT)


def choose_shape(
    n_rows: int,
    n_reqs: int,
    max_slots: int,
    heads: Heads,
    chip: Chip,
    limits: Limits = TILES,
    *,
    prompts: bool = False,
) -> Shape:
    """The cut of a step of `n_rows` rows of `n_reqs` requests, padding included, over at most `max_slots` slots.

    `prompts`: the requests that this is for are prompts, whatever the average.
    """
    widths = padded(heads.size), padded(heads.v_size)
    rows_a_request = PROMPT_ROWS if prompts else -(-n_rows // max(n_reqs, 1))
    block_m = _lines(rows_a_request, heads, max(widths))
    tile_rows = block_m // heads.group
    # Without tensor cores the operands of a product stand in registers, and larger blocks spill.
    key_bytes = limits.block_bytes // 2 if heads.itemsize > 2 else limits.block_bytes
    block_n = min(max(key_bytes // (max(widths) * heads.itemsize), SMALLEST_DOT), MAX_BLOCK_N)
    # Every request may end in a tile that is not full; the last term is for the rows behind the last request.
    n_tiles = n_rows // tile_rows + n_reqs + 1
    busy = max(-(-n_rows // tile_rows), min(n_reqs, n_rows), 1) * heads.kv_heads
    wanted = chip.processors * PROGRAMS_A_PROCESSOR // busy
    most = max(1, min(wanted, max_slots // max(MIN_SPLIT_SLOTS, block_n), MAX_SPLITS))
    wide = block_m >= 128
    # A wide tile hides its own waits.
    room = chip.shared_bytes if wide else chip.shared_bytes // limits.sharing
    room -= block_m * (widths[0] * heads.itemsize + block_n * 4)
    n_stages = room // (block_n * sum(widths) * heads.itemsize)
    return Shape(
        tile_rows=tile_rows,
        block_m=block_m,
        block_n=block_n,
        n_tiles=n_tiles,
        n_splits=next_power(most + 1) // 2,
        n_warps=8 if wide else limits.n_warps,
        n_stages=min(max(n_stages, 1), limits.n_stages),
    )


def fixed_shape(n_rows: int, n_reqs: int, heads: Heads, chip: Chip, limits: Limits = TILES) -> Shape:
    """The cut of a step in which a row's bits may not follow from the other rows.

    One form of tile for one row as for thousands: lanes of sums and the kind of matrix instruction are then the same.
    Blocks of slots begin at absolute multiples, and how they are dealt out to splits follows from no length. What is
    chosen besides, stages, changes no bit.
    """
    usual = choose_shape(n_rows, n_reqs, 1, heads, chip, limits)
    lines = PARITY_LINES if heads.itemsize <= 2 and padded(max(heads.size, heads.v_size)) <= 256 else SMALLEST_DOT
    block_m = max(lines, next_power(heads.group))
    tile_rows = block_m // heads.group
    widths = padded(heads.size) + padded(heads.v_size)
    room = chip.shared_bytes // 2 - block_m * (padded(heads.size) * heads.itemsize + usual.block_n * 4)
    return Shape(
        tile_rows=tile_rows,
        block_m=block_m,
        block_n=usual.block_n,
        n_tiles=n_rows // tile_rows + n_reqs + 1,
        n_splits=PARITY_SPLITS,
        n_warps=PARITY_STREAM.n_warps,
        n_stages=min(max(room // (usual.block_n * widths * heads.itemsize), 1), PARITY_STREAM.n_stages),
    )


def fixed_stream(n_rows: int, n_reqs: int, heads: Heads, chip: Chip) -> Stream:
    """The same for the kernel of few rows, which then takes all rows that are joined."""
    shape = fixed_shape(n_rows, n_reqs, heads, chip, PARITY_STREAM)
    items = shape.n_tiles * shape.n_splits
    stream = _stream(shape, items, 1, 1, shape.n_splits)
    return stream._replace(n_parts=items, splits=shape.n_splits)


def choose_stream(n_rows: int, n_reqs: int, max_slots: int, heads: Heads, chip: Chip) -> Stream:
    """The cut for the kernel of few rows a request."""
    fills = min(n_reqs, n_rows) * heads.kv_heads >= chip.processors * 2
    limits, at_once = (STREAMS, STREAMS_AT_ONCE) if fills else (WIDE_STREAMS, WIDE_STREAMS_AT_ONCE)
    shape = choose_shape(n_rows, n_reqs, max_slots, heads, chip, limits)
    room = max(chip.processors * at_once // heads.kv_heads, 1)
    return _stream(shape, shape.n_tiles, room, LEAST_SLOTS, _most_splits(max_slots))


def stream_of_prompts(shape: Shape, max_slots: int, heads: Heads, chip: Chip) -> Stream:
    """The cut for the same kernel with the tiles of prompts, where there may be so few that slots have to be split."""
    room = max(chip.processors * PROMPTS_AT_ONCE // heads.kv_heads, 1)
    return _stream(shape, shape.n_tiles, room, LEAST_SLOTS, _most_splits(max_slots))


def _most_splits(max_slots: int) -> int:
    most = max(1, min(max_slots // MIN_SPLIT_SLOTS, MAX_SPLITS))
    return next_power(most + 1) // 2


def _most_parts(n_tiles: int, room: int) -> int:
    """Of `room` splits dealt out once, and once more among the tiles of the last round, if there is more than one."""
    return room if n_tiles <= room else 2 * room


def _stream(shape: Shape, n_tiles: int, room: int, least_slots: int, most_splits: int) -> Stream:
    parts = _most_parts(n_tiles, room)
    items = min(n_tiles + parts, n_tiles * most_splits)
    return Stream(
        tile_rows=shape.tile_rows,
        block_m=shape.block_m,
        block_n=shape.block_n,
        n_items=items,
        n_parts=min(items, parts),
        room=room,
        least=max(least_slots // shape.block_n, 1),
        splits=0,
        most_splits=most_splits,
        least_rows=0,
        most_rows=0,
        n_warps=shape.n_warps,
        n_stages=shape.n_stages,
    )


def parts_of_group(heads: Heads) -> int:
    """In how many parts the query heads of a key/value head are dealt with: their queries have to fit into a tile.

    Latent attention has one key/value head, wide and for all query heads.
    """
    lines = max(QUERY_BYTES // (padded(heads.size) * heads.itemsize), SMALLEST_DOT)
    return next(n for n in range(1, heads.group + 1) if heads.group % n == 0 and next_power(heads.group // n) <= lines)


def rows_beside_prompts(shape: Shape, n_reqs: int, heads: Heads) -> Shape | None:
    """The cut for requests with few rows in a step that is cut for prompts, one tile each; None: nothing to gain.

    A tile of prompts takes as long for one row as for all of its rows.
    """
    lines = _lines(1, heads, max(padded(heads.size), padded(heads.v_size)))
    if shape.block_m <= lines or n_reqs < 2 or shape.n_splits > 1:
        return None
    return shape._replace(
        tile_rows=lines // heads.group,
        block_m=lines,
        n_tiles=n_reqs,
        n_splits=1,
        n_warps=TILES.n_warps,
    )


def stream_beside_prompts(shape: Shape, n_reqs: int, max_slots: int, heads: Heads, chip: Chip) -> Stream | None:
    """The same for the kernel of few rows, where all rows are joined."""
    stream = choose_stream(n_reqs, n_reqs, max_slots, heads, chip)
    if shape.block_m <= stream.block_m or n_reqs < 2:
        return None
    parts = _most_parts(n_reqs, stream.room)
    items = min(n_reqs + parts, n_reqs * stream.most_splits)
    return stream._replace(n_items=items, n_parts=min(items, parts), most_rows=stream.tile_rows)


def _lines(rows_a_request: int, heads: Heads, width: int) -> int:
    """Lines of a tile, whole groups of at least one row."""
    if heads.itemsize > 2:
        most = SMALLEST_DOT  # exact float32 has no tensor cores
    else:
        most = 128 if width <= 128 else 64 if width <= 256 else SMALLEST_DOT
    lines = most if rows_a_request >= PROMPT_ROWS else min(next_power(rows_a_request * heads.group), most)
    return max(lines, next_power(heads.group), SMALLEST_DOT)
