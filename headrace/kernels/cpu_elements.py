"""What the compiled row kernels share: tensors by address, and bfloat16 as the upper half of a float32.

A tensor comes as an address and `like`, a numpy array that carries its element type: uint16 stands for bfloat16.
Numbers are float32 in between. Rounding to bfloat16 is to nearest, ties to even, as torch does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, overload

from headrace.kernels.cpu_runtime import njit_serial, use_torch_threads

LIKE: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.zeros(1, np.float32),
    torch.bfloat16: np.zeros(1, np.uint16),
}
"""`like` of each type of `cpu_types.TYPES`."""


def shares_of(work: int, serial_below: int, rows: int) -> int:
    """In how many parts to do `work` elements in `rows` rows; numba is ready to run them side by side."""
    return 1 if work < serial_below else min(use_torch_threads(), rows)


def _emit_pointer(typing_context: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like.dtype)

    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(address, like), code


_pointer: Any = intrinsic(_emit_pointer)


def _emit_apart(typing_context: Any) -> Any:
    def code(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), code


apart: Any = intrinsic(_emit_apart)
"""Keeps the function that calls it out of its callers; compiled only.

Inlined into a serial and into a parallel loop, the same sum may be cut into vector lanes in two ways.
"""


@njit_serial()
def vector(address: Any, offset: Any, size: Any, like: Any) -> Any:
    """`size` elements from element `offset` on."""
    return carray(_pointer(address + offset * like.itemsize, like), (size,))


def widen(x: Any) -> Any:
    """An element as a float32; compiled only."""
    raise NotImplementedError


@overload(widen, strict=False)
def _compile_widen(x: Any) -> Any:
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


def narrow(x: Any, like: Any) -> Any:
    """The float32 x as an element; compiled only."""
    raise NotImplementedError


@overload(narrow, strict=False)
def _compile_narrow(x: Any, like: Any) -> Any:
    if like.dtype == types.uint16:
        return lambda x, like: _round_to_bfloat16(x)
    return lambda x, like: x


@njit_serial()
def _round_to_bfloat16(x: Any) -> Any:
    bits = np.float32(x).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(rounded if x == x else np.uint32(0x7FC0))
