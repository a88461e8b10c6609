"""What files can have wrong: checkpoints, tokenizers, and where outputs go."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file, save_file

from headrace.commands.output import Lines
from headrace.errors import (
    CheckpointError,
    HeadraceError,
    OutputError,
    RequestError,
    TokenizerError,
    UnsupportedModelError,
)
from tools.bad_input.bench import NAN, Bench, FullDisk, with_header
from tools.bad_input.cases import Case


def _config(name: str, error: type[HeadraceError], **changes: Any) -> Case:
    return Case(name, error, lambda b: b.load(b.copy(**changes)))


def _text(name: str, error: type[HeadraceError], file: str, text: str | bytes) -> Case:
    """A file of the checkpoint with other contents."""

    def act(bench: Bench) -> None:
        path = bench.copy()
        (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        bench.load(path).chat([{"role": "user", "content": "a"}])

    return Case(name, error, act)


def _header(name: str, change: Callable[[bytes], bytes]) -> Case:
    """model.safetensors with other bytes."""

    def act(bench: Bench) -> None:
        path = bench.copy() / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        bench.load(path.parent)

    return Case(name, CheckpointError, act)


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


def _write_lines(bench: Bench, room: int, at_close: bool = False) -> None:
    path = bench.root / "out.jsonl"
    lines = Lines(path, 3, opener=lambda p: cast("IO[bytes]", FullDisk(p, room, at_close)))
    try:
        for place in range(3):
            lines.put(place, {"text": "x" * 20})
        lines.close()
    finally:
        path.unlink(missing_ok=True)


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
OUTPUT = [
    Case("a disk that is full at once", OutputError, lambda b: _write_lines(b, 10)),
    Case("a disk that is full after two lines", OutputError, lambda b: _write_lines(b, 80)),
    Case("a disk that is full when the file is closed", OutputError, lambda b: _write_lines(b, 1000, at_close=True)),
    Case("a directory", RequestError, lambda b: Lines(b.root, 1)),
    Case("below a file", RequestError, lambda b: Lines(b.model / "config.json" / "out.jsonl", 1)),
    Case("a name with a zero byte", RequestError, lambda b: Lines(b.root / "a\0b", 1)),
]
