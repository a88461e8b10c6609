"""The Python API, in the shape that vLLM users know.

from headrace import LLM, SamplingParams
llm = LLM()                                   # the bundled model
out = llm.generate(["def fib(n):"], SamplingParams(temperature=0.6, max_tokens=64, seed=1))
print(out[0].outputs[0].text)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, RequestError, TokenizerError, ToolCallError
from headrace.front import Encoded, Prompt, TextFront, TextHook
from headrace.models.checkpoint import load_model, resolve_model
from headrace.models.registry import read_config
from headrace.outputs import CompletionOutput, RequestOutput, ScoreOutput
from headrace.params import SamplingParams
from headrace.request import Request
from headrace.text.tokenizer import Tokenizer
from headrace.text.tools import ToolChoice, ToolFormat, choose_format, structural_tag

BUNDLED_MODEL = Path(__file__).parent / "assets" / "headrace-py-16m"
BUNDLED_DRAFT = Path(__file__).parent / "assets" / "headrace-py-draft"


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
        if model is None:  # the bundled model brings its drafter
            options = {"draft_model": str(BUNDLED_DRAFT), **{k: v for k, v in options.items() if v is not None}}
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
        spellings = self.tokenizer.spellings if self.tokenizer else None
        self.engine = Engine(self.config, network, eos_ids=eos_ids, spellings=spellings)
        self.front = TextFront(self.engine, self.tokenizer)
        self._ids = itertools.count()

    # Generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
        deadline_s: float | None = None,
        use_tqdm: bool = False,
        on_text: TextHook | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts; outputs are in the order of the prompts.

        One params object serves all prompts, or one a prompt; so does `priority`, and the lower number is served
        first. What is not finished after `deadline_s` seconds ends with the tokens it has and the reason `timeout`.
        Raises RequestError before anything runs if any prompt or parameter is bad. `on_text(request, text)` is called
        as text becomes certain.
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        encoded = [self.front.encode(prompt) for prompt in batch]
        self.front.on_text = on_text
        try:
            return self._run(encoded, params, use_tqdm, _as_priorities(priority, len(batch)), deadline_s)
        finally:
            self.front.on_text = None

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        priority: int | Sequence[int] = 0,
        deadline_s: float | None = None,
        use_tqdm: bool = False,
        on_text: TextHook | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        tool_format: str | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of {"role", "content"}, through the chat template: see `generate`.

        tools: functions that the model may call, [{"type": "function", "function": {"name", "description",
            "parameters"}}]; each sample's `tool_calls` are those it makes. A call that cannot be read is its `error`.
        tool_choice: `auto`, `required` (at least one call and no text), or {"function": name} (one call of that one).
        tool_format: how the model writes calls, a name from docs/systems.md; if not given, known by the template.
        """
        if self.tokenizer is None:
            raise TokenizerError("chat needs the tokenizer's template: leave out skip_tokenizer_init")
        single = bool(messages) and isinstance(messages[0], dict)
        conversations = cast("Sequence[Sequence[dict[str, Any]]]", [messages] if single else messages)
        prompts: list[Prompt] = [
            {"prompt_token_ids": self.tokenizer.encode_chat(one, add_generation_prompt, tools)} for one in conversations
        ]
        reader: ToolFormat | None = None
        if tools is not None:
            reader = choose_format(tool_format, self.tokenizer.chat_templates.source(with_tools=True))
            tag = structural_tag(reader, tools, tool_choice, self.tokenizer.special_id)
            sampling_params = [_with_tag(one, tag) for one in _as_params(sampling_params, len(prompts))]
        elif tool_format is not None or tool_choice != "auto":
            raise RequestError("tool_choice and tool_format are for tools, and none are passed: leave them out")
        outputs = self.generate(
            prompts, sampling_params, priority=priority, deadline_s=deadline_s, use_tqdm=use_tqdm, on_text=on_text
        )
        if reader is not None:
            for output in outputs:
                for sample in output.outputs:
                    self._read_calls(sample, reader)
        return outputs

    def _read_calls(self, sample: CompletionOutput, reader: ToolFormat) -> None:
        """Find the tool calls of a finished sample."""
        assert self.tokenizer is not None
        ids = list(sample.token_ids)
        if sample.finish_reason == "stop" and ids and ids[-1] in self.tokenizer.eos_ids:
            ids.pop()
        sample.tool_calls = []
        try:
            sample.tool_calls = reader.read(self.tokenizer.decode(ids, skip_special_tokens=False))
        except ToolCallError as error:
            sample.error = sample.error or error

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
        heads = [self.front.encode(prompt)[0] for prompt in batch]
        tails: list[list[int]] = [[] for _ in batch]
        if continuations is not None:
            tails = [self.front.encode(tail, special=False)[0] for tail in _as_batch(continuations)]
            if len(tails) != len(heads):
                raise RequestError(f"{len(tails)} continuations for {len(heads)} prompts: give one a prompt")
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, detokenize=False)
        encoded: list[Encoded] = [(h + t, None) for h, t in zip(heads, tails, strict=True)]
        outputs = self._run(encoded, [params] * len(encoded), use_tqdm, [0] * len(encoded), None)
        return [
            _as_score(output, len(head) if continuations is not None else 1)
            for output, head in zip(outputs, heads, strict=True)
        ]

    def _run(
        self,
        encoded: Sequence[Encoded],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        priorities: Sequence[int],
        deadline_s: float | None,
    ) -> list[RequestOutput]:
        if self.front.live:
            raise RequestError("an AsyncLLM drives this model's engine: send requests there, or shut it down first")
        queued: list[list[Request]] = []
        try:
            for number, (prompt, one, priority) in enumerate(zip(encoded, params, priorities, strict=True)):
                request_id = str(next(self._ids))
                queued.append(
                    self.front.add(
                        prompt, one, request_id=request_id, number=number, priority=priority, deadline_s=deadline_s
                    )
                )
            total = sum(map(len, queued))
            with tqdm(total=total, desc="generating", unit="req", disable=not use_tqdm, dynamic_ncols=True) as bar:
                self._drain(bar)
            return [self.front.output(samples) for samples in queued]
        except BaseException:
            # An interrupted call must not leave requests behind that the next call would run.
            for samples in queued:
                self.engine.abort(samples[0].request_id)
            raise
        finally:
            for samples in queued:
                self.front.forget(samples)

    def _drain(self, bar: Any) -> None:
        start_tokens = self.engine.stats.output_tokens
        while self.engine.has_work:
            for request in self.engine.step():
                if request.finish:
                    bar.update()
                    self.front.close(request)
            tokens = self.engine.stats.output_tokens - start_tokens
            elapsed_s = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{tokens / elapsed_s:,.0f} tok/s", refresh=False)


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


def _with_tag(params: SamplingParams, tag: dict[str, Any]) -> SamplingParams:
    """The parameters with the constraint of tool calls. Raises RequestError beside another constraint."""
    if params.constraint is not None:
        raise RequestError(f"{params.constraint} is given beside tools, which are a constraint too: give one of them")
    return dataclasses.replace(params, structural_tag=tag)


def _as_priorities(priority: int | Sequence[int], count: int) -> list[int]:
    if not isinstance(priority, Sequence):
        return [priority] * count
    if len(priority) != count:
        raise RequestError(f"{len(priority)} priorities for {count} prompts: give one for all, or one a prompt")
    return list(priority)


def _as_score(output: RequestOutput, scored_from: int) -> ScoreOutput:
    tokens = output.prompt_token_ids
    positions = output.prompt_logprobs or [None]
    logprobs = [p[token].logprob if p else None for token, p in zip(tokens, positions, strict=True)]
    total = sum(value for value in logprobs[scored_from:] if value is not None)
    return ScoreOutput(token_ids=tokens, logprobs=logprobs, scored_from=scored_from, total=total)
