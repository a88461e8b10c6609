"""Ranks: one engine in several processes, each of which holds a share of every layer.

All ranks run the same engine on the same commands; only the layers are split (tensor parallelism after Megatron-LM,
arXiv 1909.08053). An engine knows its `Ranks` and no other process: what differs from process to process (seconds, free
memory) goes through `agree` or `least` before anything is decided by it, and methods that change an engine from outside
are marked `command`. One process is a `Ranks` too, the default, for which all of this is nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor

from headrace.errors import ConfigError

T = TypeVar("T")
P = ParamSpec("P")


class Share(NamedTuple):
    """A rank's share of something that is cut into equal parts, e.g. of the heads of a layer."""

    size: int
    """How many this rank has."""
    parts: int
    """Into how many parts the whole is cut; fewer than ranks where several hold the same part."""


class Led(Protocol):
    """What ranks need of an engine."""

    @property
    def ranks(self) -> Ranks:
        """Those it runs on."""

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""

    def digest(self, result: Any) -> int:
        """A number of what a command returned and of how the books stand: the same on every rank."""


E = TypeVar("E", bound=Led)


class Ranks:
    """One process that holds everything. Several are a subclass (`headrace.team`)."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def all_reduce_(self, x: Tensor) -> None:
        """Sum x over the ranks, in place; every rank gets the same bits. On a GPU nothing waits for the device."""

    def meet(self, nbytes: int, seconds: float) -> None:
        """This rank has its share of the model, so many bytes after so many seconds. Waits until all have theirs."""

    def agree(self, value: T) -> T:
        """What rank 0 has measured or chosen, on every rank."""
        return value

    def least(self, value: int) -> int:
        """The smallest value of any rank. Waits for all of them."""
        return value

    def witness(self, x: Tensor) -> None:
        """Note the bits of a tensor that must be the same on all ranks; they are compared after the step."""

    def run(self, engine: E, method: Callable[Concatenate[E, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a command on every rank. Raises what it raises, or EngineDeadError if a rank has ended."""
        return method(engine, *args, **kwargs)

    def failed(self, error: BaseException) -> BaseException:
        """An engine could not be started or went wrong: end the ranks. Returns what the caller has to be told."""
        return error

    def shutdown(self) -> None:
        """End the other ranks. A second call does nothing."""

    def share(self, count: int, what: str) -> Share:
        """This rank's share of `count` equal things. Raises ConfigError, naming them, unless they can be divided."""
        if count % self.size:
            raise ConfigError(
                f"tensor_parallel_size is {self.size}, and the model has {what} = {count}, which cannot be divided by "
                f"it: choose a divisor of {count}"
            )
        return Share(count // self.size, self.size)

    def share_or_copy(self, count: int, what: str) -> Share:
        """The same; where there are fewer things than ranks, neighbours hold the same one."""
        if count >= self.size or self.size % count:
            return self.share(count, what)
        return Share(1, count)


ONE = Ranks()
"""The only process there is."""


def command(method: Callable[Concatenate[E, P], T]) -> Callable[Concatenate[E, P], T]:
    """A method that changes an engine from outside: called on rank 0, it runs on every rank, in the same order."""

    @functools.wraps(method)
    def run(engine: E, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return engine.ranks.run(engine, method, *args, **kwargs)

    return cast("Callable[Concatenate[E, P], T]", run)
