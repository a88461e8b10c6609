"""Ranks that are threads of one process: what layers make of their shares, without starting anything."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from headrace.ranks import Ranks

T = TypeVar("T")


class ThreadRanks(Ranks):
    """One of several threads that meet at a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict[int, Tensor]) -> None:
        super().__init__(rank, size)
        self._barrier, self._table = barrier, table
        self.reduced = 0

    def all_reduce_(self, x: Tensor) -> None:
        self.reduced += 1
        self._table[self.rank] = x.clone()
        self._barrier.wait(30)
        x.copy_(sum(self._table[rank] for rank in range(self.size)))  # type: ignore[arg-type]
        self._barrier.wait(30)


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each rank; raises what one of them raised."""
    barrier, table = threading.Barrier(size), dict[int, Tensor]()
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, barrier, table))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [results[rank] for rank in range(size)]
