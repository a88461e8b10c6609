"""When streams may send: all of them together, some times a second.

A stream that sends each token by itself wakes this process and its reader for every one of them, on cores that the
engine's threads wait on each other for. So those that have sent something wait for a common moment.
"""

from __future__ import annotations

import asyncio


class Pace:
    """Common moments, `n_streams / chunks_per_s` seconds apart; 0: no waiting."""

    def __init__(self, chunks_per_s: float) -> None:
        self._rate = chunks_per_s
        self.n_streams = 0
        self._waiting: list[asyncio.Future[None]] = []
        self._last_s = 0.0

    @property
    def interval_s(self) -> float:
        """Seconds from one moment to the next."""
        return self.n_streams / self._rate if self._rate else 0.0

    async def pause(self) -> None:
        """Until the next moment."""
        interval_s = self.interval_s
        if not interval_s:
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_at(max(self._last_s + interval_s, loop.time()), self._tick)
        await turn

    def _tick(self) -> None:
        self._last_s = asyncio.get_running_loop().time()
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
