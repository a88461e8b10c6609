"""The contract of a selector: which older pages of its request a row reads.

Nothing is lost from the cache; a row passes over pages, and the next row may read them. Rows of a prompt see
everything. A row behind the prompt, at token index t, chooses among the whole pages in front of base(t), the last
multiple of `interval` that is not behind t, and sees every slot from there on. No step goes past such a multiple, so
these pages are committed whenever the row is evaluated, alone, among drafts or again after a preemption: its choice
depends on its own query and on its request alone. One choice serves all heads of a layer.

Tokens behind the prompt have seen less than a whole prefill of the same text shows them: their cache is never
published.

Letters: X rows that select, H query heads, K key/value heads, T pages at hand, P places of pages, S slots in a page.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from headrace.config import EngineConfig
from headrace.errors import ConfigError
from headrace.registry import Registry
from headrace.step import FAR, LayerState


class Setup(NamedTuple):
    """What a selector is made from."""

    budget: int
    """Older slots (tokens) that a row reads at most, in whole pages; 0: none was given."""
    page_size: int


class Selector(ABC):
    """Scores pages; the best are read."""

    selects = True
    """False: every row reads everything, and there is no budget."""
    interval = 64
    """Tokens from one index at which older pages become subject to selection to the next."""

    def __init__(self, setup: Setup) -> None:
        """Raises ConfigError for a page size that the method cannot work with."""
        self.pages = setup.budget // setup.page_size
        self.page_size = setup.page_size

    @abstractmethod
    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        """Floating-point numbers [X, P]: the best are read, among equals the oldest. A row's depend on its own query
        and pages alone.

        q_XHD: queries. k_KTSD: keys of all pages at hand. page_XP: int64, by row the pages of its request in the order
        of slots, as places in k; what stands behind a row's whole older pages may be anything and is not read.
        """

    def next_base(self, n_tokens: int) -> int:
        """Token index behind `n_tokens` that no step goes past."""
        return n_tokens - n_tokens % self.interval + self.interval if self.selects else FAR


SELECTORS: Registry[Selector] = Registry("selector", "selector")


def load_selector(config: EngineConfig, states: Sequence[LayerState]) -> Selector:
    """The selector of an engine.

    Raises ConfigError for an unknown name, for what the model's layers do not allow, and for a budget that is missing,
    too small or pointless.
    """
    selector = SELECTORS[config.selector].make(Setup(config.selector_budget or 0, config.page_size))
    if not selector.selects:
        if config.selector_budget is not None:
            raise ConfigError(
                f"selector_budget is {config.selector_budget}, but selector={config.selector!r} reads everything: "
                "leave it out, or choose another selector"
            )
        return selector
    if config.selector_budget is None:
        raise ConfigError(
            f"selector={config.selector!r} needs selector_budget, the older slots that a row reads: give it"
        )
    if selector.pages < 1:
        raise ConfigError(
            f"selector_budget is {config.selector_budget}, less than a page of {config.page_size} slots: raise it, or "
            "lower page_size"
        )
    if any(state.window for state in states):
        raise ConfigError(
            f"selector={config.selector!r} reads pages from everywhere, but the model has sliding-window layers, which "
            "see the newest only: leave it out"
        )
    if not any(state.kind == "paged" for state in states):
        raise ConfigError(f"selector={config.selector!r}: no layer of the model keeps pages: leave it out")
    return selector
