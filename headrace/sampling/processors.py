"""Logit processors: changes to the logits of single output rows before the draw.

They run in the order of registration: bias, penalties, then masks; temperature, filters and noise follow in
the draw itself. A processor sees only rows of requests that asked for it, and keeps what it needs by request
index, so a row's result never depends on its neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.params import SamplingParams
from headrace.registry import Registry
from headrace.request import Request


class Setup(NamedTuple):
    """What a processor is made from."""

    vocab_size: int
    device: torch.device
    spellings: Callable[[], Sequence[bytes]] | None = None
    """The bytes that each token adds to a text, by id, special tokens empty; None: there is no tokenizer."""


class LogitProcessor(ABC):
    """One kind of change. Data of a request lives from `admit` to `release`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @abstractmethod
    def wants(self, params: SamplingParams) -> bool:
        """Whether a request with these parameters uses the processor."""

    def prepare(self, params: SamplingParams, stop_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """A request that wants the processor is about to be queued, from a record with output: what takes long is done
        here. May be called from any thread, more than once. Raises RequestError for what cannot be done."""
        return

    @abstractmethod
    def admit(self, request: Request) -> None:
        """The request has taken `request.index`; its tokens may include output (after a preemption)."""

    @abstractmethod
    def release(self, index: int) -> None:
        """The index is given back."""

    @abstractmethod
    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Change the given rows in place; rows[i] draws for the request at indices[i].

        path_ML: int64, by row of the logits the drafted tokens between the request's known ones and the draw;
        unused entries are -1.
        """

    def observe(self, index: int, token: int) -> None:
        """The request emitted a token."""
        return


PROCESSORS: Registry[LogitProcessor] = Registry("logit processor", "SamplingParams")


@PROCESSORS.register(
    "logit_bias",
    label="exact",
    summary="Adds a value to the logits of given tokens.",
    option="logit_bias={id: value}",
    example={"logit_bias": {7: 3.0}},
)
class LogitBias(LogitProcessor):
    """logits[v] += bias[v]."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._device = setup.device
        self._bias: dict[int, tuple[Tensor, Tensor]] = {}

    def wants(self, params: SamplingParams) -> bool:
        """Any bias given."""
        return bool(params.logit_bias)

    def admit(self, request: Request) -> None:
        """Move the bias to the device."""
        bias = request.params.logit_bias or {}
        ids = torch.tensor(list(bias), dtype=torch.int64, device=self._device)
        self._bias[request.index] = ids, torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device)

    def release(self, index: int) -> None:
        """Forget the bias."""
        self._bias.pop(index, None)

    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Add."""
        for row, index in zip(rows, indices, strict=True):
            ids, values = self._bias[index]
            logits_MV[row, ids] += values


@PROCESSORS.register(
    "penalties",
    label="exact",
    summary="Repetition, presence and frequency penalties.",
    source="repetition: CTRL, arXiv 1909.05858",
    option="repetition_penalty=, presence_penalty=, frequency_penalty=",
    example={"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
)
class Penalties(LogitProcessor):
    """Repetition: l / r where l > 0, else l * r, for tokens in prompt or output; then l - f * count - p * [count > 0]
    with counts over the output."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._vocab_size = setup.vocab_size
        self._device = setup.device
        self._seen_V: dict[int, Tensor] = {}
        self._count_V: dict[int, Tensor] = {}
        self._params: dict[int, SamplingParams] = {}

    def wants(self, params: SamplingParams) -> bool:
        """Any penalty differs from its identity."""
        return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0

    def admit(self, request: Request) -> None:
        """Count the tokens known so far."""
        tokens = torch.tensor(request.tokens, dtype=torch.int64, device=self._device)
        seen_V = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
        seen_V[tokens] = True
        output = tokens[request.prompt_len :]
        self._seen_V[request.index] = seen_V
        self._count_V[request.index] = torch.bincount(output, minlength=self._vocab_size).float()
        self._params[request.index] = request.params

    def release(self, index: int) -> None:
        """Forget the counts."""
        for table in (self._seen_V, self._count_V, self._params):
            table.pop(index, None)

    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Penalise."""
        for row, index in zip(rows, indices, strict=True):
            params, logits_V = self._params[index], logits_MV[row]
            seen_V, count_V = self._seen_V[index], self._count_V[index]
            if path_ML.shape[1]:
                live_L = (path_ML[row] >= 0).float()
                drafted_V = torch.zeros_like(count_V).index_add_(0, path_ML[row].clamp(min=0), live_L)
                seen_V, count_V = seen_V | (drafted_V > 0), count_V + drafted_V
            if params.repetition_penalty != 1.0:
                factor = params.repetition_penalty
                scaled_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
                logits_V = torch.where(seen_V, scaled_V, logits_V)
            logits_V = logits_V - params.frequency_penalty * count_V - params.presence_penalty * (count_V > 0)
            logits_MV[row] = logits_V

    def observe(self, index: int, token: int) -> None:
        """Count one more."""
        self._seen_V[index][token] = True
        self._count_V[index][token] += 1


@PROCESSORS.register(
    "allowed_token_ids",
    label="exact",
    summary="Only the given tokens may be drawn.",
    option="allowed_token_ids=[...]",
    example={"allowed_token_ids": list(range(20))},
)
class AllowedTokens(LogitProcessor):
    """logits[v] = -inf for v outside the allowed set."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._vocab_size = setup.vocab_size
        self._device = setup.device
        self._forbidden_V: dict[int, Tensor] = {}

    def wants(self, params: SamplingParams) -> bool:
        """A set is given."""
        return params.allowed_token_ids is not None

    def admit(self, request: Request) -> None:
        """Build the mask."""
        forbidden_V = torch.ones(self._vocab_size, dtype=torch.bool, device=self._device)
        forbidden_V[torch.tensor(request.params.allowed_token_ids, dtype=torch.int64, device=self._device)] = False
        self._forbidden_V[request.index] = forbidden_V

    def release(self, index: int) -> None:
        """Forget the mask."""
        self._forbidden_V.pop(index, None)

    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Mask."""
        for row, index in zip(rows, indices, strict=True):
            logits_MV[row].masked_fill_(self._forbidden_V[index], -torch.inf)


@PROCESSORS.register(
    "min_tokens",
    label="exact",
    summary="No stop token before so many output tokens.",
    option="min_tokens=",
    example={"min_tokens": 8},
)
class MinTokens(LogitProcessor):
    """logits[stop ids] = -inf while fewer than min_tokens tokens are out."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._device = setup.device
        self._stops: dict[int, Tensor] = {}
        self._left: dict[int, int] = {}

    def wants(self, params: SamplingParams) -> bool:
        """A minimum is given."""
        return params.min_tokens > 0

    def admit(self, request: Request) -> None:
        """Count what is out already."""
        self._stops[request.index] = torch.tensor(request.stop_ids, dtype=torch.int64, device=self._device)
        self._left[request.index] = request.params.min_tokens - len(request.output_ids)

    def release(self, index: int) -> None:
        """Forget the count."""
        self._stops.pop(index, None)
        self._left.pop(index, None)

    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Mask."""
        for row, index in zip(rows, indices, strict=True):
            if self._left[index] > 0:
                stops = self._stops[index]
                early = (path_ML[row] >= 0).sum() < self._left[index]
                logits_MV[row, stops] = logits_MV[row, stops].masked_fill(early, -torch.inf)

    def observe(self, index: int, token: int) -> None:
        """One token fewer to wait for."""
        self._left[index] -= 1
