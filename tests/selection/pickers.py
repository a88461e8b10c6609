"""Selectors that exist to stretch the seam, and the definition that selected reads are compared with.

Letters: X rows that select, H query heads, K key/value heads, T pages at hand, P places of pages, S slots in a page,
D head size, R rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from masked import random_model
from tiny import make_engine, run_all
from torch import Tensor

from headrace.codecs.base import CODECS, Codec
from headrace.codecs.base import Setup as CodecSetup
from headrace.engine.engine import Engine
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.request import Request
from headrace.selection.base import SELECTORS, Selector, Setup


class WholePages(Selector):
    """Chooses every page, one by one."""

    interval = 8

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.pages = 10**6

    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        return -torch.arange(page_XP.shape[1]).double().expand(page_XP.shape)


class MeanKey(Selector):
    """The pages whose mean key has the largest product with the sum of all queries."""

    interval = 6

    def score(self, q_XHD: Tensor, k_KTSD: Tensor, page_XP: Tensor) -> Tensor:
        return (q_XHD.sum(1) @ k_KTSD.mean(2).sum(0).T).gather(1, page_XP)


PICKERS: dict[str, type[Selector]] = {"test_whole_pages": WholePages, "test_mean_key": MeanKey}


@contextmanager
def registered() -> Iterator[None]:
    """Register the test selectors, and take them out again."""
    for name, kind in PICKERS.items():
        label: Any = "exact" if kind is WholePages else "lossy"
        SELECTORS.register(name, label=label, summary="A selector of the tests.")(kind)
    try:
        yield
    finally:
        for name in PICKERS:
            SELECTORS.remove(name)


class SelectedContext:
    """One forward over all tokens of a sequence: each row behind the prompt picks pages for itself, by hand."""

    def __init__(self, selector: Selector, codec: Codec, count: int, prompt_len: int) -> None:
        self.selector, self.codec, self.prompt_len = selector, codec, prompt_len
        self.passed_over = 0
        self.pos_AR = torch.arange(count, dtype=torch.int32)[None]
        self.soft_SE = None

    turns = False

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        size = self.selector.page_size
        k_RKD, v_RKD = (
            x[:, :, 0] for x in self.codec.decode(0, [x[:, :, None] for x in self.codec.encode(k_RKD, v_RKD)])
        )
        out_RHD = torch.zeros(len(q_RHD), q_RHD.shape[1], v_RKD.shape[2], dtype=q_RHD.dtype)
        group = q_RHD.shape[1] // k_RKD.shape[1]
        for t in range(len(q_RHD)):
            seen = list(range(t + 1))
            front = t // self.selector.interval * self.selector.interval // size if t >= self.prompt_len else 0
            if front:
                pages = k_RKD[: front * size].unflatten(0, (front, size)).permute(2, 0, 1, 3)
                score_P = self.selector.score(q_RHD[t : t + 1], pages, torch.arange(front)[None])[0]
                best = sorted(range(front), key=lambda p: (-float(score_P[p]), p))[: self.selector.pages]
                self.passed_over += front - len(best)
                seen = [s for s in seen if s >= front * size or s // size in best]
            for head in range(q_RHD.shape[1]):
                weight = (k_RKD[seen, head // group] @ q_RHD[t, head] * scale).softmax(0)
                out_RHD[t, head] = weight @ v_RKD[seen, head // group]
        return out_RHD


@torch.inference_mode()
def run_selected(
    model: CausalLM, tokens: Sequence[int], prompt_len: int, selector: Selector, codec: str = "model"
) -> tuple[Tensor, int]:
    """Logits [T, V] of every token, teacher-forced, and how often a page was passed over."""
    setup = CodecSetup(torch.float64, selector.page_size)
    context = SelectedContext(selector, CODECS[codec].make(setup), len(tokens), prompt_len)
    hidden_RE = model(torch.tensor(tokens), context)
    return model.logits(hidden_RE), context.passed_over


def picking_engine(selector: str, **options: Any) -> Engine:
    budget = {} if selector == "all" else {"selector_budget": 8}
    return make_engine(**{"model": random_model(), "selector": selector, **budget, **options})


@functools.cache
def _alone(
    prompt: tuple[int, ...], params_key: str, sample: int, selector: str, codec: str, page_size: int
) -> tuple[tuple[int, ...], str | None]:
    engine = picking_engine(selector, enable_prefix_caching=False, max_num_seqs=1, codec=codec, page_size=page_size)
    samples = engine.add(prompt, SamplingParams.from_dict(json.loads(params_key)), request_id="alone")
    for request in samples:
        request.parent = None
    run_all(engine)
    engine.check_idle()
    return tuple(samples[sample].output_ids), samples[sample].finish.reason


def alone_of(
    request: Request, selector: str, codec: str = "model", page_size: int = 4
) -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of the request when it has an engine for itself, plain, without prefix cache."""
    params = {**request.params.to_dict(), "decoder": None}
    prompt = tuple(request.tokens[: request.prompt_len])
    return _alone(prompt, json.dumps(params), request.sample, selector, codec, page_size)
