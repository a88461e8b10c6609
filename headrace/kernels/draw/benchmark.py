"""Time of `draw` on the CPU against the usual torch way, per filter, on logits shaped like those of a language model.

The torch way is softmax and `torch.multinomial`, after `topk` or `sort` and a masked softmax where a filter asks for
it; greedy is `argmax`. `ratio` compares it with `draw` when it delivers the token alone; `ratio_same_result` when it
also takes the token's log-probability and the log-sum-exp, which `draw` always returns. Above 1, `draw` is faster.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from headrace.kernels.draw import DrawParams, draw

# name: temperature, top-k, top-p, min-p
FILTERS: dict[str, tuple[float, int, float, float]] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-k 50": (0.8, 50, 1.0, 0.0),
    "top-p 0.95": (0.8, 0, 0.95, 0.0),
    "min-p 0.05": (0.8, 0, 1.0, 0.05),
    "top-k 50 + top-p 0.95": (0.8, 50, 0.95, 0.0),
}


def torch_tokens(logits_MV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Tokens [M] by the usual torch calls; one setting for all rows."""
    if temperature == 0.0:
        return logits_MV.argmax(-1)
    scaled_MV = logits_MV / temperature
    ids_MV = None
    if top_k > 0:
        scaled_MV, ids_MV = scaled_MV.topk(top_k, dim=-1)
    elif top_p < 1.0:
        scaled_MV, ids_MV = scaled_MV.sort(dim=-1, descending=True)
    p_MV = scaled_MV.softmax(-1)
    if min_p > 0.0:
        p_MV = p_MV.masked_fill_(p_MV < min_p * p_MV.amax(-1, keepdim=True), 0.0)
    if top_p < 1.0:
        p_MV = p_MV.masked_fill_(p_MV.cumsum(-1) - p_MV >= top_p, 0.0)
    drawn_M1 = p_MV.multinomial(1)
    return (drawn_M1 if ids_MV is None else ids_MV.gather(1, drawn_M1))[:, 0]


def _torch_result(
    logits_MV: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with log-probability under the model's logits and their log-sum-exp."""
    id_M = torch_tokens(logits_MV, temperature, top_k, top_p, min_p)
    lse_M = logits_MV.logsumexp(-1)
    return id_M, logits_MV.gather(1, id_M[:, None])[:, 0] - lse_M, lse_M


def _fastest_s(calls: list[Callable[[], object]], budget_s: float) -> list[float]:
    """Shortest time of each call: what the work takes when no other process has the cores. The calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def _measure(
    logits_MV: Tensor, stream_M2: Tensor, setting: tuple[float, int, float, float], budget_s: float
) -> dict[str, float]:
    """Microseconds of one filter, and the ratios."""
    temperature, top_k, top_p, min_p = setting
    rows = logits_MV.shape[0]
    t_out_M = torch.arange(rows, dtype=torch.int32)
    params = DrawParams(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
    )
    ours_s, tokens_s, result_s = _fastest_s(
        [
            lambda: draw(logits_MV, params, stream_M2, t_out_M),
            lambda: torch_tokens(logits_MV, *setting),
            lambda: _torch_result(logits_MV, *setting),
        ],
        budget_s,
    )
    return {
        "draw_us": round(ours_s * 1e6, 1),
        "torch_us": round(tokens_s * 1e6, 1),
        "ratio": round(tokens_s / ours_s, 2),
        "ratio_same_result": round(result_s / ours_s, 2),
    }


def benchmark(
    rows: Iterable[int] = (1, 8, 64), vocab: Iterable[int] = (8192, 151936), budget_s: float = 0.5
) -> list[dict[str, Any]]:
    """One entry for each rows x vocabulary x filter: microseconds a call, and ratios above 1 where `draw` is faster.

    Logits are normal with standard deviation 2.5, and about 30 tokens of a row stand out by up to 12.
    """
    generator = torch.Generator().manual_seed(0)
    results: list[dict[str, Any]] = []
    for m, v in itertools.product(rows, vocab):
        logits_MV = torch.randn(m, v, generator=generator) * 2.5
        standout_M30 = torch.randint(0, v, (m, 30), generator=generator)
        logits_MV.scatter_add_(1, standout_M30, torch.rand(m, 30, generator=generator) * 12.0)
        stream_M2 = torch.randint(-(2**31), 2**31, (m, 2), generator=generator).int()
        for name, setting in FILTERS.items():
            results.append({"rows": m, "vocab": v, "filter": name, **_measure(logits_MV, stream_M2, setting, budget_s)})
    return results
