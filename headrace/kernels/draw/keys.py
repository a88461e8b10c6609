"""Names of noise streams: one key a sequence, a function of what the request asked for and of nothing else.

key = the first 8 bytes of blake2b(version, seed, sample, length of the branch path, branch path), every number as a
little-endian unsigned 64-bit word. Fixed widths and the length make the encoding one-to-one. Source: RFC 7693.
"""

from __future__ import annotations

import hashlib
import struct

from headrace.errors import RequestError

_VERSION = b"headrace.stream.1"
_MAX_WORD = 2**64 - 1


def stream_key(seed: int, sample: int, branch: tuple[int, ...] = ()) -> tuple[int, int]:
    """Key of the noise of one sample of one request, as the int32 bit patterns of two unsigned words.

    Args:
        seed: the request's seed.
        sample: index among the samples of one prompt.
        branch: path of fork numbers from the sample's root; empty before the first fork.

    Raises:
        RequestError: (a ValueError) a number is negative or needs more than 64 bits.
    """
    named = [("seed", seed), ("sample", sample), *((f"branch[{i}]", step) for i, step in enumerate(branch))]
    for name, value in named:
        if not 0 <= value <= _MAX_WORD:
            raise RequestError(
                f"{name} is {value}; the limit is 0 to {_MAX_WORD} (64 bits): choose a number in that range"
            )
    words = struct.pack(f"<{3 + len(branch)}Q", seed, sample, len(branch), *branch)
    first, second = struct.unpack_from("<2i", hashlib.blake2b(_VERSION + words).digest())
    return first, second
