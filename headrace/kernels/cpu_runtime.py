"""What every compiled CPU kernel shares: numba decorators, the thread count, and a float32 exp that vectorises.

The OpenMP layer is chosen before numba's first parallel call: a kernel starts in 6 microseconds under it, and in 70
under `workqueue` (two cores), which is also unsafe when several Python threads call kernels at once. A process that
forks after a kernel ran must `exec`.

exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, exp(r) by a polynomial that interpolates at Chebyshev nodes.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core import cgutils, types
from numba.extending import intrinsic

log = logging.getLogger("headrace")


def _choose_layer() -> tuple[str | None, int]:
    """numba's threading layer (None: leave its choice) and the most threads that make sense under it.

    The OpenMP layer asks for the system's libgomp by its full file name, and minimal systems lack it: torch's own
    copy has another name. One thread is then faster than two under `workqueue`.
    """
    if sys.platform != "linux" or "NUMBA_THREADING_LAYER" in os.environ:
        return None, 2**30
    try:
        ctypes.CDLL("libgomp.so.1.0.0")
    except OSError:
        log.warning("libgomp is not installed, so attention and the draw run on one thread: apt install libgomp1")
        return "workqueue", 1
    return "omp", 2**30


_config: Any = numba.config  # its attributes are made at run time
_LAYER, _MOST_THREADS = _choose_layer()
if _LAYER is not None:
    _config.THREADING_LAYER = _LAYER

# What this module last told numba, by Python thread: asking numba costs ten times as much as remembering.
_given = threading.local()

# Sums may be reordered into vector lanes and multiply-adds fused. NaN, infinities and the sign of zero keep their
# meaning: a kernel has to see a NaN that the model produced.
FAST_SUMS = {"reassoc", "contract", "nsz"}


def njit_parallel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for a kernel with `prange` loops: compiled once, cached on disk, releases the interpreter lock.

    Call `use_torch_threads()` before the kernel. Keyword options are numba's, e.g. `fastmath=FAST_SUMS`.
    numba's disk cache watches the kernel's own file only: clear `__pycache__` after editing a function inlined from
    another file.
    """
    return numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy", **options)


def njit_serial(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator for a function called from kernels, or a kernel too small to share out. See `njit_parallel`."""
    return numba.njit(cache=True, nogil=True, error_model="numpy", **options)


def use_torch_threads(limit: int | None = None) -> int:
    """Give numba torch's number of threads, at most `limit`, in the calling thread; returns that number.

    Costs about a microsecond. Work of a few tens of microseconds is done sooner by one thread (`limit=1`): it wakes
    no other.
    """
    wanted = torch.get_num_threads()
    threads: int = min(wanted, _config.NUMBA_NUM_THREADS, _MOST_THREADS, limit or wanted)
    if getattr(_given, "threads", 0) == threads:
        return threads
    numba.set_num_threads(threads)
    _given.threads = threads
    if torch.get_num_threads() != wanted:  # starting numba's OpenMP pool overwrites torch's setting
        torch.set_num_threads(wanted)
    return threads


# Here, because loading a compiled kernel starts the pool too, and then nobody knows what torch's setting was.
use_torch_threads()


def _pointer(typing_context: Any, address: Any) -> Any:
    """For compiled code: a pointer from an integer address, as `carray` takes it.

    A kernel that takes `tensor.data_ptr()` starts half a microsecond sooner per tensor than one that takes arrays:
    that is what `Tensor.numpy()` and unpacking an array cost. The caller keeps the tensors alive, contiguous and of
    the dtype that the kernel expects.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


pointer: Any = intrinsic(_pointer)

_LOG2_E = np.float32(math.log2(math.e))
# ln 2 in two parts; the high part has 12 significant bits, so that n * _LN2_HIGH is exact for |n| <= 2048.
_LN2_HIGH = np.float32(math.floor(math.log(2.0) * 4096.0) / 4096.0)
_LN2_LOW = np.float32(math.log(2.0) - math.floor(math.log(2.0) * 4096.0) / 4096.0)
_EXP_LOWEST = np.float32(-87.3)
_EXP_HIGHEST = np.float32(88.3)
_EXP_MAGIC = np.float32(1.5 * 2**23)
_EXP_MAGIC_BITS = np.int32(_EXP_MAGIC.view(np.int32))
# exp(r) = 1 + r + r^2 q(r): coefficients of q, interpolated at five Chebyshev nodes; relative error 1.1e-8.
_Q0 = np.float32(0.5)
_Q1 = np.float32(0.16666576305560635)
_Q2 = np.float32(0.04166655376256849)
_Q3 = np.float32(0.008363292753030686)
_Q4 = np.float32(0.0013926325618039612)


@njit_serial(fastmath={"contract"})
def exp_f32(x: Any) -> Any:
    """exp(x) in float32, relative error below 2e-7, without branches so that loops over it become vector code.

    0 below -87.3 (no subnormal results); NaN gives 0 too, so look for NaN before; inputs above 88.3 count as 88.3.
    exp_f32(0) is exactly 1.
    """
    clamped = x if x > _EXP_LOWEST else _EXP_LOWEST
    clamped = clamped if clamped < _EXP_HIGHEST else _EXP_HIGHEST
    shifted = clamped * _LOG2_E + _EXP_MAGIC  # adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits
    n = shifted - _EXP_MAGIC
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    q = _Q0 + r * (_Q1 + r * (_Q2 + r * (_Q3 + r * _Q4)))
    power = (np.float32(shifted).view(np.int32) - _EXP_MAGIC_BITS + np.int32(127)) << np.int32(23)
    value = (np.float32(1.0) + (r + r * r * q)) * np.int32(power).view(np.float32)
    return value if x > _EXP_LOWEST else np.float32(0.0)
