"""Outputs at random from a compiled constraint, without a model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from headrace.params import SamplingParams
from headrace.sampling.constraints import Constraints
from headrace.sampling.processors import Setup

END = 0
TOKENS = [b"", *(bytes([byte]) for byte in range(1, 256)), b'"a"', b'", "', "é".encode()]
LIKELY = set(b'ab012-.eE+{}[]":,\\truefalsn')
"""Few letters, so that names and values collide often."""
CLOSING = set(b'"}]')


def walk(
    params: SamplingParams,
    rng: random.Random,
    tokens: Sequence[bytes] = TOKENS,
    most: int = 300,
    part: Constraints | None = None,
    texts: Sequence[bytes] | None = None,
) -> bytes | None:
    """One output; None: it did not end in time. Raises RequestError for constraints that are refused.

    texts: what stands for the tokens in the output, special ones included.
    """
    part = part or constraints(tokens)
    part.prepare(params, [END])
    matcher = part._matcher(params, [END])
    mask = torch.zeros(1, -(-len(tokens) // 32), dtype=torch.int32)
    output = b""
    for step in range(most):
        matcher.fill_next_token_bitmask(mask)
        allowed = [token for token in _bits(mask) if token < len(tokens)]
        assert allowed, f"nothing may follow {output!r}"
        if END in allowed and (len(allowed) == 1 or rng.random() < 0.3):
            return output
        allowed = [token for token in allowed if token != END]
        # White space and long texts are not what is looked for.
        visible = [token for token in allowed if tokens[token].strip()] or allowed
        if rng.random() < 0.9:
            visible = [token for token in visible if set(tokens[token]) <= LIKELY] or visible
        closing = [token for token in visible if set(tokens[token]) <= CLOSING]
        chosen = rng.choice(closing if closing and rng.random() < step / 60 else visible)
        assert matcher.accept_token(chosen)
        output += (texts or tokens)[chosen]
    return None


def constraints(tokens: Sequence[bytes] = TOKENS, vocab_size: int | None = None) -> Constraints:
    """The processor over a vocabulary."""
    return Constraints(Setup(vocab_size or len(tokens), torch.device("cpu"), lambda: tokens))


def _bits(mask: torch.Tensor) -> Iterator[int]:
    words: list[Any] = mask[0].tolist()
    return (32 * i + j for i, word in enumerate(words) for j in range(32) if word >> j & 1)
