"""Sampling parameters: what is refused, and by which sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from headrace.errors import RequestError
from headrace.params import SamplingParams


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be between 0.0 and 10000.0; 0 is greedy"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -2}, "top_k is -2; it must be between 0"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        ({"min_p": 2}, "min_p is 2; it must be between 0"),
        ({"n": 0}, "n is 0; it must be between 1 and 16384"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"min_tokens": 5, "max_tokens": 3}, "min_tokens is 5, more than max_tokens 3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be positive"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"stop": ""}, "stop has ''; a stop string needs at least one character"),
        ({"stop": ["a", ""]}, "stop has ''"),
        ({"stop": "x", "detokenize": False}, "stop strings need text"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has -1"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] is nan"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has 'a'"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logprobs": True}, "logprobs is True; it must be a whole number or None"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
    ],
)
def test_bad_values_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**params)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown sampling parameter 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_top_k_has_two_ways_of_being_off() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_parameters_survive_json() -> None:
    params = SamplingParams(n=2, stop=["a"], logit_bias={3: -1.0}, seed=2**63, logprobs=1)
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
