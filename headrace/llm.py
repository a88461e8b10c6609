"""The Python API, in the shape that vLLM users know.

from headrace import LLM, SamplingParams
llm = LLM()                                   # the bundled model
out = llm.generate(["def fib(n):"], SamplingParams(temperature=0.6, max_tokens=64, seed=1))
print(out[0].outputs[0].text)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, RequestError, TokenizerError
from headrace.models.checkpoint import load_model, resolve_model
from headrace.models.registry import read_config
from headrace.outputs import CompletionOutput, RequestMetrics, RequestOutput, ScoreOutput
from headrace.params import SamplingParams
from headrace.request import Logprob, PositionLogprobs, Request
from headrace.text.detokenize import IncrementalDetokenizer
from headrace.text.stop import StopMatcher
from headrace.text.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parent / "assets" / "headrace-py-16m"
BUNDLED_DRAFT = Path(__file__).parent / "assets" / "headrace-py-draft"

Prompt = str | dict[str, Any] | list[int]
"""Text, token ids, or a dict with `prompt` or `prompt_token_ids`."""

TextHook = Callable[[Request, str], None]
"""Called with a request and the text that has become certain."""


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


class LLM:
    """Generates text with one model.

    Parameters
    ----------
    model: directory or hub id of a checkpoint; the bundled model if None.
    options: fields of `EngineConfig`, e.g. device, dtype, load_format, max_model_len, max_num_seqs,
        max_num_batched_tokens, gpu_memory_utilization, seed, skip_tokenizer_init.

    Raises ConfigError for options that cannot work, CheckpointError for broken files.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        known = [f.name for f in dataclasses.fields(EngineConfig)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; known: {', '.join(known)}")
        self.config = EngineConfig(model=None if model is None else str(model), **options)
        device = _choose_device(self.config.device)
        weights = self.config.load_format != "random"
        path = resolve_model(self.config.model or BUNDLED_MODEL, self.config.revision, weights=weights)
        read_config(path)  # a directory that is no checkpoint is said before anything else is missed
        self.tokenizer: Tokenizer | None = None
        if not self.config.skip_tokenizer_init:
            tokenizer_path = resolve_model(self.config.tokenizer, weights=False) if self.config.tokenizer else path
            self.tokenizer = Tokenizer.from_dir(tokenizer_path)
        network = load_model(
            str(path),
            device=device,
            dtype=self.config.dtype,
            load_format=self.config.load_format,
            max_model_len=self.config.max_model_len,
            seed=self.config.seed,
        )
        eos_ids = self.tokenizer.eos_ids if self.tokenizer else list(network.config.eos_token_ids)
        self.engine = Engine(self.config, network, eos_ids=eos_ids)
        self.engine.on_token = self._on_token
        self._streams: dict[int, _TextStream] = {}
        self._on_text: TextHook | None = None
        self._ids = itertools.count()

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_text: TextHook | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts; outputs are in the order of the prompts.

        One params object serves all prompts, or one a prompt. Raises RequestError before anything runs if any
        prompt or parameter is bad. `on_text(request, text)` is called as text becomes certain.
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        encoded = [self._encode(prompt) for prompt in batch]
        self._on_text = on_text
        try:
            return self._run(encoded, params, use_tqdm)
        finally:
            self._on_text = None
            self._streams.clear()

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        use_tqdm: bool = False,
        on_text: TextHook | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of {"role", "content"}, through the model's chat template."""
        if self.tokenizer is None:
            raise TokenizerError("chat needs the tokenizer's template: leave out skip_tokenizer_init")
        single = bool(messages) and isinstance(messages[0], dict)
        conversations = cast("Sequence[Sequence[dict[str, Any]]]", [messages] if single else messages)
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.encode_chat(one, add_generation_prompt=add_generation_prompt)}
            for one in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_text=on_text)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[ScoreOutput]:
        """Teacher-forced log-probabilities in nats.

        Without continuations every prompt token after the first is scored and counted in `total`. With them
        (one a prompt, encoded on their own without special tokens and appended) `total` counts only theirs.
        """
        batch = _as_batch(prompts)
        heads = [self._encode(prompt)[0] for prompt in batch]
        tails: list[list[int]] = [[] for _ in batch]
        if continuations is not None:
            tails = [self._encode(tail, special=False)[0] for tail in _as_batch(continuations)]
            if len(tails) != len(heads):
                raise RequestError(f"{len(tails)} continuations for {len(heads)} prompts: give one a prompt")
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, detokenize=False)
        encoded: list[tuple[list[int], str | None]] = [(h + t, None) for h, t in zip(heads, tails, strict=True)]
        outputs = self._run(encoded, [params] * len(encoded), use_tqdm)
        return [
            _as_score(output, len(head) if continuations is not None else 1)
            for output, head in zip(outputs, heads, strict=True)
        ]

    def _run(
        self, encoded: Sequence[tuple[list[int], str | None]], params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        queued: list[list[Request]] = []
        try:
            for number, ((tokens, text), one) in enumerate(zip(encoded, params, strict=True)):
                if one.stop_strings and self.tokenizer is None:
                    raise RequestError("stop strings need the tokenizer: leave out skip_tokenizer_init")
                request_id = str(next(self._ids))
                queued.append(self.engine.add(tokens, one, request_id=request_id, prompt=text, number=number))
            total = sum(map(len, queued))
            with tqdm(total=total, desc="generating", unit="req", disable=not use_tqdm, dynamic_ncols=True) as bar:
                self._drain(bar)
        except BaseException:
            # An interrupted call must not leave requests behind that the next call would run.
            for samples in queued:
                self.engine.abort(samples[0].request_id)
            raise
        return [self._output(samples) for samples in queued]

    def _drain(self, bar: Any) -> None:
        start_tokens = self.engine.stats.output_tokens
        while self.engine.has_work:
            for request in self.engine.step():
                if request.finish:
                    bar.update()
                    self._close(request)
            tokens = self.engine.stats.output_tokens - start_tokens
            elapsed_s = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{tokens / elapsed_s:,.0f} tok/s", refresh=False)

    # Text

    def _on_token(self, request: Request, tokens: list[int]) -> str | None:
        """Text is only made as the tokens come where somebody waits for it: a stop string or a listener."""
        if self.tokenizer is None or not (request.params.stop_strings or self._on_text):
            return None
        if not request.params.detokenize:
            return None
        stream = self._streams.get(request.arrival)
        if stream is None:
            stream = self._streams[request.arrival] = _TextStream(request, self.tokenizer)
            tokens = request.output_ids
        new = stream.push(tokens)
        if new and self._on_text:
            self._on_text(request, new)
        return stream.stopped

    def _close(self, request: Request) -> None:
        stream = self._streams.get(request.arrival)
        if stream is not None:
            rest = stream.close()
            if rest and self._on_text:
                self._on_text(request, rest)

    def _text(self, request: Request) -> str:
        if self.tokenizer is None or not request.params.detokenize:
            return ""
        stream = self._streams.get(request.arrival)
        if stream is None:
            stream = _TextStream(request, self.tokenizer)
            stream.push(request.output_ids)
            stream.close()
        return stream.text

    def _encode(self, prompt: Prompt, special: bool = True) -> tuple[list[int], str | None]:
        """Token ids and, where it was given, the text."""
        text: str
        if isinstance(prompt, str):
            text = prompt
        elif isinstance(prompt, list):
            return prompt, None
        elif isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"]), prompt.get("prompt")
        elif isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str):
            text = prompt["prompt"]
        else:
            raise RequestError(
                f"a prompt is {type(prompt).__name__} {prompt!r:.80}; give text, token ids, "
                'or {"prompt": ...} or {"prompt_token_ids": [...]}'
            )
        if self.tokenizer is None:
            raise RequestError(
                "a text prompt needs the tokenizer: pass prompt_token_ids or leave out skip_tokenizer_init"
            )
        return self.tokenizer.encode(text, add_special_tokens=special), text

    def _output(self, samples: Sequence[Request]) -> RequestOutput:
        first = samples[0]
        scores = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=first.request_id,
            prompt=first.prompt,
            prompt_token_ids=first.tokens[: first.prompt_len],
            prompt_logprobs=[p and self._named(p) for p in first.prompt_logprobs or [None]] if scores else None,
            outputs=[self._completion(i, request) for i, request in enumerate(samples)],
            finished=all(request.finish for request in samples),
            seed=first.seed,
            metrics=RequestMetrics(
                arrival_s=first.arrival_s,
                first_token_s=min((s.first_token_s for s in samples if s.first_token_s is not None), default=None),
                finish_s=max((s.finish_s for s in samples if s.finish_s is not None), default=None),
                cached_tokens=first.hit_tokens,
                preemptions=sum(s.preemptions for s in samples),
            ),
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        wants = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._text(request),
            token_ids=request.output_ids,
            cumulative_logprob=sum(request.token_logprobs) if wants else None,
            logprobs=[self._named(position) for position in request.top_logprobs] if wants else None,
            finish_reason=request.finish.reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )

    def _named(self, position: PositionLogprobs) -> PositionLogprobs:
        """The same with each token's text."""
        if self.tokenizer is None:
            return position
        return {
            token: Logprob(p.logprob, p.rank, self.tokenizer.decode([token], skip_special_tokens=False))
            for token, p in position.items()
        }


def _choose_device(name: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            "device is 'cuda'; torch finds no GPU here: use device='cpu' or install a CUDA build of torch"
        )
    return torch.device("cuda" if name == "cuda" or (name == "auto" and has_gpu) else "cpu")


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    batch = list(prompts)
    if batch and all(isinstance(token, int) for token in batch):
        return [batch]  # type: ignore[list-item]
    return batch  # type: ignore[return-value]


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Iterable) or len(params) != count:
        raise RequestError(f"{len(params)} sampling params for {count} prompts: give one for all, or one a prompt")
    return list(params)


def _as_score(output: RequestOutput, scored_from: int) -> ScoreOutput:
    tokens = output.prompt_token_ids
    positions = output.prompt_logprobs or [None]
    logprobs = [p[token].logprob if p else None for token, p in zip(tokens, positions, strict=True)]
    total = sum(value for value in logprobs[scored_from:] if value is not None)
    return ScoreOutput(token_ids=tokens, logprobs=logprobs, scored_from=scored_from, total=total)
