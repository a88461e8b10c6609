"""The contract of an evictor: when a request gives slots of its cache back, and which.

An evictor decides and moves nothing: it says at which token index the cache is compacted next and scores the slots of
each cell (one key/value head of one layer); the cache manager keeps the best ones and releases the rest. Both answers
depend on the request alone - its length, its parameters, its keys - and never on steps, neighbours or pages, so the
same request keeps the same slots in every schedule. Keys keep the rotation of their true position.

Two clocks: `n_done` counts tokens, the length of a cell counts slots. Slots of a cell always stand in the order of
their tokens, so the first slots are the oldest that are left.

Letters: L layers of a group, K key/value heads, n slots before, m slots after a compaction, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headrace.config import EngineConfig
from headrace.errors import ConfigError, RequestError
from headrace.registry import Registry
from headrace.step import FAR, LayerState

Unit = Literal["request", "layer", "cell"]
UNITS: tuple[Unit, ...] = ("request", "layer", "cell")
"""How finely lengths may differ, coarsest first: one length a request, one a layer, one a key/value head."""


class Cells(NamedTuple):
    """The slots of one group of layers that are to be scored."""

    layers: tuple[int, ...]
    kv_heads: int
    n: int
    """Slots of each cell now."""
    budget: int
    """The request's budget."""
    keys: Callable[[], Tensor]
    """Reads the keys, [L, K, n, D], slots in the order of their tokens."""
    device: torch.device


class Evictor(ABC):
    """Bounds the cache of requests. All methods are pure; only `score` touches the device."""

    group: Unit = "request"
    """Lengths may differ between these units; what is kept may differ from cell to cell in any case."""
    evicts = True
    """False: everything is kept, and there is no budget."""

    def __init__(self, interval: int) -> None:
        """`interval`: tokens from one compaction to the next."""
        self.interval = interval

    @property
    @abstractmethod
    def least_budget(self) -> int:
        """Slots below which the method makes no sense."""

    def reserve(self, prompt_len: int, limit: int, budget: int) -> int:
        """Slots a cell needs at most, for a request that never knows more than `limit` tokens."""
        return min(limit, budget + self.interval)

    def next_trigger(self, prompt_len: int, n_done: int, budget: int) -> int:
        """Token index, greater than `n_done`, at which the cache is compacted next.

        The first is budget + interval, for prompts too: a long one is compacted while it is evaluated.
        """
        return budget + self.interval * max(1, (n_done - budget) // self.interval + 1)

    def keep_len(self, layers: Sequence[int], n: int, budget: int) -> int:
        """Slots that each cell of a group of layers keeps of its `n`. Other than `budget` only by group."""
        return min(n, budget)

    @abstractmethod
    def score(self, cells: Cells) -> Tensor:
        """fp32, [L, K, n] or anything that broadcasts to it: the best are kept, among equals the oldest.

        +inf: kept in any case; -inf: kept only if nothing else is left. A cell's scores depend on its own keys, never
        on those of other cells: with several ranks, a rank sees the cells of its own heads.
        """


EVICTORS: Registry[Evictor] = Registry("evictor", "evictor")


def select(score: Tensor, cells: Cells, m: int) -> Tensor:
    """The best `m` slots of each cell in the order of their tokens, int64 [L, K, m]."""
    score_LKn = score.expand(len(cells.layers), cells.kv_heads, cells.n)
    return score_LKn.sort(dim=2, descending=True, stable=True).indices[:, :, :m].sort(dim=2).values


def load_evictors(config: EngineConfig, states: Sequence[LayerState]) -> dict[str, Evictor]:
    """The evictors of an engine by name, the default of requests first, the one that keeps everything always.

    Raises ConfigError for unknown names, for what the model's layers do not allow, and for a budget that is missing
    or fits none.
    """
    whole = next(part.name for part in EVICTORS if not part.make(config.cache_interval).evicts)
    names = list(dict.fromkeys([*(name.strip() for name in config.evictor.split(",")), whole]))
    loaded = {name: EVICTORS[name].make(config.cache_interval) for name in names}
    evicting = {name: evictor for name, evictor in loaded.items() if evictor.evicts}
    for name, evictor in evicting.items():
        if evictor.group == "cell":
            raise ConfigError(
                f"evictor={name!r} needs a length for each key/value head; attention reads one for each layer: "
                "choose an evictor with one length a request or a layer"
            )
        if any(state.window for state in states):
            raise ConfigError(
                f"evictor={name!r} moves slots, but the model has sliding-window layers, where a slot's place is its "
                f"token's index: use evictor={whole!r}; pages behind the window are freed without it"
            )
        if config.cache_budget is not None and config.cache_budget < evictor.least_budget:
            raise ConfigError(
                f"cache_budget is {config.cache_budget}; evictor={name!r} needs at least {evictor.least_budget}: "
                "raise it"
            )
    if config.cache_budget is not None and not evicting:
        raise ConfigError(
            f"cache_budget is {config.cache_budget}, but evictor={config.evictor!r} keeps everything: "
            f"leave it out, or load one of {', '.join(name for name in EVICTORS.names() if name != whole)}"
        )
    if config.cache_budget is None and loaded[names[0]].evicts:
        raise ConfigError(f"evictor={names[0]!r} needs cache_budget, the slots that a request keeps: give it")
    return loaded


def finest(evictors: Sequence[Evictor]) -> Unit:
    """The finest unit that one of them asks for."""
    return max((evictor.group for evictor in evictors), key=UNITS.index)


def budget_of(
    evictors: dict[str, Evictor], name: str | None, asked: int | None, default: int | None
) -> tuple[str, int]:
    """Evictor and budget of a request that asks for them (None: the engine's). Budget 0: everything is kept.

    Raises RequestError for an evictor that is not loaded and for a budget that is missing, too small, or pointless.
    """
    name = name or next(iter(evictors))
    if name not in evictors:
        raise RequestError(
            f"evictor={name!r} is not loaded; this engine has {', '.join(evictors)}: name it in its evictor option"
        )
    evictor = evictors[name]
    if not evictor.evicts:
        if asked is not None:
            raise RequestError(
                f"cache_budget is {asked}, but evictor={name!r} keeps everything: leave it out, or ask for another "
                "evictor"
            )
        return name, 0
    budget = default if asked is None else asked
    if budget is None:
        raise RequestError(f"evictor={name!r} needs cache_budget, the slots that the request keeps: give it")
    if budget < evictor.least_budget:
        raise RequestError(
            f"cache_budget is {budget}; evictor={name!r} needs at least {evictor.least_budget}: raise it"
        )
    if budget + evictor.interval > FAR:
        raise RequestError(f"cache_budget is {budget}; it must be at most {FAR - evictor.interval}: lower it")
    return name, budget
