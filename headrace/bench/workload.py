"""Seeded workloads, so that every engine measured gets the same requests."""

from __future__ import annotations

import random
from typing import NamedTuple


class Work(NamedTuple):
    """One request: prompt token ids and the number of tokens to generate."""

    prompt_ids: list[int]
    output_tokens: int


def uniform(count: int, low: int, high: int, vocab_size: int, seed: int = 0) -> list[Work]:
    """Prompt and output lengths uniform in [low, high], random token ids."""
    rng = random.Random(seed)
    return [
        Work([rng.randrange(10, vocab_size) for _ in range(rng.randint(low, high))], rng.randint(low, high))
        for _ in range(count)
    ]


def fixed(count: int, prompt_tokens: int, output_tokens: int, vocab_size: int, seed: int = 1) -> list[Work]:
    """Prompts and outputs of one length, random token ids."""
    rng = random.Random(seed)
    return [Work([rng.randrange(10, vocab_size) for _ in range(prompt_tokens)], output_tokens) for _ in range(count)]
