"""How a product of few rows is cut for a GPU: blocks, splits, warps, stages. The one place to tune.

Such a product is a matter of streaming the weight once, so what counts is how many bytes are on their way at any time:
about 40 KB a processor hide the way to memory. Everything follows from shapes, the element's size and the chip, so a
captured graph stays right. Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.kernels.gpu_sizes import next_power

MAX_ROWS = 16
"""Rows above which the library's product is as fast or faster (an H200, 8 and 64 rows)."""
CHOSEN_ROWS = MAX_ROWS
"""Rows up to which the kernel is chosen before the library's product."""
MOST_ROWS = 64
"""Rows that the kernel can take."""
ROW_FORM_ROWS = 1
"""Rows up to which products are multiplied and summed; above, they go to the tensor cores. At most 1."""
CACHE_LINE = 128
"""Bytes."""

# One row: a program holds a tile of weights, the next tile and as many sums in registers.
ROW_BLOCK_N = 8
"""Results of a program."""
ROW_SMALL_N = 2
"""Smallest number of results of a program, where there are few results."""
ROW_TILE = 2**12
"""Elements of a tile of weights; gate and up share it."""
ROW_WIDE_TILE = 2**13
"""The same where there are few results."""
ROW_WARPS = 4
ROW_PROGRAMS = 2
"""Programs to have for each processor before one takes fewer results."""
ROW_MOST_PROGRAMS = 2**13
"""Programs above which one row goes to the tensor cores, too, whose programs take longer."""
MAX_SPLITS = 16


class TileForm(NamedTuple):
    """How several rows are multiplied: tiles of weights go through shared memory, one a stage."""

    block_n: int
    """Outputs of a program; gates and ups both count."""
    block_e: int
    n_warps: int
    n_stages: int
    programs: float
    """Programs to have for each processor before the inputs are split."""
    split_tiles: int
    """Tiles of inputs that a split is made for."""


STREAM = TileForm(16, 128, 1, 4, 2.5, 8)
"""Many small programs, none of which waits for another warp."""
NARROW = TileForm(32, 256, 4, 7, 0.75, 1)
"""Fewer results than 16 a processor."""
WIDE = TileForm(64, 128, 4, 5, 0.75, 4)
"""Rows above MAX_ROWS."""


class Product(NamedTuple):
    """What is multiplied."""

    rows: int
    outputs: int
    """Of the weight: gates and ups both count."""
    inputs: int
    itemsize: int
    gated: bool = False


class Chip(NamedTuple):
    """What of a GPU the cut depends on."""

    processors: int
    shared_bytes: int
    """Shared memory that one program may take."""


class Shape(NamedTuple):
    """How a product is cut. All blocks are powers of two."""

    is_row: bool
    """Multiply and sum one row; otherwise the tensor cores multiply a tile."""
    block_n: int
    """Results of a program: of a gated product so many gates and so many ups."""
    block_e: int
    """Inputs of a tile."""
    splits: int
    """Programs that share the inputs of a block of results."""
    n_warps: int
    n_stages: int
    """Tiles in flight from memory, plus one. The form for one row always has two tiles in registers."""
    ahead_e: int
    """Inputs, of every result, that a program asks the L2 cache for before it waits for the kernel before it."""


def block_rows(rows: int) -> int:
    """Rows of a tile: the tensor cores take 8 at least."""
    return max(next_power(rows), 8)


def choose_shape(product: Product, chip: Chip) -> Shape:
    """The cut of a product of 1 to `MOST_ROWS` rows. The numbers are from sweeps on an H200; see `benchmark_gpu`."""
    results = product.outputs // 2 if product.gated else product.outputs
    if product.rows <= ROW_FORM_ROWS and results <= ROW_BLOCK_N * ROW_MOST_PROGRAMS:
        return _row_shape(product, results, chip)
    form = WIDE if product.rows > MAX_ROWS else NARROW if results <= 16 * chip.processors else STREAM
    block_n = max(form.block_n // _weights(product), 16)
    block_e = min(max(next_power(product.inputs), 16), form.block_e)
    stage = (block_n * _weights(product) + block_rows(product.rows)) * block_e * product.itemsize
    tiles = -(-product.inputs // block_e)
    blocks = -(-results // block_n)
    splits = 1
    while (
        blocks * splits < chip.processors * form.programs
        and 2 * splits <= MAX_SPLITS
        and tiles >= 2 * splits * form.split_tiles
    ):
        splits *= 2
    ahead = min(block_e, -(-tiles // splits) * block_e)
    n_stages = max(2, min(form.n_stages, chip.shared_bytes // stage))
    return Shape(False, block_n, block_e, splits, form.n_warps, n_stages, ahead)


def _row_shape(product: Product, results: int, chip: Chip) -> Shape:
    block_n, tile = ROW_BLOCK_N, ROW_TILE
    wanted = chip.processors * ROW_PROGRAMS
    if -(-results // block_n) < wanted:
        tile = ROW_WIDE_TILE
        while -(-results // block_n) < wanted and block_n > ROW_SMALL_N:
            block_n //= 2
    block_e = min(next_power(product.inputs), tile // (block_n * _weights(product)))
    return Shape(True, block_n, block_e, 1, ROW_WARPS, 1, 0)


def _weights(product: Product) -> int:
    """Tiles of weights that a program reads side by side."""
    return 2 if product.gated else 1
