"""The tiny model that everything bad is tried on, and what damages its files."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from unittest import mock

import tokenizers
from safetensors.torch import save_file

from headrace import LLM, SamplingParams
from headrace.errors import (
    HeadraceError,
)
from headrace.memory import GIB
from headrace.models.checkpoint import load_model

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


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The bytes of a safetensors file after its header was changed in place."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


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
