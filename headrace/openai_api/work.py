"""What a body asks for, ready for an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from headrace.errors import UnknownModelError
from headrace.params import SamplingParams
from headrace.text.tokenizer import Tokenizer
from headrace.text.tools import ToolFormat

Kind = Literal["completions", "chat"]


@dataclass
class Work:
    """The prompts of one body, and how they are answered. Choice i of the answer is sample i % n of prompt i // n."""

    kind: Kind
    model: str | None
    """As the body names it; None: whatever is served."""
    prompts: list[dict[str, Any]]
    """Each with `prompt_token_ids` or `prompt`, as `LLM.generate` takes them."""
    params: SamplingParams
    tokenizer: Tokenizer | None = None
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    """Send the usage in a chunk of its own at the end of a stream."""
    top_logprobs: int | None = None
    """Alternatives in the answer; None: no log-probs there."""
    return_token_ids: bool = False
    priority: int = 0
    deadline_s: float | None = None
    tools: ToolFormat | None = None
    """How calls are read out of the text; None: no tools were passed."""
    one_call: bool = False
    hidden: re.Pattern[str] | None = field(default=None, repr=False)
    """With tools, special tokens that are no part of a call: they are left out of the text."""

    def for_model(self, served: Collection[str], adapters: Collection[str]) -> Work:
        """The work under the model that it names: a name that is served, or an adapter's.

        Raises UnknownModelError.
        """
        if self.model is None or self.model in served:
            return self
        if self.model in adapters:
            return dataclasses.replace(self, params=dataclasses.replace(self.params, adapter=self.model))
        known = ", ".join([*served, *adapters])
        raise UnknownModelError(f"model is {self.model!r:.60}, which is not served here; known: {known}")
