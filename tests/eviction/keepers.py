"""Evictors that exist to stretch the seam, and requests alone under an evictor."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from masked import random_model, window_model
from tiny import make_engine, run_all
from torch import Tensor

from headrace.eviction.base import EVICTORS, Cells, Evictor
from headrace.params import SamplingParams
from headrace.request import Request


class Scattered(Evictor):
    """Every cell keeps other slots, from all over the cache, the first ones not excepted."""

    least_budget = 2

    def score(self, cells: Cells) -> Tensor:
        return (cells.keys().double().sum(3) * 1e3).sin().float()


class PerLayer(Evictor):
    """Another budget in each layer, the last tokens in each."""

    group = "layer"
    least_budget = 5

    def keep_len(self, layers: Sequence[int], n: int, budget: int) -> int:
        (layer,) = layers
        return min(n, budget - 2 * (layer % 3))

    def score(self, cells: Cells) -> Tensor:
        return torch.arange(cells.n, dtype=torch.float32, device=cells.device)


KEEPERS = {"test_scattered": Scattered, "test_per_layer": PerLayer}


@contextmanager
def registered(parts: dict[str, type]) -> Iterator[None]:
    """Register test evictors, and take them out again."""
    for name, kind in parts.items():
        EVICTORS.register(name, label="lossy", summary="An evictor of the tests.")(kind)
    try:
        yield
    finally:
        for name in parts:
            EVICTORS.remove(name)


@functools.cache
def _alone(
    prompt: tuple[int, ...], params_key: str, evictors: str, interval: int, window: int
) -> tuple[tuple[int, ...], str | None]:
    params = SamplingParams.from_dict(json.loads(params_key))
    model = window_model(window) if window else random_model()
    engine = make_engine(
        model=model, enable_prefix_caching=False, max_num_seqs=1, evictor=evictors, cache_interval=interval
    )
    (request,) = engine.add(prompt, params, request_id="alone")
    run_all(engine)
    return tuple(request.output_ids), request.finish.reason


def alone_of(
    request: Request, *, evictors: str = "full", interval: int = 128, window: int = 0
) -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of the request when it has an engine for itself, plain, without prefix cache."""
    budget = request.cache_budget or None
    params = {**request.params.to_dict(), "decoder": None, "evictor": request.evictor, "cache_budget": budget}
    prompt = tuple(request.tokens[: request.prompt_len])
    return _alone(prompt, json.dumps(params), evictors, interval, window)
