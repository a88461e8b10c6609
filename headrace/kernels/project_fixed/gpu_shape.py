"""How a product with a fixed order of sums is cut for a GPU. The one place to tune.

What a result depends on is `splits` and the kind of matrix instruction, and neither may follow from the number of rows:

- Splits follow from the weight's shape. Split s sums its inputs in rising order, 16 a matrix instruction, and the sums
  of the splits are added in rising order, whether one program makes them all or each is made by one of its own.
- In 16 bits a tile has 64 rows a group of four warps, so that the compiler takes the instruction of warp groups (wgmma,
  64 rows) for one row as for thousands. Fewer rows would go to the one of single warps, which may add in another way.
  Blocks of outputs and inputs change nothing in the order.
- float32 has no tensor cores here: each result is one chain of multiply-adds, whatever the tile.

Letters: R rows, E inputs, N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

GRAIN_E = 128
"""Splits begin at multiples of this, and every block of inputs divides it."""
FEW_ROWS = 256
"""Rows up to which splits are programs of their own; above, tiles of rows fill the chip."""
WANTED = 128
"""Programs to have for few rows: about one a processor. A number of its own, so that results follow from no chip."""
MAX_SPLITS = 8
FEW_BLOCK_N = 64
"""Outputs of a program for few rows of 16-bit numbers. Splits follow from it, so it changes bits."""
EXACT_BLOCK_N = 32
"""The same in float32, for any number of rows."""
AHEAD_E = 256
"""See `Shape.ahead_e`; for few rows of 16-bit numbers."""
MIN_SPLIT_E = 256
"""Inputs that a split is made for."""


class Shape(NamedTuple):
    """How a product is cut."""

    block_r: int
    block_n: int
    block_e: int
    splits: int
    apart: bool
    """Each split is a program of its own."""
    n_warps: int
    n_stages: int
    """Tiles in flight from memory, plus one."""
    ahead_e: int = 0
    """Inputs, of every output, that a program asks the L2 cache for before it waits for the kernel before it: none, or
    a power of two from 64 on."""
    group_r: int = 8
    """Blocks of rows that go over the outputs together, so that their inputs stay in the L2 cache."""


def choose_splits(outputs: int, inputs: int, itemsize: int) -> int:
    """Splits of the inputs, from the weight alone: enough programs for few rows, a power of two."""
    blocks = -(-outputs // (FEW_BLOCK_N if itemsize <= 2 else EXACT_BLOCK_N))
    splits = 1
    while blocks * splits * 2 <= WANTED * 5 // 4 and splits < MAX_SPLITS and inputs >= 2 * splits * MIN_SPLIT_E:
        splits *= 2
    return splits


def choose_shape(rows: int, outputs: int, inputs: int, itemsize: int) -> Shape:
    """The cut of a product."""
    splits = choose_splits(outputs, inputs, itemsize)
    apart = splits > 1 and rows <= FEW_ROWS
    if itemsize > 2:
        return Shape(32, EXACT_BLOCK_N, 32, splits, apart, 4, 3)
    if rows <= FEW_ROWS:
        return Shape(64, FEW_BLOCK_N, 128, splits, apart, 4, 5, AHEAD_E if inputs >= AHEAD_E else 0)
    # A program has one sum at a time in registers, and with splits the sum of the splits besides.
    return Shape(128, 256, 64, 1, False, 8, 3) if splits == 1 else Shape(128, 128, 64, splits, False, 8, 4)
