"""Sampling parameters of one request, in the shape that vLLM users know."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from headrace.checks import names_checked, settle_types, show
from headrace.config import option
from headrace.errors import RequestError

MAX_SEED = 2**64
MAX_N = 16384
"""Samples of one prompt; each is a request of its own."""
MAX_BIAS = 1e4
"""Far more than any logit, and far from the end of float32."""


@names_checked("sampling parameter", RequestError)
@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Raises RequestError naming value, limit and way out.

    The token at index t is argmax over the surviving vocabulary of log p + Gumbel noise keyed by
    (seed, sample, t): the same seed gives the same tokens in whatever batch the request runs.
    """

    n: int = option(1, "samples drawn from the prompt; sample i is keyed by (seed, i)")
    temperature: float = option(1.0, "0: greedy")
    top_k: int = option(0, "keep the k most probable tokens; 0 or -1: off")
    top_p: float = option(1.0, "keep the smallest set of tokens with at least this mass")
    min_p: float = option(0.0, "keep tokens with at least this share of the top token's probability")
    max_tokens: int | None = option(16, "output tokens at most; None: up to the model's length")
    min_tokens: int = option(0, "output tokens before a stop token may be drawn")
    stop: str | list[str] | None = option(None, "strings that end the output and are not part of it")
    stop_token_ids: list[int] | None = option(None, "token ids that end the output, besides the model's own")
    ignore_eos: bool = option(False, "go on after the model's end token")
    include_stop_str_in_output: bool = option(False, "keep the stop string in the text")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    detokenize: bool = option(True, "make text; otherwise token ids only")
    seed: int | None = option(
        None, "if not given: keyed by the engine seed and the request's index; the seed used is reported"
    )
    logprobs: int | None = option(
        None, "log-probs of this many top tokens at each output position and of the drawn one"
    )
    prompt_logprobs: int | None = option(None, "the same for the prompt's tokens")
    repetition_penalty: float = option(
        1.0, "divides positive and multiplies negative logits of tokens in prompt or output (arXiv 1909.05858)"
    )
    presence_penalty: float = option(0.0, "subtracted once from the logits of tokens in the output")
    frequency_penalty: float = option(0.0, "subtracted for each occurrence of a token in the output")
    logit_bias: dict[int, float] | None = option(None, "added to the logits of these tokens")
    allowed_token_ids: list[int] | None = option(None, "only these tokens may be drawn")
    decoder: str | None = option(None, "one of the engine's decoders; if not given, its first")
    evictor: str | None = option(None, "one of the engine's evictors; if not given, its first")
    adapter: str | None = option(None, "one of the loaded adapters, by name; if not given, the model as it is")
    cache_budget: int | None = option(
        None, "slots (tokens) of each cache cell that the request keeps; if not given, the engine's"
    )
    truncate_prompt_tokens: int | None = option(None, "keep only this many of the last prompt tokens")

    def __post_init__(self) -> None:
        settle_types(self, RequestError)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_ranges()
        self._check_lists()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_ranges(self) -> None:
        limits: list[tuple[str, float, float, str]] = [
            ("n", 1, MAX_N, "for more, send the prompt again with another seed"),
            ("temperature", 0.0, 1e4, "0 is greedy"),
            ("top_k", 0, 2**31 - 1, "0 or -1 turns it off"),
            ("min_p", 0.0, 1.0, "0 turns it off"),
            ("max_tokens", 0, math.inf, "None means up to the model's length"),
            ("min_tokens", 0, math.inf, ""),
            ("logprobs", 0, math.inf, "None turns it off"),
            ("prompt_logprobs", 0, math.inf, "None turns it off"),
            ("presence_penalty", -1e4, 1e4, "0 turns it off"),
            ("frequency_penalty", -1e4, 1e4, "0 turns it off"),
            ("truncate_prompt_tokens", 1, math.inf, "None turns it off"),
            ("cache_budget", 1, math.inf, "None means the engine's"),
        ]
        optional = ("max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "cache_budget")
        for name, low, high, hint in limits:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not low <= value <= high:
                bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise RequestError(f"{name} is {show(value)}; it must be {bound}{'; ' + hint if hint else ''}")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(
                f"top_p is {show(self.top_p)}; it must be in (0, 1]; 1 turns it off, temperature=0 is greedy"
            )
        if not 1e-4 <= self.repetition_penalty <= 1e4:
            raise RequestError(
                f"repetition_penalty is {show(self.repetition_penalty)}; it must be positive, between 0.0001 and "
                "10000.0; 1 turns it off"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {show(self.min_tokens)}, more than max_tokens {self.max_tokens}: lower it"
            )
        if self.seed is not None and not 0 <= self.seed < MAX_SEED:
            raise RequestError(f"seed is {show(self.seed)}; it must be a whole number in [0, 2**64)")

    def _check_lists(self) -> None:
        for text in self.stop_strings:
            if not text:
                raise RequestError(f"stop has {text!r}; a stop string needs at least one character: leave it out")
        if self.stop_strings and not self.detokenize:
            raise RequestError("stop strings need text: set detokenize=True or use stop_token_ids")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if token < 0:
                    raise RequestError(f"{name} has {show(token)}; token ids are whole numbers from 0")
        for token, value in (self.logit_bias or {}).items():
            if not -MAX_BIAS <= value <= MAX_BIAS and value != -math.inf:
                raise RequestError(
                    f"logit_bias[{token}] is {show(value)}; it must be between {-MAX_BIAS} and {MAX_BIAS}, or -inf to "
                    "forbid the token"
                )
        for name in ("decoder", "evictor"):
            if getattr(self, name) == "":
                raise RequestError(f"{name} is an empty text: give a name, or leave it out for the engine's first")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: no token could be drawn; leave it out to allow all")

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax."""
        return self.temperature == 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError if a token id lies outside the model's vocabulary, or more log-probs are asked for than
        it has tokens."""
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise RequestError(
                    f"{name} is {show(getattr(self, name))}; the model's vocabulary has {vocab_size} tokens: lower it"
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise RequestError(
                        f"{name} has token id {show(token)}; the model's vocabulary has {vocab_size} tokens"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the portable record."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SamplingParams:
        """Inverse of `to_dict`; JSON turns the keys of logit_bias into strings, which is undone here."""
        if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
            raise RequestError(f"sampling parameters are {show(data)}; they must be an object with names as keys")
        bias = data.get("logit_bias")
        if isinstance(bias, dict):
            data = {**data, "logit_bias": {_token_of_key(key): value for key, value in bias.items()}}
        return cls(**data)


def _token_of_key(key: Any) -> Any:
    is_number = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20
    return int(key) if is_number else key
