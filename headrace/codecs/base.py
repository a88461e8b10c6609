"""The contract of a codec: what a page of the cache holds, how rows are written to it and how they are read.

A codec describes planes, arrays of pages, by class. Rows are encoded into pages of the first, the open class, and read
back from there like any older key, rows of their own step included: what a row sees does not depend on how a prompt was
cut. A codec may have a second, sealed class: at token indices that depend on nothing but the number of tokens, whole
pages move into it. No step goes past such an index, so each row sees the same tokens sealed in every schedule.

Everything is a function of the keys and values given, slot by slot (sealed: page by page), never of neighbours.

Letters: R rows, K key/value heads, P pages, S slots in a page, D and Dv head sizes; "..." any leading axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.codecs.forms import Form, Gathered
from headrace.config import EngineConfig
from headrace.errors import ConfigError, InvariantError
from headrace.registry import Registry
from headrace.step import FAR, LayerState, PageClass


class Setup(NamedTuple):
    """What a codec is made from."""

    dtype: torch.dtype
    """The model's: what rows bring and what attention reads."""
    page_size: int


class Codec(ABC):
    """Encodes, decodes, and says when pages are sealed. Only tensor methods touch the device."""

    seal_interval = 0
    """Tokens from one sealing to the next; 0: there is no sealed class."""
    seal_behind = 0
    """The last so many tokens stay open when pages are sealed."""
    direct = False
    """Whether the planes are keys and values in the model's type."""
    captures = True
    """Whether `encode` may be recorded and replayed: it waits for nothing, and of the host it reads shapes alone."""

    def __init__(self, setup: Setup) -> None:
        """Raises ConfigError for a model's type or a page size that the codec cannot work with."""
        self.dtype, self.page_size = setup

    @abstractmethod
    def classes(self, state: LayerState) -> Sequence[PageClass]:
        """The open class of a layer's pages, and the sealed one if there is. Planes of the open one are by slot."""

    @abstractmethod
    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        """The entries of rows in the open planes, in their order, [R, K, *shape] each."""

    @abstractmethod
    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values [..., P, S, D], [..., P, S, Dv] in the model's type, contiguous, of pages of a class.

        planes: [..., P, S, *shape] by slot, [..., P, *shape] by page. They may hold anything where nothing was
        written; what is made of that is not read.
        """

    def seal(self, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        """The planes of sealed pages, from those of open ones, [L, K, P, ...] each."""
        raise InvariantError(f"{type(self).__name__} has no sealed pages")

    def form(self, device: torch.device) -> Form:
        """How attention reads this codec's planes on a device; chosen once at start."""
        return Gathered(self)

    def sealed(self, n_tokens: int) -> int:
        """Slots that are sealed when so many are committed, in whole pages."""
        if not self.seal_interval:
            return 0
        last = n_tokens - n_tokens % self.seal_interval
        return max(0, last - self.seal_behind) // self.page_size * self.page_size

    def next_seal(self, n_tokens: int) -> int:
        """Token index behind `n_tokens` at which pages are sealed next."""
        return n_tokens - n_tokens % self.seal_interval + self.seal_interval if self.seal_interval else FAR

    @property
    def open_pages(self) -> int:
        """Most pages of the open class that a request holds, 0 if there is no other."""
        if not self.seal_interval:
            return 0
        return -(-(self.seal_interval + self.seal_behind + self.page_size - 1) // self.page_size)


CODECS: Registry[Codec] = Registry("codec", "codec")


def load_codecs(config: EngineConfig, dtype: torch.dtype, states: Sequence[LayerState]) -> tuple[Codec, Codec]:
    """The codec of the model that decodes, and that of decoders' own models: the model's type.

    Raises ConfigError for an unknown name and for what the model's layers do not allow.
    """
    setup = Setup(dtype, config.page_size)
    codec = CODECS[config.codec].make(setup)
    plain = next(found for part in CODECS if (found := part.make(setup)).direct)
    keeping = [state for state in states if state.kind != "fixed"]
    if not keeping and not codec.direct:
        raise ConfigError(
            f"codec={config.codec!r} changes what pages hold, but no layer of the model keeps pages: leave it out"
        )
    for state in keeping:
        classes = codec.classes(state)
        if any(plane.by_page for plane in classes[0].planes) or len(classes) != 1 + bool(codec.seal_interval):
            raise InvariantError(f"codec {config.codec} has open planes by page, or classes that it never fills")
    if codec.seal_interval and any(state.window for state in states):
        raise ConfigError(
            f"codec={config.codec!r} seals pages, but the model has sliding-window layers, which give theirs back: "
            "use a codec with one class of pages"
        )
    return codec, plain
