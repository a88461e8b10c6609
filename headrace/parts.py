"""Every registry with its parts loaded. Importing this module imports each part's file once.

A new technique is one file and one line here.
"""

from __future__ import annotations

from typing import Any

import headrace.codecs.fp8
import headrace.codecs.model
import headrace.decoding.autoregressive
import headrace.decoding.draft_model
import headrace.decoding.ngram
import headrace.eviction.full
import headrace.eviction.key_norm
import headrace.eviction.streaming_llm
import headrace.sampling.constraints
import headrace.scheduling.prefill_first
import headrace.scheduling.splitfuse
import headrace.selection.everything
import headrace.selection.quest  # noqa: F401
from headrace.cache.prefix import REUSE
from headrace.codecs.base import CODECS
from headrace.decoding.base import DECODERS
from headrace.eviction.base import EVICTORS
from headrace.registry import Registry
from headrace.sampling.processors import PROCESSORS
from headrace.scheduling.base import SCHEDULERS
from headrace.selection.base import SELECTORS

REGISTRIES: list[Registry[Any]] = [SCHEDULERS, DECODERS, EVICTORS, CODECS, SELECTORS, REUSE, PROCESSORS]
"""One a seam, in the order in which docs/systems.md lists them."""

__all__ = ["CODECS", "DECODERS", "EVICTORS", "PROCESSORS", "REGISTRIES", "REUSE", "SCHEDULERS", "SELECTORS"]
