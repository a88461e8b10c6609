"""Everything that a caller can do wrong, in one list: the tests try each, and docs/errors.md is what came of it.

A `Case` is refused with an error of `headrace.errors`, a `Command` ends with an exit status and one line, and an
`Allowed` looks wrong and is not. `Bench` is the tiny model that they run on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast
from unittest import mock

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.cli import main
from headrace.commands.output import Lines
from headrace.config import EngineConfig
from headrace.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    HeadraceError,
    NumericalError,
    OutputError,
    QueueFullError,
    RequestError,
    TokenizerError,
    UnsupportedModelError,
)
from headrace.memory import GIB
from headrace.models.checkpoint import load_model
from headrace.request import Request

NAN, INF = float("nan"), float("inf")
VOCAB = 264
MODEL_LEN = 64
NAN_TOKEN = VOCAB - 1
"""Its embedding is NaN."""
SMALL: dict[str, Any] = {"device": "cpu", "num_pages": 96, "page_size": 4, "max_num_seqs": 4}
SMALL |= {"max_num_batched_tokens": 64, "check_invariants": True}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": MODEL_LEN,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}
TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role not in ("system", "user", "assistant") -%}{{ raise_exception("no such role: " ~ m.role) }}{%- endif -%}
{{ m.role }}: {{ m.content }}
{% endfor -%}
"""
MEMORY_BYTES = 8 * GIB
"""What the machine is said to have, so that messages do not depend on it."""


class Bench:
    """A tiny model with a tokenizer, copies of it to damage, and an LLM. Leaves nothing behind."""

    def __init__(self) -> None:
        self._exit = contextlib.ExitStack()
        self.root = Path(self._exit.enter_context(tempfile.TemporaryDirectory()))

    def __enter__(self) -> Bench:
        memory = "headrace.memory._machine_bytes", "headrace.memory.group_room_bytes"
        self._exit.enter_context(mock.patch(memory[0], return_value=MEMORY_BYTES))
        self._exit.enter_context(mock.patch(memory[1], return_value=[]))
        hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.root / "cache")}
        self._exit.enter_context(mock.patch.dict(os.environ, hub))
        self._make()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def _make(self) -> None:
        self.model = self.root / "tiny"
        self.model.mkdir()
        (self.model / "config.json").write_text(json.dumps(CONFIG))
        network = load_model(self.model, device="cpu", load_format="random", seed=1)
        tensors = {}
        for name, views in network.tensors().items():
            values = views[0].contiguous().clone()
            tensors[name] = values if values.dim() == 1 else values * (200.0 if "lm_head" in name else 20.0)
        tensors["model.embed_tokens.weight"][NAN_TOKEN] = NAN
        tensors["lm_head.weight"][NAN_TOKEN] = 0.0  # far below the best: it is never drawn
        save_file(tensors, str(self.model / "model.safetensors"))
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocab = {letter: place for place, letter in enumerate(alphabet)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>"])
        backend.save(str(self.model / "tokenizer.json"))
        (self.model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
        (self.model / "chat_template.jinja").write_text(TEMPLATE)

    @cached_property
    def llm(self) -> LLM:
        """One for all cases that need no other; in float64, where neighbours change no bit that decides."""
        return self.start(dtype="float64")

    def start(self, **options: Any) -> LLM:
        """Another LLM."""
        return LLM(**{"model": str(self.model), **SMALL, **options})

    def generate(self, prompt: Any = "ab", options: Any = None, **params: Any) -> Any:
        """One prompt through the shared LLM; raises what the request failed with."""
        outputs = self.llm.generate(prompt, SamplingParams(**{"max_tokens": 4, **params}), **options or {})
        for output in outputs:
            for sample in output.outputs:
                if sample.error is not None:
                    raise sample.error
        return outputs

    def copy(self, without: str = "", **changes: Any) -> Path:
        """A copy of the model with other entries in config.json, without the files whose names begin so."""
        path = self.root / "copy"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.model, path)
        (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        for file in path.glob(f"{without}*") if without else ():
            file.unlink()
        return path

    def load(self, path: Path, **options: Any) -> LLM:
        """An LLM over a damaged copy."""
        return self.start(model=str(path), **options)

    def record(self, **changes: Any) -> dict[str, Any]:
        """The portable record of a request that has come half its way; entries that are `...` are left out."""
        engine = self.llm.engine
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=1)
        (request,) = engine.add([5, 6, 7], params, request_id="half-way")
        for _ in range(3):
            engine.step()
        record = json.loads(json.dumps(engine.export(request)))
        engine.abort("half-way")
        return {key: value for key, value in {**record, **changes}.items() if value is not ...}

    def sentence(self, error: BaseException | str) -> str:
        """A message without what differs from machine to machine: places, and the words of other libraries."""
        text = str(error)
        cause = error.__cause__ if isinstance(error, BaseException) else None
        while cause is not None:
            if not isinstance(cause, (HeadraceError, OSError)):
                words = (str(cause), (str(cause).splitlines() or [""])[0], getattr(cause, "msg", None))
                for foreign in filter(None, words):
                    text = text.replace(str(foreign), "...")
            cause = cause.__cause__
        text = text.replace(str(self.root), "/models")
        text = re.sub(r"\d+ bytes; SafetensorError: [^)]*", "N bytes; SafetensorError: ...", text)
        text = text.replace(f"tokenizers {tokenizers.__version__}", "tokenizers ...")
        text = re.sub(r"not JSON \([^)]*\)", "not JSON (...)", text)
        text = re.sub(r"\brequest \d+:", "request 7:", text)
        return re.sub(r"configuration [0-9a-f]{12}", "configuration 0123456789ab", text)

    def files(self) -> list[str]:
        """Everything that lies beside the models."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*"))
        return sorted(str(path) for path in found if path.parts[0] not in ("copy", "cache"))


class Case(NamedTuple):
    """Refused: `act` raises an error of exactly this type."""

    name: str
    error: type[HeadraceError]
    act: Callable[[Bench], object]


class Command(NamedTuple):
    """The command line: arguments, of which `{dir}` and `{model}` are filled in; input files; exit status."""

    name: str
    status: int
    arguments: str
    lines: bytes | None = None


class Allowed(NamedTuple):
    """Not refused: `act` returns in words what happens."""

    name: str
    act: Callable[[Bench], str]


def _params(name: str, error: type[HeadraceError] = RequestError, **given: Any) -> Case:
    return Case(name, error, lambda b: b.generate(**given))


def _engine(name: str, error: type[HeadraceError] = ConfigError, **given: Any) -> Case:
    return Case(name, error, lambda b: b.start(**given))


def _prompt(name: str, prompt: Any) -> Case:
    return Case(name, RequestError, lambda b: b.generate(prompt))


def _config(name: str, error: type[HeadraceError], **changes: Any) -> Case:
    return Case(name, error, lambda b: b.load(b.copy(**changes)))


def _text(name: str, error: type[HeadraceError], file: str, text: str | bytes) -> Case:
    """A file of the checkpoint with other contents."""

    def act(bench: Bench) -> None:
        path = bench.copy()
        (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        bench.load(path).chat([{"role": "user", "content": "a"}])

    return Case(name, error, act)


def _record(name: str, **changes: Any) -> Case:
    return Case(name, RequestError, lambda b: b.llm.engine.resume(b.record(**changes)))


def _header(name: str, change: Callable[[bytes], bytes]) -> Case:
    """model.safetensors with other bytes."""

    def act(bench: Bench) -> None:
        path = bench.copy() / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        bench.load(path.parent)

    return Case(name, CheckpointError, act)


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The bytes of a safetensors file after its header was changed in place."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


NORM = "model.norm.weight"


def _tensor(name: str, **changes: Any) -> Case:
    return _header(name, lambda data: with_header(data, lambda header: header[NORM].update(changes)))


def _weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Case:
    def act(bench: Bench) -> None:
        path = bench.copy()
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, str(path / "model.safetensors"))
        bench.load(path)

    return Case(name, CheckpointError, act)


def _sharded(name: str, change: Callable[[dict[str, str], Path], object]) -> Case:
    def act(bench: Bench) -> None:
        path = bench.copy()
        os.rename(path / "model.safetensors", path / "one.safetensors")
        weight_map = dict.fromkeys(load_file(path / "one.safetensors"), "one.safetensors")
        change(weight_map, path)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        bench.load(path)

    return Case(name, CheckpointError, act)


def _chat(name: str, messages: Any) -> Case:
    return Case(name, RequestError, lambda b: b.llm.chat(messages, SamplingParams(max_tokens=2)))


def _async(name: str, error: type[HeadraceError], use: Callable[[AsyncLLM], Any]) -> Case:
    """Inside an AsyncLLM over the shared engine."""

    async def run(bench: Bench) -> None:
        async with AsyncLLM(front=bench.llm.front, max_queue=2) as llm:
            await use(llm)

    return Case(name, error, lambda b: asyncio.run(run(b)))


async def _read(llm: AsyncLLM, *args: Any, **kwargs: Any) -> None:
    async for _ in llm.generate(*args, **kwargs):
        pass


async def _twice(llm: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=None, ignore_eos=True)
    async with contextlib.aclosing(llm.generate("ab", long, "same")) as first:
        await anext(first)
        await _read(llm, "cd", request_id="same")


async def _three(llm: AsyncLLM) -> None:
    long = SamplingParams(max_tokens=None, ignore_eos=True)
    async with (
        contextlib.aclosing(llm.generate("ab", long)) as one,
        contextlib.aclosing(llm.generate("c", long)) as two,
    ):
        await anext(one)
        await anext(two)
        await _read(llm, "ef")


async def _after_shutdown(llm: AsyncLLM) -> None:
    await llm.shutdown()
    await _read(llm, "ab")


async def _sync_beside(llm: AsyncLLM, bench: Bench) -> None:
    await asyncio.to_thread(bench.llm.generate, "ab")


def _inside(bench: Bench) -> None:
    def listen(request: Request, text: str) -> None:
        bench.llm.generate("cd")

    bench.llm.generate("ab", SamplingParams(max_tokens=2), on_text=listen)


class FullDisk(io.RawIOBase):
    """A file on a disk that takes `room` bytes, and may refuse to be closed."""

    def __init__(self, path: Path, room: int, at_close: bool = False) -> None:
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115 (it is closed below)
        self._room, self._at_close = room, at_close

    def write(self, data: Any) -> int:
        """As many bytes as fit."""
        fits = min(len(data), self._room)
        if not fits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._room -= fits
        return self._file.write(data[:fits])

    def tell(self) -> int:
        """The real place."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        """The real file's."""
        return self._file.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        """The real file's."""
        return self._file.truncate(size)

    def fileno(self) -> int:
        """The real file's."""
        return self._file.fileno()

    def close(self) -> None:
        """Late refusals come here."""
        if not self._file.closed:
            self._file.close()
            if self._at_close:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_lines(bench: Bench, room: int, at_close: bool = False) -> None:
    path = bench.root / "out.jsonl"
    lines = Lines(path, 3, opener=lambda p: cast("IO[bytes]", FullDisk(p, room, at_close)))
    try:
        for place in range(3):
            lines.put(place, {"text": "x" * 20})
        lines.close()
    finally:
        path.unlink(missing_ok=True)


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


PROMPTS = [
    _prompt("an empty text", ""),
    _prompt("no token ids", {"prompt_token_ids": []}),
    _prompt("a prompt longer than the model", [5] * 100),
    Case("the second of two prompts is bad", RequestError, lambda b: b.generate(["ab", [5] * 100])),
    _prompt("a prompt that is no prompt", 5),
    _prompt("no prompt", None),
    _prompt("bytes", b"ab"),
    _prompt("a prompt of None", [None]),
    _prompt("half of a surrogate pair", "a\ud800"),
    _prompt("an unknown entry of a prompt", {"prompt": "a", "promt_token_ids": [5]}),
    _prompt("token ids as a text", {"prompt_token_ids": "5, 6"}),
    _prompt("token ids as a number", {"prompt_token_ids": 5}),
    _prompt("a negative token id", [5, -1]),
    _prompt("a token id beyond the vocabulary", [5, VOCAB]),
    _prompt("a huge token id", [5, 2**70]),
    _prompt("a token id that is a float", {"prompt_token_ids": [5, 6.5]}),
    _prompt("a token id that is a bool", {"prompt_token_ids": [5, True]}),
    _prompt("a token id that is a text", {"prompt_token_ids": [5, "6"]}),
    _prompt("a prompt whose logits are NaN", [5, NAN_TOKEN])._replace(error=NumericalError),
    Case("parameters that are a dict", RequestError, lambda b: b.llm.generate("a", cast("Any", {"temperature": 0}))),
    Case(
        "parameters for another number of prompts",
        RequestError,
        lambda b: b.llm.generate(["a", "b"], [SamplingParams()] * 3),
    ),
    Case("parameters with None among them", RequestError, lambda b: b.llm.generate("a", cast("Any", [None]))),
    Case("a priority that is a text", RequestError, lambda b: b.generate(options={"priority": "high"})),
    Case("a deadline in the past", RequestError, lambda b: b.generate(options={"deadline_s": -1})),
    Case("a deadline that is a text", RequestError, lambda b: b.generate(options={"deadline_s": "1"})),
    Case("a deadline beyond all numbers", RequestError, lambda b: b.generate(options={"deadline_s": 10**400})),
    Case("an id that is no text", RequestError, lambda b: b.llm.engine.abort(cast("Any", []))),
    Case("a call from inside a call", RequestError, _inside),
]
PARAMETERS = [
    _params("an unknown name", temprature=1.0),
    _params("temperature below 0", temperature=-0.5),
    _params("temperature NaN", temperature=NAN),
    _params("temperature infinite", temperature=INF),
    _params("temperature as a text", temperature="0.5"),
    _params("temperature None", temperature=None),
    _params("top_p 0", top_p=0.0),
    _params("top_p above 1", top_p=1.5),
    _params("top_p NaN", top_p=NAN),
    _params("top_k below -1", top_k=-2),
    _params("top_k a fraction", top_k=1.5),
    _params("top_k too large", top_k=2**31),
    _params("min_p above 1", min_p=2),
    _params("min_p NaN", min_p=NAN),
    _params("repetition_penalty 0", repetition_penalty=0.0),
    _params("repetition_penalty infinite", repetition_penalty=INF),
    _params("presence_penalty NaN", presence_penalty=NAN),
    _params("frequency_penalty too large", frequency_penalty=1e9),
    _params("seed below 0", seed=-1),
    _params("seed of more than 64 bits", seed=2**64),
    _params("seed a bool", seed=True),
    _params("max_tokens below 0", max_tokens=-1),
    _params("min_tokens above max_tokens", min_tokens=5, max_tokens=3),
    _params("n 0", n=0),
    _params("n too large", n=10**9),
    _params("an empty stop string", stop=["a", ""]),
    _params("stop a number", stop=5),
    _params("a number among the stop strings", stop=["a", 5]),
    _params("stop strings without text", stop="x", detokenize=False),
    _params("stop_token_ids a number", stop_token_ids=5),
    _params("stop_token_ids below 0", stop_token_ids=[-1]),
    _params("stop_token_ids beyond the vocabulary", stop_token_ids=[VOCAB]),
    _params("too many stop_token_ids", stop_token_ids=range(40)),
    _params("logit_bias a list", logit_bias=[1, 2]),
    _params("logit_bias NaN", logit_bias={5: NAN}),
    _params("logit_bias too large", logit_bias={5: 1e300}),
    _params("logit_bias None", logit_bias={5: None}),
    _params("logit_bias beyond the vocabulary", logit_bias={VOCAB: 1.0}),
    _params("allowed_token_ids empty", allowed_token_ids=[]),
    _params("allowed_token_ids beyond the vocabulary", allowed_token_ids=[VOCAB]),
    _params("allowed_token_ids that leave nothing", NumericalError, allowed_token_ids=[9], logit_bias={9: -INF}),
    _params("logprobs below 0", logprobs=-1),
    _params("logprobs beyond the vocabulary", logprobs=VOCAB + 1),
    _params("prompt_logprobs a bool", prompt_logprobs=True),
    _params("prompt_logprobs beyond the vocabulary", prompt_logprobs=10**6),
    _params("truncate_prompt_tokens 0", truncate_prompt_tokens=0),
    _params("ignore_eos a number", ignore_eos=1),
    _params("a decoder that is not loaded", decoder="ngram"),
    _params("an evictor that is not loaded", evictor="key_norm"),
    _params("a budget without an evictor", cache_budget=16),
]
ENGINE = [
    _engine("an unknown option", max_num_sequences=3),
    _engine("an unknown scheduler", scheduler="splitfuze"),
    _engine("an unknown decoder", decoder="autoregressive,n-gram"),
    _engine("an unknown evictor", evictor="keynorm"),
    _engine("an unknown codec", codec="int3"),
    _engine("an unknown selector", selector="qest"),
    _engine("an unknown device", device="gpu"),
    _engine("an unknown type", dtype="fp16"),
    _engine("an unknown load_format", load_format="dummy"),
    _engine("an unknown way of preemption", preemption="swp"),
    _engine("max_num_seqs 0", max_num_seqs=0),
    _engine("max_num_seqs a text", max_num_seqs="8"),
    _engine("page_size a fraction", page_size=4.5),
    _engine("page_size None", page_size=None),
    _engine("num_pages 1", num_pages=1),
    _engine("kv_cache_gib 0", kv_cache_gib=0, num_pages=None),
    _engine("kv_cache_gib NaN", kv_cache_gib=NAN, num_pages=None),
    _engine("gpu_memory_utilization above 1", gpu_memory_utilization=1.5),
    _engine("seed of more than 64 bits", seed=2**64),
    _engine("an empty model name", model=""),
    _engine("a model that is a number", model=5),
    _engine("two sizes of the cache", kv_cache_gib=1.0),
    _engine("max_model_len beyond the model", max_model_len=MODEL_LEN + 1),
    _engine("max_model_len beyond the cache", num_pages=3, max_model_len=MODEL_LEN),
    _engine("an evictor without a budget", evictor="key_norm"),
    _engine("a budget without an evictor", cache_budget=16),
    _engine("a budget below the evictor's least", evictor="key_norm", cache_budget=4),
    _engine("a selector without a budget", selector="quest"),
    _engine("a selector's budget without one", selector_budget=16),
    _engine("a selector beside an evictor", selector="quest", selector_budget=16, evictor="key_norm", cache_budget=16),
    _engine("swap space without swaps", preemption="recompute", swap_space_gib=1.0),
    _engine("swaps without space", preemption="swap", swap_space_gib=0),
    _engine("a drafting decoder without a model", decoder="draft_model"),
    _engine("a drafting model without its decoder", draft_model="somewhere"),
    _engine("a tokenizer and none", tokenizer="somewhere", skip_tokenizer_init=True),
    _engine("a revision of a directory", revision="main"),
    Case("max_queue 0", ConfigError, lambda b: AsyncLLM(str(b.model), max_queue=0, **SMALL)),
    Case("an unknown option of the configuration", ConfigError, lambda b: cast("Any", EngineConfig)(decoders="ngram")),
    Case("a text without a tokenizer", RequestError, lambda b: b.start(skip_tokenizer_init=True).generate("ab")),
    Case("chat without a tokenizer", TokenizerError, lambda b: b.start(skip_tokenizer_init=True).chat([])),
]
MEMORY = [
    _engine("kv_cache_gib beyond the machine", CapacityError, kv_cache_gib=100, num_pages=None),
    _engine("kv_cache_gib too small for a page", CapacityError, kv_cache_gib=1e-7, num_pages=None),
    _engine("num_pages beyond the machine", CapacityError, num_pages=10**9),
    _engine("page_size beyond the machine", CapacityError, page_size=10**9),
    _engine("max_num_seqs beyond the machine", CapacityError, max_num_seqs=10**9),
    Case(
        "a model bigger than the memory",
        CapacityError,
        lambda b: b.load(b.copy(hidden_size=10**6, intermediate_size=10**6), load_format="random"),
    ),
    Case("a cache too large to count", ConfigError, lambda b: b.start(num_pages=2**40)),
]
CHECKPOINT = [
    Case("a directory that is not there", CheckpointError, lambda b: b.start(model="/no/such/place")),
    Case("a hub id that cannot be fetched", CheckpointError, lambda b: b.start(model="nobody/nothing")),
    Case("a file", CheckpointError, lambda b: b.start(model=str(b.model / "config.json"))),
    Case("no config.json", CheckpointError, lambda b: b.load(b.copy(without="config"))),
    Case("no weights", CheckpointError, lambda b: b.load(b.copy(without="model"))),
    _text("config.json is not JSON", CheckpointError, "config.json", "{"),
    _text("config.json is nested too deeply", CheckpointError, "config.json", "[" * 100_000),
    _text("config.json is not UTF-8", CheckpointError, "config.json", b'{"model_type": "\xff"}'),
    _text("config.json is no object", CheckpointError, "config.json", "[1]"),
    _config("unknown model_type", UnsupportedModelError, model_type="perceptron"),
    _config("model_type that is no text", UnsupportedModelError, model_type=["llama"]),
    _config("unknown architecture", UnsupportedModelError, architectures=["LlamaForSequenceClassification"]),
    _config("architectures that are no texts", UnsupportedModelError, architectures=[["LlamaForCausalLM"]]),
    _config("an entry that nobody knows", UnsupportedModelError, attention_sink_strength=2.0),
    _config("NaN in config.json", UnsupportedModelError, rms_norm_eps=NAN),
    _config("hidden_size NaN", UnsupportedModelError, hidden_size=NAN),
    _config("a size of 400 digits", UnsupportedModelError, hidden_size=10**400),
    _config("more layers than any model has", UnsupportedModelError, num_hidden_layers=10**9),
    _config("dtype that is no text", UnsupportedModelError, dtype=["float32"]),
    _config("rope_theta 1", UnsupportedModelError, rope_theta=1.0),
    _config("rope_type that is no text", UnsupportedModelError, rope_scaling={"rope_type": ["yarn"]}),
    _config(
        "mscale that is no number",
        UnsupportedModelError,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": "x"},
    ),
    _config("eos_token_id below 0", UnsupportedModelError, eos_token_id=-5),
    _config("hidden_size other than the tensors'", CheckpointError, hidden_size=24),
    _config("intermediate_size other than the tensors'", CheckpointError, intermediate_size=32),
    _config("num_hidden_layers above the tensors'", CheckpointError, num_hidden_layers=3),
    _config("num_hidden_layers below the tensors'", CheckpointError, num_hidden_layers=1),
    _config("num_attention_heads other than the tensors'", CheckpointError, num_attention_heads=4),
    _config("num_key_value_heads other than the tensors'", CheckpointError, num_key_value_heads=2),
    _config("head_dim other than the tensors'", CheckpointError, head_dim=16),
    _config("vocab_size other than the tensors'", CheckpointError, vocab_size=200),
    _config("tie_word_embeddings with another head", CheckpointError, tie_word_embeddings=True),
    _config("attention_bias without biases", CheckpointError, attention_bias=True),
    _config("mlp_bias without biases", CheckpointError, mlp_bias=True),
    _header("an empty file", lambda data: b""),
    _header("a file cut inside its header", lambda data: data[:100]),
    _header("a file cut inside its data", lambda data: data[:-100]),
    _header("a header of absurd length", lambda data: struct.pack("<Q", 2**60) + data[8:]),
    _header("a header that is not JSON", lambda data: data[:8] + b"?" + data[9:]),
    _header("a header that is no object", lambda data: struct.pack("<Q", 3) + b"[1]"),
    _tensor("offsets below 0", data_offsets=[-64, 0]),
    _tensor("offsets that overlap", data_offsets=[0, 64]),
    _tensor("offsets beyond the file", data_offsets=[2**40, 2**40 + 64]),
    _tensor("a shape below 0", shape=[-16]),
    _tensor("a shape too large to count", shape=[2**62, 4]),
    _tensor("an unknown type", dtype="F31"),
    _weights("whole numbers as weights", lambda t: t.update({NORM: torch.ones(16, dtype=torch.int64)})),
    _weights("a tensor missing", lambda t: t.pop(NORM)),
    _weights("a tensor too many", lambda t: t.update({"model.extra": torch.ones(1)})),
    _weights("a tensor of another shape", lambda t: t.update({NORM: torch.ones(17)})),
    _sharded("an index that names missing shards", lambda m, p: m.update({NORM: "two.safetensors"})),
    _sharded("an index that names tensors its shard lacks", lambda m, p: m.update({"ghost": "one.safetensors"})),
    _sharded("an index that leaves out a tensor", lambda m, p: m.pop(NORM)),
    _sharded("an index that leaves its directory", lambda m, p: m.update({NORM: "../one.safetensors"})),
    _sharded("a damaged shard", lambda m, p: (p / "one.safetensors").write_bytes(b"oops")),
    _text("an index beside a single file", CheckpointError, "model.safetensors.index.json", "{}"),
]
TOKENIZER = [
    Case("no tokenizer.json", TokenizerError, lambda b: b.load(b.copy(without="tokenizer.json"))),
    _text("tokenizer.json is not JSON", TokenizerError, "tokenizer.json", "{"),
    _text("tokenizer.json is no tokenizer", TokenizerError, "tokenizer.json", '{"version": "1.0"}'),
    _text("tokenizer_config.json is not JSON", TokenizerError, "tokenizer_config.json", "{"),
    _text("tokenizer_config.json is no object", TokenizerError, "tokenizer_config.json", "[]"),
    _text(
        "added_tokens_decoder of the wrong form",
        TokenizerError,
        "tokenizer_config.json",
        '{"added_tokens_decoder": [1]}',
    ),
    _text("special tokens of the wrong form", TokenizerError, "tokenizer_config.json", '{"extra_special_tokens": 5}'),
    _text(
        "an added token with flags of the wrong type",
        TokenizerError,
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"258": {"content": "<x>", "lstrip": "yes"}}}',
    ),
    _text("eos_token_id of the wrong type", TokenizerError, "generation_config.json", '{"eos_token_id": "</s>"}'),
    _text("a template that is not UTF-8", TokenizerError, "chat_template.jinja", b"\xff"),
    _text("a template that is not Jinja", TokenizerError, "chat_template.jinja", "{% if %}"),
    _text("a template that divides by zero", RequestError, "chat_template.jinja", "{{ 1 // 0 }}"),
    Case("a tokenizer that is not there", CheckpointError, lambda b: b.start(tokenizer="/no/such/place")),
]
CHAT = [
    _chat("no messages", []),
    _chat("messages that are a text", "hello"),
    _chat("messages that are one message", {"role": "user", "content": "hello"}),
    _chat("a message that is a text", ["hello"]),
    _chat("a message without a role", [{"content": "hello"}]),
    _chat("a role that the template does not know", [{"role": "wizard", "content": "hello"}]),
    _chat("a message without content", [{"role": "user"}]),
    _chat("content None", [{"role": "user", "content": None}]),
    _chat("content of parts", [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
    _chat("a message that holds itself", [{"role": "user", "content": "a", "extra": _loop()}]),
    _chat("a message that holds an object", [{"role": "user", "content": "a", "extra": object}]),
]
RECORDS = [
    Case("a record that is no object", RequestError, lambda b: b.llm.engine.resume(cast("Any", "half-way"))),
    _record("a record of another version", version=1),
    _record("a record of another model", model_law="qwen3 with 28 layers"),
    _record("a record of another cache", cache_law="codec='fp8', selector='all'"),
    _record("a record without tokens", tokens=...),
    _record("tokens that are no token ids", tokens=[5, 6, "7"]),
    _record("tokens beyond the vocabulary", tokens=[5, 6, 7, VOCAB, VOCAB, VOCAB]),
    _record("a prompt longer than the tokens", prompt_len=100),
    _record("log-probs of another number", token_logprobs=[]),
    _record("log-probs of the wrong form", top_logprobs=[[1], [2], [3]]),
    _record("parameters of the wrong form", params=[1]),
    _record("bad parameters", params={"temperature": -1}),
    _record("a seed of more than 64 bits", seed=2**64),
    _record("a sample that is not asked for", sample=3),
    _record("eviction of the wrong form", eviction=["full"]),
    _record("an evictor that is not loaded", eviction=["key_norm", 16, 100]),
    _record("another interval of evictions", eviction=["full", 0, 100]),
    _record("a deadline that is a text", deadline_left_s="soon"),
    _record("an output that has ended", params={"max_tokens": 2, "ignore_eos": True, "logprobs": 1}),
]
ASYNC = [
    _async("a bad prompt", RequestError, lambda llm: _read(llm, [5, -1])),
    _async("parameters that are a dict", RequestError, lambda llm: _read(llm, "ab", {"temperature": 0})),
    _async("an id that is no text", RequestError, lambda llm: _read(llm, "ab", None, 5)),
    _async("an id that is in use", RequestError, _twice),
    _async("the abort of an id that is no text", RequestError, lambda llm: llm.abort(cast("Any", []))),
    _async("more requests than max_queue", QueueFullError, _three),
    _async("a request after shutdown", EngineDeadError, _after_shutdown),
    Case(
        "generate of the LLM that an AsyncLLM drives",
        RequestError,
        lambda b: asyncio.run(_drive(b)),
    ),
    Case("a front that is in use", ConfigError, lambda b: asyncio.run(_drive_twice(b))),
]


async def _drive(bench: Bench) -> None:
    async with AsyncLLM(front=bench.llm.front) as llm:
        await _sync_beside(llm, bench)


async def _drive_twice(bench: Bench) -> None:
    async with AsyncLLM(front=bench.llm.front):
        AsyncLLM(front=bench.llm.front)


OUTPUT = [
    Case("a disk that is full at once", OutputError, lambda b: _write_lines(b, 10)),
    Case("a disk that is full after two lines", OutputError, lambda b: _write_lines(b, 80)),
    Case("a disk that is full when the file is closed", OutputError, lambda b: _write_lines(b, 1000, at_close=True)),
    Case("a directory", RequestError, lambda b: Lines(b.root, 1)),
    Case("below a file", RequestError, lambda b: Lines(b.model / "config.json" / "out.jsonl", 1)),
    Case("a name with a zero byte", RequestError, lambda b: Lines(b.root / "a\0b", 1)),
]
GOOD = b'{"prompt": "ab", "params": {"max_tokens": 2}}\n'
COMMANDS = [
    Command("an unknown command", 2, "genrate"),
    Command("an unknown flag", 2, "generate -p x --temprature 1"),
    Command("a value of the wrong type", 2, "generate -p x --max-tokens many"),
    Command("a value out of range", 2, "generate -p x --top-p 2"),
    Command("no prompt", 2, "generate"),
    Command("no such input", 2, "generate {dir}/none.jsonl"),
    Command("a line that is not JSON", 2, "generate {dir}/in.jsonl", GOOD + b"oops\n" + GOOD),
    Command("a line that is not UTF-8", 2, "generate {dir}/in.jsonl", b"\xff\n"),
    Command("a line nested too deeply", 2, "generate {dir}/in.jsonl", b"[" * 100_000),
    Command("a line without a prompt", 2, "generate {dir}/in.jsonl", b'{"text": "x"}\n'),
    Command(
        "a line with an unknown parameter", 2, "generate {dir}/in.jsonl", b'{"prompt": "a", "params": {"temp": 1}}\n'
    ),
    Command("two bad lines", 2, "generate {dir}/in.jsonl", b"1\n" + GOOD + b"2\n"),
    Command(
        "a line that the model refuses",
        2,
        "generate {dir}/in.jsonl {model}",
        GOOD + b'{"prompt_token_ids": [5, 999]}\n' + b'{"prompt": null}\n',
    ),
    Command("an output below a file", 2, "generate -p x -o {dir}/tiny/config.json/out"),
    Command("the input as the output", 2, "generate {dir}/in.jsonl -o {dir}/in.jsonl", GOOD),
    Command("a full device", 1, "generate -p x -o /dev/full {model}"),
    Command(
        "a request that fails",
        1,
        "generate {dir}/in.jsonl -o {dir}/out.jsonl {model}",
        b'{"prompt_token_ids": [263]}\n',
    ),
]


def _capped(bench: Bench) -> str:
    (output,) = bench.generate("ab", max_tokens=1000, ignore_eos=True)
    sample = output.outputs[0]
    whole = len(output.prompt_token_ids) + len(sample.token_ids)
    return f"the output ends where the model's {whole} tokens do, with the reason {sample.finish_reason!r}"


def _greedy(bench: Bench) -> str:
    llm = bench.start()
    with mock.patch("headrace.engine.engine.log.warning") as warning:
        for _ in range(2):
            (output,) = llm.generate("ab", SamplingParams(n=2, temperature=0.0, max_tokens=4))
    first, second = (sample.token_ids for sample in output.outputs)
    assert first == second
    assert warning.call_count == 1
    said = warning.call_args.args
    return f"it runs, and the log says once: {said[0] % said[1:]}"


def _nothing(bench: Bench) -> str:
    (output,) = bench.generate("ab", max_tokens=0)
    return f"{len(output.outputs[0].token_ids)} tokens, with the reason {output.outputs[0].finish_reason!r}"


def _foreign(bench: Bench) -> str:
    plain = bench.generate([5, 6, 7], seed=1)[0].outputs[0].token_ids
    array = np.array([5, 6, 7])
    for ids in (array, list(array), torch.tensor([5, 6, 7]), {"prompt_token_ids": array}):
        assert bench.generate(ids, seed=np.uint64(1), max_tokens=np.int32(4))[0].outputs[0].token_ids == plain
    return "they are whole numbers like Python's own"


def _aborts(bench: Bench) -> str:
    return f"nothing: {bench.llm.engine.abort('unknown')}"


def _larger(bench: Bench) -> str:
    path = bench.copy()
    more = [f"<{letter}>" for letter in "abcdefg"]
    (path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": more}))
    with mock.patch("headrace.llm.log.warning") as warning:
        llm = bench.load(path)
    said = warning.call_args.args
    assert llm.generate("ab", SamplingParams(max_tokens=1))[0].finished
    try:
        llm.generate("<g>", SamplingParams(max_tokens=1))
    except RequestError as error:
        return f"it runs, and the log says: {said[0] % said[1:]}; such a prompt: {error}"
    raise AssertionError("a token beyond the model's vocabulary was taken")


ALLOWED = [
    Allowed("prompt and max_tokens together longer than the model", _capped),
    Allowed("max_tokens 0", _nothing),
    Allowed("n above 1 with temperature 0", _greedy),
    Allowed("no prompts: an empty list", lambda b: f"no outputs: {b.llm.generate([])}"),
    Allowed("numbers and arrays of numpy and torch", _foreign),
    Allowed("the abort of an id that nobody has", _aborts),
    Allowed("a tokenizer that knows more tokens than the model", _larger),
]
GROUPS = {
    "Requests: `generate`": PROMPTS,
    "Sampling parameters": PARAMETERS,
    "Chat": CHAT,
    "Many callers: `AsyncLLM`": ASYNC,
    "Portable records": RECORDS,
    "Engine options": ENGINE,
    "Memory": MEMORY,
    "Checkpoints": CHECKPOINT,
    "Tokenizers": TOKENIZER,
    "Output files": OUTPUT,
}


def refusal(bench: Bench, case: Case) -> HeadraceError:
    """The error that a case is refused with. Anything else is a bug: it comes through, or is an AssertionError."""
    try:
        case.act(bench)
    except HeadraceError as error:
        if type(error) is not case.error:
            raise AssertionError(f"{case.name}: {type(error).__name__} instead of {case.error.__name__}") from error
        return error
    raise AssertionError(f"{case.name}: nothing was refused")


def line_of(bench: Bench, command: Command) -> str:
    """The last line that a command leaves on standard error. Raises AssertionError for another exit status."""
    if command.lines is not None:
        (bench.root / "in.jsonl").write_bytes(command.lines)
    small = "--device cpu --num-pages 96 --page-size 4 --max-num-seqs 4 --max-num-batched-tokens 64"
    words = [w.format(dir=bench.root, model=f"--model {bench.model} {small}") for w in command.arguments.split()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(" ".join(words).split())
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
    kept = (bench.root / "out.jsonl").read_text() if (bench.root / "out.jsonl").exists() else ""
    for name in ("in.jsonl", "out.jsonl"):
        (bench.root / name).unlink(missing_ok=True)
    if status != command.status:
        raise AssertionError(f"{command.name}: status {status} instead of {command.status}: {err.getvalue()}")
    if kept:
        return f"the line says: {json.loads(kept)['error']}"
    return err.getvalue().splitlines()[-1]


def rows(bench: Bench) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table of docs/errors.md."""
    for title, cases in GROUPS.items():
        yield (
            title,
            ["what is given", "error", "what it says"],
            [[case.name, case.error.__name__, bench.sentence(refusal(bench, case))] for case in cases],
        )
    yield (
        "Command line",
        ["what is given", "exit status", "the last line"],
        [[command.name, str(command.status), bench.sentence(line_of(bench, command))] for command in COMMANDS],
    )
    yield (
        "What is allowed",
        ["what is given", "what happens"],
        [[allowed.name, bench.sentence(allowed.act(bench))] for allowed in ALLOWED],
    )
