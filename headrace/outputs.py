"""What a caller gets back, in the shape that vLLM users know."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.errors import HeadraceError
from headrace.request import PositionLogprobs
from headrace.text.tools import ToolCall


@dataclass
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the drawn tokens' log-probs under the model's own distribution."""
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    """`stop`, `length`, `abort`, `error` or `timeout`; None while running."""
    stop_reason: int | str | None = None
    error: HeadraceError | None = None
    """Why the sample failed; with tools also a ToolCallError for a call that cannot be read."""
    tool_calls: list[ToolCall] | None = None
    """The functions that the model calls; None if no tools were passed."""


@dataclass
class RequestMetrics:
    """Times in seconds on one monotonic clock, and what happened to the request on its way."""

    arrival_s: float
    first_token_s: float | None
    finish_s: float | None
    cached_tokens: int = 0
    preemptions: int = 0
    peak_cache_slots: int = 0
    """Most slots that the pages of a sample had in a cache group."""
    peak_cache_bytes: int = 0
    """Most bytes of cache pages that a sample held at once, shared pages included."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass
class RequestOutput:
    """One prompt and its samples."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    seed: int
    """The seed used: pass it as `SamplingParams(seed=...)` to get the same tokens again."""
    metrics: RequestMetrics | None = None


@dataclass
class ScoreOutput:
    """Teacher-forced log-probs of given tokens."""

    token_ids: list[int]
    logprobs: list[float | None]
    """Log-probability of each token given the ones before it; None for the first."""
    scored_from: int = 0
    """Index of the first token counted in `total`."""
    total: float = field(default=0.0)
    """Sum over the tokens from `scored_from` that have a log-probability, in nats."""
