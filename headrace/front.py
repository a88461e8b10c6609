"""Text on both sides of an engine: prompts become tokens, tokens become text, requests become outputs.

`LLM` and `AsyncLLM` are two ways to drive the same front and engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

from headrace.checks import show, unknown
from headrace.engine.engine import Engine
from headrace.engine.intake import as_ids
from headrace.errors import RequestError
from headrace.outputs import CompletionOutput, RequestMetrics, RequestOutput
from headrace.params import SamplingParams
from headrace.request import Logprob, PositionLogprobs, Request
from headrace.text.detokenize import IncrementalDetokenizer
from headrace.text.stop import StopMatcher
from headrace.text.tokenizer import Tokenizer

Prompt = str | dict[str, Any] | list[int]
"""Text, token ids, or a dict with `prompt` or `prompt_token_ids`."""

TextHook = Callable[[Request, str], None]
"""Called with a request and the text that has become certain."""

PROMPT_KEYS = ("prompt", "prompt_token_ids")

Encoded = tuple[list[int], str | None]
"""Token ids of a prompt and, where it was given, its text."""


class _TextStream:
    """The text of one output as it grows, up to its stop string."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        params = request.params
        prompt_ids = request.tokens[: request.prompt_len]
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        stops = params.stop_strings
        self._matcher = StopMatcher(stops, params.include_stop_str_in_output) if stops else None
        self._unwatched = params.min_tokens
        self.text = ""
        self.stopped: str | None = None

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens; returns the text that is certain now. Stop strings count from `min_tokens` on."""
        return "".join(map(self._push_one, tokens))

    def _push_one(self, token: int) -> str:
        new = self._detokenizer.push(token)
        if self._unwatched > 0:
            self._unwatched -= 1
            self.text += new
            return new
        return self._accept(new)

    def close(self) -> str:
        """The output has ended; returns what was held back."""
        if self.stopped is not None:
            return ""
        new = self._accept(self._detokenizer.finish())
        if self._matcher and self.stopped is None:
            rest = self._matcher.flush()
            self.text += rest
            new += rest
        return new

    def _accept(self, new: str) -> str:
        if self._matcher and self.stopped is None:
            new, self.stopped = self._matcher.push(new)
        self.text += new
        return new


def _are_ids(prompt: Any) -> TypeGuard[list[int]]:
    """Looks at the first only: a list of prompts is the likely mistake."""
    return isinstance(prompt, list) and not (prompt and isinstance(prompt[0], (str, list, dict)))


class TextFront:
    """One engine and its tokenizer (None: token ids only). Not thread-safe, but for `encode`.

    `on_text` listens to text as it becomes certain. `live`: outputs of unfinished requests are wanted too, so text is
    made as the tokens come. Otherwise it is made at the end, or where a stop string has to be found.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.on_text: TextHook | None = None
        self.live = False
        self._streams: dict[int, _TextStream] = {}
        self._named_prompts: dict[int, list[PositionLogprobs | None]] = {}
        self._named_outputs: dict[int, list[PositionLogprobs | None]] = {}
        engine.on_token = self._on_token

    # In

    def encode(self, prompt: Prompt, special: bool = True) -> Encoded:
        """Token ids and, where it was given, the text. Raises RequestError."""
        text: str
        if isinstance(prompt, str):
            text = prompt
        elif _are_ids(prompt):
            return as_ids(prompt), None
        elif isinstance(prompt, dict) and ("prompt_token_ids" in prompt or isinstance(prompt.get("prompt"), str)):
            for key in prompt:
                if key not in PROMPT_KEYS:
                    raise RequestError(unknown("entry of a prompt", key, PROMPT_KEYS))
            if "prompt_token_ids" in prompt:
                ids, given = prompt["prompt_token_ids"], prompt.get("prompt")
                if given is not None and not isinstance(given, str):
                    raise RequestError(f"a prompt has the text {show(given)}; it must be a text or None")
                return as_ids(ids), given
            text = prompt["prompt"]
        else:
            raise RequestError(
                f"a prompt is {type(prompt).__name__} {show(prompt)}; give text, token ids, "
                'or {"prompt": ...} or {"prompt_token_ids": [...]}'
            )
        if self.tokenizer is None:
            raise RequestError(
                "a text prompt needs the tokenizer: pass prompt_token_ids or leave out skip_tokenizer_init"
            )
        return self.tokenizer.encode(text, add_special_tokens=special), text

    def add(
        self,
        encoded: Encoded,
        params: SamplingParams,
        *,
        request_id: str,
        number: int,
        priority: int = 0,
        deadline_s: float | None = None,
        arrival_s: float | None = None,
    ) -> list[Request]:
        """Queue the samples of an encoded prompt: `Engine.add`. Raises RequestError."""
        self._check_stops(params)
        tokens, text = encoded
        return self.engine.add(
            tokens,
            params,
            request_id=request_id,
            prompt=text,
            number=number,
            priority=priority,
            deadline_s=deadline_s,
            arrival_s=arrival_s,
        )

    def check(self, prompt: Prompt, params: SamplingParams) -> Encoded:
        """The encoded prompt, if it could be served with these parameters; queues nothing. Raises RequestError."""
        self._check_stops(params)
        tokens, text = self.encode(prompt)
        return self.engine.check(tokens, params), text

    def _check_stops(self, params: SamplingParams) -> None:
        if isinstance(params, SamplingParams) and params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need the tokenizer: leave out skip_tokenizer_init")

    # Out

    def output(self, samples: Sequence[Request]) -> RequestOutput:
        """The samples as they stand now, in the form that callers get."""
        first = samples[0]
        scores = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.tokens[: first.prompt_len],
            prompt_logprobs=(
                self._named(first, first.prompt_logprobs or [None], self._named_prompts) if scores else None
            ),
            outputs=[self._completion(i, request) for i, request in enumerate(samples)],
            finished=all(request.finish for request in samples),
            seed=first.seed,
            metrics=RequestMetrics(
                arrival_s=first.arrival_s,
                first_token_s=min((s.first_token_s for s in samples if s.first_token_s is not None), default=None),
                finish_s=max((s.finish_s for s in samples if s.finish_s is not None), default=None),
                cached_tokens=first.hit_tokens,
                preemptions=sum(s.preemptions for s in samples),
                peak_cache_slots=max(s.peak_cache_slots for s in samples),
                peak_cache_bytes=max(s.peak_cache_bytes for s in samples),
            ),
        )

    def _on_token(self, request: Request, tokens: list[int]) -> str | None:
        """Text is only made as the tokens come where somebody waits for it: a stop string or a reader."""
        if self.tokenizer is None or not (request.params.stop_strings or self.on_text or self.live):
            return None
        if not request.params.detokenize:
            return None
        stream = self._streams.get(request.arrival)
        if stream is None:
            stream = self._streams[request.arrival] = _TextStream(request, self.tokenizer)
            tokens = request.output_ids
        new = stream.push(tokens)
        if new and self.on_text:
            self.on_text(request, new)
        return stream.stopped

    def close(self, request: Request) -> None:
        """The request has ended: what was held back of its text is certain now."""
        stream = self._streams.get(request.arrival)
        if stream is not None:
            rest = stream.close()
            if rest and self.on_text:
                self.on_text(request, rest)

    def _text(self, request: Request) -> str:
        if self.tokenizer is None or not request.params.detokenize:
            return ""
        stream = self._streams.get(request.arrival)
        if stream is None:
            stream = _TextStream(request, self.tokenizer)
            stream.push(request.output_ids)
            stream.close()
        return stream.text

    def text_of(self, request: Request) -> str:
        """The text of the request as far as it is certain: what may become a stop string is not in it."""
        return self._text(request)

    def forget(self, samples: Sequence[Request]) -> None:
        """Nobody will ask for the text of these requests again."""
        for request in samples:
            self._streams.pop(request.arrival, None)
            self._named_prompts.pop(request.arrival, None)
            self._named_outputs.pop(request.arrival, None)

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        wants = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._text(request),
            token_ids=request.output_ids,
            cumulative_logprob=sum(request.token_logprobs) if wants else None,
            logprobs=cast(
                "list[PositionLogprobs] | None",
                self._named(request, request.top_logprobs, self._named_outputs) if wants else None,
            ),
            finish_reason=request.finish.reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )

    def _named(
        self,
        request: Request,
        positions: Sequence[PositionLogprobs | None],
        known: dict[int, list[PositionLogprobs | None]],
    ) -> list[PositionLogprobs | None]:
        """The same with each token's text. What was made for an earlier output is `known`: else the outputs of a
        request that is read as it grows would take quadratic time."""
        named = known.setdefault(request.arrival, [])
        named.extend(position and self._with_text(position) for position in positions[len(named) :])
        return list(named)

    def _with_text(self, position: PositionLogprobs) -> PositionLogprobs:
        if self.tokenizer is None:
            return position
        return {
            token: Logprob(p.logprob, p.rank, self.tokenizer.decode([token], skip_special_tokens=False))
            for token, p in position.items()
        }
