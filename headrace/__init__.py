"""Headrace: one generation engine in which every way of generating faster is a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headrace.async_llm import AsyncLLM
    from headrace.llm import LLM
    from headrace.outputs import CompletionOutput, RequestOutput, ScoreOutput
    from headrace.params import SamplingParams

_HOMES = {
    "LLM": "headrace.llm",
    "AsyncLLM": "headrace.async_llm",
    "SamplingParams": "headrace.params",
    "RequestOutput": "headrace.outputs",
    "CompletionOutput": "headrace.outputs",
    "ScoreOutput": "headrace.outputs",
}

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "ScoreOutput", "__version__"]


def __getattr__(name: str) -> Any:
    """Load on first use: `headrace --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
