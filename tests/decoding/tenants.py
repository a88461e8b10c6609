"""Decoders that exist to stretch the seam: drafts by script, a tree, a block, soft rows.

`registered()` puts them into the registry for the time of a test; the engine meets them only by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.decoding.base import DECODERS, Segment
from headrace.decoding.chain import ChainDecoder

_truth: dict[tuple[int, ...], tuple[int, ...]] = {}
"""What plain decoding makes of a prompt: drafters that are always right read it here."""


def teach(prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
    """Tell the scripted drafters how a prompt goes on."""
    _truth[prompt] = output


class _Scripted(ChainDecoder):
    """Drafts from the known continuation, changed by `spoil`."""

    def spoil(self, token: int, place: int) -> int:
        return token

    def room(self, room: int) -> int:
        return room

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        draft_BK = torch.zeros(len(seg.grants), self.most, dtype=torch.int32)
        count_B = torch.zeros(len(seg.grants), dtype=torch.int32)
        for i, index in enumerate(seg.reqs_B.tolist()):
            known = tuple(seg.table.hist[index, : int(seg.table.n_tok[index])].tolist())
            ahead = next(
                (
                    output[len(known) - len(prompt) :]
                    for prompt, output in _truth.items()
                    if (prompt + output)[: len(known)] == known and len(known) >= len(prompt)
                ),
                (),
            )
            drafts = [self.spoil(token, len(known) + k) for k, token in enumerate(ahead)]
            drafts = (drafts + [5] * self.most)[: self.room(int(room_B[i]))][: self.most]
            draft_BK[i, : len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
            count_B[i] = len(drafts)
        return draft_BK, count_B


class AlwaysRight(_Scripted):
    """Every draft is what plain decoding emits; behind its end, drafts go on."""


class AlwaysWrong(_Scripted):
    """No draft is right."""

    def spoil(self, token: int, place: int) -> int:
        return (token + 1) % self.setup.model.config.vocab_size


class SometimesRight(_Scripted):
    """Every third draft is wrong, and the number of drafts changes."""

    def spoil(self, token: int, place: int) -> int:
        return token if place % 3 else (token + 7) % self.setup.model.config.vocab_size

    def room(self, room: int) -> int:
        return max(room - 1, 0)


class OverLong(_Scripted):
    """Ignores how many drafts may still be known: the engine has to clamp."""

    def room(self, room: int) -> int:
        return self.most if room else 0


CHAINS = {
    "test_always_right": AlwaysRight,
    "test_always_wrong": AlwaysWrong,
    "test_sometimes_right": SometimesRight,
    "test_over_long": OverLong,
}


@contextmanager
def registered(*parts: tuple[str, type]) -> Iterator[None]:
    """Register test decoders, and take them out again."""
    for name, kind in parts:
        DECODERS.register(name, label="exact", summary="A decoder of the tests.")(kind)
    try:
        yield
    finally:
        for name, _ in parts:
            DECODERS.remove(name)
