"""Codecs that exist to stretch the seam, and the definition that coded caches are compared with.

Letters: L layers, K key/value heads, P pages, S slots in a page, D head size, R rows, H query heads, n slots.
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
from headrace.engine.engine import Engine
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.request import Request
from headrace.step import LayerState, PageClass, Plane


class Same(Codec):
    """The model's type through the general form of attention, in three planes."""

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        half = state.head_dim // 2
        shapes = {"low": (half,), "high": (state.head_dim - half, 1), "v": (state.v_head_dim,)}
        return [PageClass("same", tuple(Plane(name, shape, self.dtype) for name, shape in shapes.items()))]

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        half = k_RKD.shape[2] // 2
        return k_RKD[..., :half], k_RKD[..., half:, None], v_RKD

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        low, high, v = planes
        return torch.cat([low, high[..., 0]], -1), v


class Uneven(Codec):
    """Keys and values kept in different ways: keys as integers of eight bits, values in bfloat16."""

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        k, v = Plane("k", (state.head_dim,), torch.int8), Plane("v", (state.v_head_dim,), torch.bfloat16)
        return [PageClass("uneven", (k, Plane("k_step", (1,), torch.float32), v))]

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        step_RK1 = (k_RKD.abs().amax(-1, keepdim=True) / 127).float().clamp(min=1e-20)
        return (k_RKD / step_RK1).round().to(torch.int8), step_RK1, v_RKD.bfloat16()

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        k, step, v = planes
        return k.to(self.dtype) * step.to(self.dtype), v.to(self.dtype)


class Sealed(Codec):
    """The newest tokens in the model's type, whole pages behind them as integers with a scale a page and head."""

    seal_interval, seal_behind = 8, 3

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        sizes = {"k": state.head_dim, "v": state.v_head_dim}
        opened = [Plane(name, (size,), self.dtype) for name, size in sizes.items()]
        sealed = [Plane(name, (size,), torch.int8) for name, size in sizes.items()]
        steps = [Plane(f"{name}_step", (), torch.float32, by_page=True) for name in sizes]
        return [PageClass("open", tuple(opened)), PageClass("sealed", (*sealed, *steps))]

    def encode(self, k_RKD: Tensor, v_RKD: Tensor) -> Sequence[Tensor]:
        return k_RKD, v_RKD

    def seal(self, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        steps = [(x.abs().amax((-1, -2)) / 127).float().clamp(min=1e-20) for x in planes]
        codes = [
            (x / step[..., None, None]).round().clamp(-127, 127).to(torch.int8)
            for x, step in zip(planes, steps, strict=True)
        ]
        return *codes, *steps

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if number == 0:
            k, v = planes
            return k, v
        k, v, k_step, v_step = planes
        k, v = (x.to(self.dtype) * step.to(self.dtype)[..., None, None] for x, step in ((k, k_step), (v, v_step)))
        return k, v


class SealedSame(Sealed):
    """Sealed pages hold what the open ones held, the slots of each page the other way round."""

    seal_interval, seal_behind = 5, 0

    def classes(self, state: LayerState) -> Sequence[PageClass]:
        planes = super().classes(state)[0].planes
        return [PageClass("open", planes), PageClass("sealed", planes)]

    def seal(self, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        return [x.flip(-2) for x in planes]

    def decode(self, number: int, planes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        k, v = (x.flip(-2) for x in planes) if number else planes
        return k, v


CODERS: dict[str, type[Codec]] = {
    "test_same": Same,
    "test_uneven": Uneven,
    "test_sealed": Sealed,
    "test_sealed_same": SealedSame,
}
EXACT = ("test_same", "test_sealed_same")


@contextmanager
def registered() -> Iterator[None]:
    """Register the test codecs, and take them out again."""
    for name, kind in CODERS.items():
        label: Any = "exact" if name in EXACT else "lossy"
        CODECS.register(name, label=label, summary="A codec of the tests.")(kind)
    try:
        yield
    finally:
        for name in CODERS:
            CODECS.remove(name)


class CodedContext:
    """One forward over all tokens of a sequence: dense attention over what each row's slots decode to at its time."""

    def __init__(self, codec: Codec, count: int) -> None:
        self.codec = codec
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
        codec, size = self.codec, self.codec.page_size
        entries = codec.encode(k_RKD, v_RKD)
        # One page a slot: the open class is by slot.
        k_RKD, v_RKD = (x[:, :, 0] for x in codec.decode(0, [x[:, :, None] for x in entries]))
        whole = len(k_RKD) // size
        if codec.seal_interval and whole:
            pages = [
                x[: whole * size].unflatten(0, (whole, size)).transpose(1, 2).transpose(0, 1)[None] for x in entries
            ]
            sealed_LKPSD = codec.decode(1, codec.seal(pages))
            k_sealed, v_sealed = (x[0].transpose(0, 1).transpose(1, 2).flatten(0, 1) for x in sealed_LKPSD)
        out_RHD = torch.zeros(len(q_RHD), q_RHD.shape[1], v_RKD.shape[2], dtype=q_RHD.dtype)
        group = q_RHD.shape[1] // k_RKD.shape[1]
        for t in range(len(q_RHD)):
            # Codecs are told the tokens committed at the last trigger; behind it their answer stays the same.
            front = codec.sealed(t)
            k_nKD, v_nKD = k_RKD[: t + 1], v_RKD[: t + 1]
            if front:
                k_nKD = torch.cat([k_sealed[:front], k_nKD[front:]])
                v_nKD = torch.cat([v_sealed[:front], v_nKD[front:]])
            for head in range(q_RHD.shape[1]):
                weight_n = (k_nKD[:, head // group] @ q_RHD[t, head] * scale).softmax(0)
                out_RHD[t, head] = weight_n @ v_nKD[:, head // group]
        return out_RHD


@torch.inference_mode()
def run_coded(model: CausalLM, tokens: Sequence[int], codec: Codec) -> Tensor:
    """Logits [T, V] of every token, teacher-forced."""
    hidden_RE = model(torch.tensor(tokens), CodedContext(codec, len(tokens)))
    return model.logits(hidden_RE)


def coded_engine(codec: str, **options: Any) -> Engine:
    return make_engine(**{"model": random_model(), "codec": codec, **options})


@functools.cache
def _alone(
    prompt: tuple[int, ...], params_key: str, sample: int, codec: str, page_size: int, evictors: str, interval: int
) -> tuple[tuple[int, ...], str | None]:
    engine = coded_engine(
        codec,
        enable_prefix_caching=False,
        max_num_seqs=1,
        page_size=page_size,
        evictor=evictors,
        cache_interval=interval,
    )
    samples = engine.add(prompt, SamplingParams.from_dict(json.loads(params_key)), request_id="alone")
    for request in samples:
        request.parent = None
    run_all(engine)
    engine.check_idle()
    request = samples[sample]
    return tuple(request.output_ids), request.finish.reason


def alone_of(
    request: Request, codec: str, page_size: int = 4, evictors: str = "full", interval: int = 128
) -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of the request when it has an engine for itself, plain, without prefix cache.

    Under a codec that seals pages the tokens depend on the size of a page, otherwise not.
    """
    budget = request.cache_budget or None
    params = {**request.params.to_dict(), "decoder": None, "evictor": request.evictor, "cache_budget": budget}
    prompt = tuple(request.tokens[: request.prompt_len])
    # Codecs by slot are compared over page sizes, those that seal are not.
    size = page_size if codec.startswith("test_sealed") else 4
    return _alone(prompt, json.dumps(params), request.sample, codec, size, evictors, interval)
