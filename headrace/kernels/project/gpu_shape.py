"""How a product of few rows is cut for a GPU: blocks, splits, warps, stages. The one place to tune.

Such a product is a matter of streaming the weight once, so what counts is how many bytes are on their way at any time:
about 40 KB a processor hide the way to memory. Everything follows from shapes, the element's size and the chip, so a
captured graph stays right. Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.kernels.gpu_sizes import next_power

CHOSEN_ROWS = 0
"""Rows up to which the kernel is chosen before the library's product: none until it has been timed on the chips that it
is for. `benchmark_gpu` shows where it is faster."""
MAX_ROWS = 16
"""Rows above which the library's product runs whatever was chosen; the kernel itself takes up to 64."""
MOST_ROWS = 64
"""Rows that the kernel can take."""
FOLD_NORM_ROWS = 4
"""Rows up to which every program normalises x for itself; above, reading x twice costs more than a launch."""
ROW_FORM_ROWS = 1
"""Rows up to which products are multiplied and summed; above, they go to the tensor cores. At most 1."""
AHEAD_BYTES = 2**15
"""Bytes of weights that a program asks the L2 cache for while the kernel before it still runs."""
CACHE_LINE = 128
"""Bytes."""

# One row: a program holds a tile of weights, the next tile and as many sums in registers.
ROW_TILE_BYTES = 2**14
"""Bytes of a tile of weights; gate and up share it."""
ROW_BLOCK_E = 1024
"""Most inputs of a tile, where there are outputs enough."""
ROW_WIDE_E = 4096
"""Most inputs of a tile, where fewer outputs of a program fill the chip better."""
ROW_SMALL_N = 2
"""Smallest number of results of a program."""
ROW_WARPS = 4
ROW_PROGRAMS = 3
"""Programs to have ready for each processor before inputs are no longer split."""

# Several rows: tiles of weights go through shared memory, one a stage.
TILE_BLOCK_N = 64
TILE_SMALL_N = 16
"""Smallest number of outputs of a program, where there are few outputs."""
TILE_BLOCK_E = 128
TILE_WARPS = 4
TILE_STAGE_BYTES = 6 * 2**14
"""Bytes of all stages of a program: two programs of 64 x 128 tiles in 16 bits share a processor."""
TILE_PROGRAMS = 2
MAX_STAGES = 8
MIN_SPLIT_TILES = 4
"""Tiles of inputs that a split is made for."""
MAX_SPLITS = 16


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
    """The cut of a product of 1 to `MOST_ROWS` rows."""
    results = product.outputs // 2 if product.gated else product.outputs
    if product.rows <= ROW_FORM_ROWS:
        block_e = min(next_power(product.inputs), ROW_BLOCK_E)
        block_n = max(ROW_TILE_BYTES // (block_e * product.itemsize * _weights(product)), 1)
        wanted = chip.processors * ROW_PROGRAMS
        while -(-results // block_n) < wanted and block_n > ROW_SMALL_N:
            block_n //= 2
            block_e = min(2 * block_e, ROW_WIDE_E, next_power(product.inputs))
        n_warps, n_stages = ROW_WARPS, 1
    else:
        block_e = min(max(next_power(product.inputs), 16), TILE_BLOCK_E)
        block_n = TILE_BLOCK_N // _weights(product)
        wanted = chip.processors * TILE_PROGRAMS
        n_warps = TILE_WARPS
        # Narrower blocks fill the chip up to where reading x for each of them costs as much as the weights.
        while -(-results // block_n) < wanted // 2 and block_n > max(TILE_SMALL_N, 2 * product.rows):
            block_n //= 2
        stage = (block_n * _weights(product) + block_rows(product.rows)) * block_e * product.itemsize
        n_stages = max(2, min(min(TILE_STAGE_BYTES, chip.shared_bytes) // stage, MAX_STAGES))
    tiles = -(-product.inputs // block_e)
    splits = 1
    while -(-results // block_n) * splits < wanted and splits < MAX_SPLITS and tiles >= 2 * splits * MIN_SPLIT_TILES:
        splits *= 2
    ahead = AHEAD_BYTES // (block_n * _weights(product) * product.itemsize)
    is_row = product.rows <= ROW_FORM_ROWS
    # The form for one row has its first tile on the way already.
    left = -(-tiles // splits) * block_e - (block_e if is_row else 0)
    return Shape(is_row, block_n, block_e, splits, n_warps, n_stages, min(ahead, left))


def _weights(product: Product) -> int:
    """Tiles of weights that a program reads side by side."""
    return 2 if product.gated else 1
