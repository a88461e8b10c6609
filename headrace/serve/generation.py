"""One prompt in flight, as its reader sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.errors import HeadraceError
from headrace.outputs import CompletionOutput, RequestMetrics, RequestOutput
from headrace.params import SamplingParams
from headrace.request import PositionLogprobs
from headrace.serve.messages import Accepted, Delta, End, unpacked
from headrace.text.detokenize import IncrementalDetokenizer
from headrace.text.tokenizer import Tokenizer


@dataclass
class SampleUpdate:
    """What is new of one sample."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
    error: HeadraceError | None


@dataclass
class Update:
    """What is new since the last read."""

    samples: list[SampleUpdate]
    finished: bool


@dataclass(eq=False)
class _Sample:
    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    decoded: int = 0
    """Tokens whose text was made."""
    told_text: int = 0
    told_tokens: int = 0
    finish: str | None = None
    stop_reason: int | str | None = None
    error: HeadraceError | None = None
    detokenizer: IncrementalDetokenizer | None = None
    is_told: bool = False
    is_whole: bool = False
    """Whether its last text was made."""


class Generation:
    """The updates of one prompt: `async for update in generation`, or all at once by `result`.

    What comes while nobody reads is merged: a slow reader costs memory for its tokens and holds nobody.
    """

    def __init__(
        self,
        request_id: str,
        number: int,
        ids: list[int],
        text: str | None,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        leave: Callable[[Generation], None],
    ) -> None:
        self.request_id = request_id
        self.number = number
        self.prompt_token_ids = ids
        self.seed = 0
        self.params = params
        self.handed_out = 0
        """Tokens that the reader has got."""
        self._prompt = text
        self._tokenizer = tokenizer
        self._leave = leave
        self._news = asyncio.Event()
        self._taken = asyncio.Event()
        self._error: HeadraceError | None = None
        self._dropped = False
        self.forget()

    def forget(self) -> None:
        """Begin anew: the engine died, and nothing was handed out."""
        self._samples = [_Sample() for _ in range(self.params.n)]
        self._end: End | None = None

    # From the engine

    def accept(self, message: Accepted) -> None:
        """The engine has queued it."""
        self.seed = message.seed
        if message.ids is not None:
            self.prompt_token_ids = message.ids
        self._taken.set()

    def fail(self, error: HeadraceError) -> None:
        """There will be no more."""
        self._error = error
        self._taken.set()
        self._news.set()

    def push(self, delta: Delta) -> None:
        """Something new of a sample."""
        sample = self._samples[delta.sample]
        sample.tokens += delta.tokens
        if delta.text is not None:
            sample.text.append(delta.text)
        if delta.logprobs is not None:
            sample.logprobs += [unpacked(position, self._token_text) for position in delta.logprobs]
        if delta.finish is not None:
            sample.finish, sample.stop_reason = delta.finish, delta.stop_reason
            sample.error = None if delta.failure is None else delta.failure.error()
        self._news.set()

    def end(self, message: End) -> None:
        """All samples have ended."""
        self._end = message
        self._news.set()

    @property
    def finished(self) -> bool:
        """Whether the engine is done with it."""
        return self._end is not None or self._error is not None

    # To the reader

    async def accepted(self) -> None:
        """Wait until the engine has queued it. Raises RequestError if it never can be served, EngineDeadError."""
        await self._taken.wait()
        if self._error is not None:
            raise self._error

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Update:
        """What is new, as soon as there is something. Raises what the request failed with."""
        if self._samples and all(sample.is_told for sample in self._samples):
            raise StopAsyncIteration
        while True:
            self._news.clear()
            if self._error is not None:
                raise self._error
            update = self._take()
            if update.samples:
                return update
            await self._news.wait()

    async def result(self) -> RequestOutput:
        """The whole output, as `LLM.generate` returns it. Raises what the request failed with."""
        while self._end is None:
            self._news.clear()
            if self._error is not None:
                raise self._error
            await self._news.wait()
        end = self._end
        named = None
        if end.prompt_logprobs is not None:
            named = [None if one is None else unpacked(one, self._token_text) for one in end.prompt_logprobs]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=named,
            outputs=[self._completion(index) for index in range(len(self._samples))],
            finished=True,
            seed=self.seed,
            metrics=RequestMetrics(
                arrival_s=end.arrival_s,
                first_token_s=end.first_token_s,
                finish_s=end.finish_s,
                cached_tokens=end.cached_tokens,
                preemptions=end.preemptions,
                peak_cache_slots=end.peak_cache_slots,
                peak_cache_bytes=end.peak_cache_bytes,
            ),
        )

    async def aclose(self) -> None:
        """Nobody reads it any more: it ends within a step."""
        if not self.finished and not self._dropped:
            self._dropped = True
            self._leave(self)

    def _take(self) -> Update:
        made = []
        for index, sample in enumerate(self._samples):
            if sample.is_told or (len(sample.tokens) == sample.told_tokens and sample.finish is None):
                continue
            self._make_text(sample)
            tokens = sample.tokens[sample.told_tokens :]
            wanted = self.params.logprobs is not None
            text = "".join(sample.text[sample.told_text :])
            made.append(
                SampleUpdate(
                    index,
                    text,
                    tokens,
                    sample.logprobs[sample.told_tokens :] if wanted else None,
                    sample.finish,
                    sample.stop_reason,
                    sample.error,
                )
            )
            self.handed_out += len(tokens)
            sample.told_tokens, sample.told_text = len(sample.tokens), len(sample.text)
            sample.is_told = sample.finish is not None
        return Update(made, self._end is not None)

    def _make_text(self, sample: _Sample) -> None:
        """Text of the tokens that came, where the engine does not make it for a stop string."""
        if self._tokenizer is None or not self.params.detokenize or self.params.stop_strings:
            return
        if sample.detokenizer is None:
            sample.detokenizer = IncrementalDetokenizer(
                self._tokenizer, self.prompt_token_ids, self.params.skip_special_tokens
            )
        push = sample.detokenizer.push
        text = "".join([push(token) for token in sample.tokens[sample.decoded :]])
        sample.decoded = len(sample.tokens)
        if sample.finish is not None and not sample.is_whole:
            sample.is_whole = True
            text += sample.detokenizer.finish()
        if text:
            sample.text.append(text)

    def _completion(self, index: int) -> CompletionOutput:
        sample = self._samples[index]
        self._make_text(sample)
        wants = self.params.logprobs is not None
        total = sum(p[token].logprob for token, p in zip(sample.tokens, sample.logprobs)) if wants else None
        return CompletionOutput(
            index=index,
            text="".join(sample.text),
            token_ids=sample.tokens,
            cumulative_logprob=total,
            logprobs=sample.logprobs if wants else None,
            finish_reason=sample.finish,
            stop_reason=sample.stop_reason,
            error=sample.error,
        )

    def _token_text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
