"""The Python API, in the shape that vLLM users know.

from headrace import LLM, SamplingParams
llm = LLM()                                   # the bundled model
out = llm.generate(["def fib(n):"], SamplingParams(temperature=0.6, max_tokens=64, seed=1))
print(out[0].outputs[0].text)
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, cast

from tqdm import tqdm

from headrace.checks import show, whole_number
from headrace.config import EngineConfig
from headrace.engine.adapters import LoadedAdapter
from headrace.errors import EngineDeadError, RequestError, TokenizerError, ToolCallError
from headrace.front import Encoded, Prompt, TextHook
from headrace.models.checkpoint import resolve_model
from headrace.models.registry import read_config
from headrace.outputs import CompletionOutput, RequestOutput, ScoreOutput
from headrace.params import SamplingParams
from headrace.progress import Stages
from headrace.request import Request
from headrace.start import Settings, choose_device, gather, load_tokenizer, start
from headrace.text.tools import ToolChoice, ToolFormat, choose_format, structural_tag

log = logging.getLogger("headrace")

OutputHook = Callable[[int, RequestOutput], None]
"""Called with the place of a prompt in its call and its output, as soon as all its samples have ended."""

BUNDLED_MODEL = Path(__file__).parent / "assets" / "headrace-py-16m"
BUNDLED_DRAFT = Path(__file__).parent / "assets" / "headrace-py-draft"


class LLM:
    """Generates text with one model.

    Parameters
    ----------
    model: directory or hub id of a checkpoint; the bundled model if None.
    options: fields of `EngineConfig`, e.g. device, dtype, load_format, max_model_len, max_num_seqs,
        max_num_batched_tokens, gpu_memory_utilization, seed, skip_tokenizer_init. With `tensor_parallel_size` above 1
        other processes are started; if one of them fails, or Ctrl-C interrupts a call, all end, and what follows is
        EngineDeadError.

    stages: is told which stage of the start begins.

    Raises ConfigError for options that cannot work, CheckpointError for broken files.
    """

    def __init__(self, model: str | Path | None = None, *, stages: Stages | None = None, **options: Any) -> None:
        if model is None and options.get("draft_model") is None and "draft_model" in str(options.get("decoder")):
            options = {**options, "draft_model": str(BUNDLED_DRAFT)}  # the bundled model brings its drafter
        self.config = EngineConfig(model=cast("str | None", model), **options)
        stages = Stages(self.config.progress) if stages is None else stages
        with stages.stage("device"):
            device = choose_device(self.config.device)
        weights = self.config.load_format != "random"
        path = resolve_model(self.config.model or BUNDLED_MODEL, self.config.revision, weights=weights)
        read_config(path)  # a directory that is no checkpoint is said before anything else is missed
        self.path = path
        """Directory of the checkpoint."""
        settings = Settings(self.config, path, device)
        self.tokenizer = load_tokenizer(settings, stages)
        self._ranks = gather(settings)
        try:
            self.front = start(settings, self.tokenizer, self._ranks, stages)
        except BaseException as error:
            told = self._ranks.failed(error)
            if told is error:
                raise
            raise told from told.__cause__
        self.engine = self.front.engine
        self._ids = itertools.count()
        self._busy = threading.Lock()
        # A full collection would go over all that was imported and made so far, and no step begins meanwhile, for 50 to
        # 100 ms. Until this object is gone; then what was made with it can be collected.
        gc.freeze()
        weakref.finalize(self, gc.unfreeze).atexit = False

    def shutdown(self) -> None:
        """End the processes of the other ranks, if there are any; the model cannot be used behind that. A second call
        does nothing. They also end with this object, and with this process."""
        self._ranks.shutdown()

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
        on_output: OutputHook | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts; outputs are in the order of the prompts.

        One params object serves all prompts, or one a prompt; so does `priority`, and the lower number is served
        first. What is not finished after `deadline_s` seconds ends with the tokens it has and the reason `timeout`.
        Raises RequestError before anything runs if any prompt or parameter is bad, naming the first. `on_text(request,
        text)` is called as text becomes certain, `on_output(index, output)` as each prompt is complete. What these
        raise ends the call, and so does Ctrl-C, which waits for the step that runs: all requests of the call are
        aborted, and the next call finds an idle engine. (A second Ctrl-C does not wait; make a new LLM then.)
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        encoded = [self._checked(i, prompt, one, len(batch)) for i, (prompt, one) in enumerate(zip(batch, params))]
        priorities = _as_priorities(priority, len(batch))
        return self._run(encoded, params, use_tqdm, priorities, deadline_s, on_text, on_output)

    def _checked(self, place: int, prompt: Prompt, params: SamplingParams, count: int) -> Encoded:
        try:
            return self.front.check(prompt, params)
        except RequestError as error:
            if count == 1:
                raise
            raise RequestError(f"prompts[{place}]: {error}") from error

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
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        # What is no list, or empty, is no conversation either, and is refused as one.
        single = not is_list or not messages or not isinstance(messages[0], Sequence)
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
        adapter: str | None = None,
        use_tqdm: bool = False,
    ) -> list[ScoreOutput]:
        """Teacher-forced log-probabilities in nats.

        Without continuations every prompt token after the first is scored and counted in `total`. With them
        (one a prompt, encoded on their own without special tokens and appended) `total` counts only theirs. `adapter`:
        the loaded adapter under which all are scored.
        """
        batch = _as_batch(prompts)
        heads = [self.front.encode(prompt)[0] for prompt in batch]
        tails: list[list[int]] = [[] for _ in batch]
        if continuations is not None:
            tails = [self.front.encode(tail, special=False)[0] for tail in _as_batch(continuations)]
            if len(tails) != len(heads):
                raise RequestError(f"{len(tails)} continuations for {len(heads)} prompts: give one a prompt")
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, detokenize=False, adapter=adapter)
        encoded: list[Encoded] = [(h + t, None) for h, t in zip(heads, tails, strict=True)]
        outputs = self._run(encoded, [params] * len(encoded), use_tqdm, [0] * len(encoded), None, None, None)
        return [
            _as_score(output, len(head) if continuations is not None else 1)
            for output, head in zip(outputs, heads, strict=True)
        ]

    # Adapters

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name: what `SamplingParams(adapter=...)` may ask for."""
        return self.engine.adapters.loaded

    def load_adapter(self, name: str, path_or_id: str | os.PathLike[str]) -> None:
        """Load an adapter (LoRA, arXiv 2106.09685) that PEFT saved, from a directory or the hub.

        There is room for `max_adapters` of rank `max_adapter_rank` at most. Raises AdapterError for a name that is
        taken, for lack of room and for a larger rank, CheckpointError for broken files and other shapes than the
        model's, UnsupportedModelError for what is not implemented.
        """
        self._check_own()
        self.engine.load_adapter(name, path_or_id)

    def unload_adapter(self, name: str) -> None:
        """Give its room back. Raises AdapterError if it is not loaded, or unfinished requests use it."""
        self._check_own()
        self.engine.unload_adapter(name)

    def _check_own(self) -> None:
        if self.front.live:
            raise RequestError("an AsyncLLM drives this model's engine: send requests there, or shut it down first")

    def _run(
        self,
        encoded: Sequence[Encoded],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        priorities: Sequence[int],
        deadline_s: float | None,
        on_text: TextHook | None,
        on_output: OutputHook | None,
    ) -> list[RequestOutput]:
        self._check_own()
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "this LLM is in the middle of another call: wait for its end, or use an AsyncLLM for many callers"
            )
        queued: dict[str, list[Request]] = {}
        try:
            with interrupts_between_steps() as let_through:
                self.front.on_text = on_text
                try:
                    for number, (prompt, one, priority) in enumerate(zip(encoded, params, priorities, strict=True)):
                        request_id = str(next(self._ids))
                        queued[request_id] = self.front.add(
                            prompt, one, request_id=request_id, number=number, priority=priority, deadline_s=deadline_s
                        )
                    return self._drain(queued, use_tqdm, on_output, let_through)
                except BaseException:
                    # An interrupted call must not leave requests behind that the next call would run.
                    with contextlib.suppress(EngineDeadError):
                        for request_id in queued:
                            self.engine.abort(request_id)
                    raise
                finally:
                    self.front.on_text = None
                    for samples in queued.values():
                        self.front.forget(samples)
        finally:
            self._busy.release()

    def _drain(
        self,
        queued: Mapping[str, Sequence[Request]],
        use_tqdm: bool,
        on_output: OutputHook | None,
        let_through: Callable[[], None],
    ) -> list[RequestOutput]:
        """Step until all have ended; their outputs in the order in which they were queued."""
        places = {request_id: place for place, request_id in enumerate(queued)}
        outputs: dict[int, RequestOutput] = {}
        start_tokens = self.engine.stats.output_tokens
        total = sum(map(len, queued.values()))
        # Even a bar that shows nothing starts a thread.
        shown = tqdm(total=total, desc="generating", unit="req", dynamic_ncols=True) if use_tqdm else nullcontext()
        with shown as bar:
            while self.engine.has_work:
                let_through()
                for request in self.engine.step():
                    if not request.finish:
                        continue
                    self.front.close(request)
                    if request.request_id not in places:
                        continue  # somebody has put it into the engine himself
                    samples, place = queued[request.request_id], places[request.request_id]
                    if all(sample.finish for sample in samples):
                        outputs[place] = self.front.output(samples)
                        if on_output:
                            on_output(place, outputs[place])
                    if bar is not None:
                        bar.update()
                if bar is not None:
                    tokens = self.engine.stats.output_tokens - start_tokens
                    elapsed_s = bar.format_dict["elapsed"] or 1e-9
                    bar.set_postfix_str(f"{tokens / elapsed_s:,.0f} tok/s", refresh=False)
        let_through()
        return [outputs[place] for place in range(len(queued))]


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back, and yield the function that lets it through: raised in the middle of a step it would leave
    half of what the step changes. A second one is not held back: a step may hang.

    Only the main thread gets signals, and only Python's handlers can wait: elsewhere nothing is held back.
    """
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if in_main else None
    if not callable(before):
        yield lambda: None
        return
    handler: Callable[[int, FrameType | None], Any] = before
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(frame)
        if len(held) > 1:
            handler(number, frame)

    def let_through() -> None:
        if held:
            frame = held[0]
            held.clear()
            handler(signal.SIGINT, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, before)
    let_through()


def _as_batch(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    try:
        batch = None if isinstance(prompts, bytes) else list(prompts)
    except TypeError:
        batch = None
    if batch is None:
        raise RequestError(f"prompts is {show(prompts)}; give a text, token ids, or a list of such")
    if batch and all(whole_number(token) is not None for token in batch):
        return [batch]
    return batch


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Sequence):
        raise RequestError(f"sampling_params is {show(params)}; give a SamplingParams(...), or a list of them")
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling params for {count} prompts: give one for all, or one a prompt")
    return list(params)


def _with_tag(params: SamplingParams, tag: dict[str, Any]) -> SamplingParams:
    """The parameters with the constraint of tool calls. Raises RequestError beside another constraint."""
    if params.constraint is not None:
        raise RequestError(f"{params.constraint} is given beside tools, which are a constraint too: give one of them")
    return dataclasses.replace(params, structural_tag=tag)


def _as_priorities(priority: Any, count: int) -> list[int]:
    if not isinstance(priority, Sequence) or isinstance(priority, str):
        return [cast("int", priority)] * count
    if len(priority) != count:
        raise RequestError(f"{len(priority)} priorities for {count} prompts: give one for all, or one a prompt")
    return list(priority)


def _as_score(output: RequestOutput, scored_from: int) -> ScoreOutput:
    tokens = output.prompt_token_ids
    positions = output.prompt_logprobs or [None]
    logprobs = [p[token].logprob if p else None for token, p in zip(tokens, positions, strict=True)]
    total = sum(value for value in logprobs[scored_from:] if value is not None)
    return ScoreOutput(token_ids=tokens, logprobs=logprobs, scored_from=scored_from, total=total)
