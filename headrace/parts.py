"""Every registry with its parts loaded. Importing this module imports each part's file once.

A new technique is one file and one line here.
"""

from __future__ import annotations

import headrace.decoding.autoregressive
import headrace.scheduling.prefill_first
import headrace.scheduling.splitfuse  # noqa: F401
from headrace.decoding.base import DECODERS
from headrace.sampling.processors import PROCESSORS
from headrace.scheduling.base import SCHEDULERS

__all__ = ["DECODERS", "PROCESSORS", "SCHEDULERS"]
