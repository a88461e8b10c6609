"""Time of work on a GPU without the host: captured in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch


def replay_us(call: Callable[[], object], seconds: float) -> float:
    """Microseconds of a call, captured in a graph and replayed for about `seconds`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay_ms(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    replay_ms(3)
    count = max(3, int(seconds * 1e3 / max(replay_ms(3) / 3, 1e-3)))
    return replay_ms(count) / count * 1e3
