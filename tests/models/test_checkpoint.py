"""Loading: one file, shards, a hub; everything that can be wrong with a checkpoint, and what the error says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import dense_logits
from fake_hub import FakeHub, serve
from tiny_models import llama_tensors, reference, write_config, write_index, write_sharded, write_single

from headrace.errors import CheckpointError, ConfigError
from headrace.models.checkpoint import LISTED, load_model, resolve_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path | str, **options: Any) -> Any:
    return load_model(path, device="cpu", **options)


def logits(model: Any) -> torch.Tensor:
    return dense_logits(model, [[1, 2, 3, 5, 8]])[0]


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return str(caught.value)


# What is loaded


def test_tensors_land_in_their_places(tmp_path: Path) -> None:
    """Every checkpoint tensor is found again in the model, and the model has no parameter beside them."""
    tensors = llama_tensors()
    model = load(write_single(tmp_path, tensors))
    places = model.tensors()
    assert places.keys() == tensors.keys()
    for name, views in places.items():
        for view in views:
            assert torch.equal(view, tensors[name])
    assert sum(view.numel() for views in places.values() for view in views) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_qk_norms_cover_their_parameter(tmp_path: Path) -> None:
    reference("qwen3", tmp_path, head_dim=16, attention_bias=True)
    model = load(tmp_path)
    assert sum(view.numel() for views in model.tensors().values() for view in views) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_shards_of_transformers(tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "one", tie_word_embeddings=True)
    reference("qwen2", tmp_path / "many", tie_word_embeddings=True, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["auto", "float64", "float32", "bfloat16", "float16"])
def test_conversion(stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    """auto is float32 on the CPU, whatever is stored."""
    tensors = llama_tensors(stored)
    model = load(write_single(tmp_path, tensors, dtype=str(stored).removeprefix("torch.")), dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, views in model.tensors().items():
        assert torch.equal(views[0], tensors[name].to(wanted))


def test_overflow_is_not_silent(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors[Q][0, 0] = 1e6
    write_single(tmp_path, tensors)
    assert f"values of {Q} do not fit into float16: use dtype='bfloat16'" in error_of(tmp_path, dtype="float16")
    assert load(tmp_path, dtype="bfloat16").tensors()[Q][0].isfinite().all()


def test_harmless_leftovers(tmp_path: Path) -> None:
    tensors = llama_tensors()
    plain = logits(load(write_single(tmp_path / "plain", tensors)))
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in range(2)}
    assert torch.equal(plain, logits(load(write_single(tmp_path / "extra", tensors | extra))))
    tied = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    write_single(tmp_path / "tied", tied, tie_word_embeddings=True)
    write_single(tmp_path / "twice", tied | {HEAD: tied[EMBEDDING].clone()}, tie_word_embeddings=True)
    assert torch.equal(logits(load(tmp_path / "tied")), logits(load(tmp_path / "twice")))
    model = load(tmp_path / "tied")
    assert model.head_VE is model.embed_VE


def test_random_weights(tmp_path: Path) -> None:
    write_config(tmp_path, attention_bias=True)
    model = load(tmp_path, load_format="random", seed=3)
    for name, views in model.tensors().items():
        if name.endswith("norm.weight"):
            assert torch.equal(views[0], torch.ones_like(views[0]))
        elif views[0].numel() > 100:
            assert views[0].std().item() == pytest.approx(0.02, rel=0.2)
            assert views[0].mean().abs().item() < 0.006
    same, other = load(tmp_path, load_format="random", seed=3), load(tmp_path, load_format="random", seed=4)
    assert torch.equal(logits(model), logits(same))
    assert not torch.equal(logits(model), logits(other))
    half = load(tmp_path, load_format="random", seed=3, dtype="bfloat16").tensors()
    for name, views in model.tensors().items():
        assert torch.equal(views[0].bfloat16(), half[name][0])
    first, second = (model.tensors()[f"model.layers.{i}.self_attn.q_proj.weight"][0] for i in range(2))
    assert not torch.equal(first, second)


def test_max_model_len(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert load(tmp_path, load_format="random").max_model_len == 64
    assert load(tmp_path, load_format="random", max_model_len=10).rotaries[0].cos_PD.shape == (10, 5)
    with pytest.raises(ConfigError, match=r"max_model_len is 65; the model holds 64 positions .* max_model_len <= 64"):
        load(tmp_path, load_format="random", max_model_len=65)
    with pytest.raises(ConfigError, match="max_model_len is 0; it must be at least 1"):
        load(tmp_path, load_format="random", max_model_len=0)
    write_config(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigError, match=r"'dynamic' the rotation beyond max_position_embeddings = 64 .* <= 64"):
        load(tmp_path, load_format="random", max_model_len=65)
    write_config(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    assert load(tmp_path, load_format="random", max_model_len=128).max_model_len == 128


def test_bad_arguments(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(ConfigError, match="load_format is 'dummy'; choose from auto, random"):
        load(tmp_path, load_format="dummy")
    for dtype in ("int8", torch.int8):
        with pytest.raises(ConfigError, match=r"dtype is .*int8.*; choose from auto, float64"):
            load(tmp_path, dtype=dtype)
    with pytest.raises(ConfigError, match=r"revision 'v1' was given, but .* is a local directory"):
        load(tmp_path, revision="v1")


# What is refused


def test_wrong_tensors_are_named_together(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.norm.weight"], tensors[HEAD]
    tensors[Q] = torch.zeros(30, 29)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(44, 30, dtype=torch.int8)
    tensors["model.layers.2.input_layernorm.weight"] = torch.ones(30)
    message = error_of(write_single(tmp_path, tensors))
    assert str(tmp_path) in message
    assert "missing (2): model.norm.weight, lm_head.weight" in message
    assert "unexpected (1): model.layers.2.input_layernorm.weight" in message
    assert f"of the wrong shape (1): {Q} is [30, 29], must be [30, 30]" in message
    assert "of a type that is not implemented (1): model.layers.0.mlp.up_proj.weight is I8" in message


def test_long_lists_are_counted(tmp_path: Path) -> None:
    message = error_of(write_single(tmp_path, {"stray": torch.zeros(1)}))
    assert f"missing (21): {EMBEDDING}" in message
    assert f"and {21 - LISTED} more; unexpected (1): stray" in message


def test_untied_without_head(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors[HEAD]
    assert error_of(write_single(tmp_path, tensors)).endswith(
        "missing (1): lm_head.weight: if the head is the embedding, set tie_word_embeddings in config.json"
    )


def test_tied_with_another_head(tmp_path: Path) -> None:
    message = error_of(write_single(tmp_path, llama_tensors(), tie_word_embeddings=True))
    assert (
        "differing although tie_word_embeddings is true (1): lm_head.weight from model.embed_tokens.weight" in message
    )


def test_bias_that_the_configuration_does_not_name(tmp_path: Path) -> None:
    bias = Q.replace("weight", "bias")
    assert f"unexpected (1): {bias}" in error_of(write_single(tmp_path, llama_tensors() | {bias: torch.zeros(30)}))


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_truncated_file(size: int, tmp_path: Path) -> None:
    write_single(tmp_path, llama_tensors())
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1 if size < 0 else size)
    assert f"damaged files (1): model.safetensors ({file.stat().st_size} bytes; " in error_of(tmp_path)


def test_corrupt_file(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    assert "damaged files (1): model.safetensors (387 bytes; SafetensorError: " in error_of(tmp_path)


def test_shards_missing_and_damaged(tmp_path: Path) -> None:
    write_sharded(tmp_path, llama_tensors())
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"oops")
    message = error_of(tmp_path)
    assert "missing files (1): model-00001-of-00003.safetensors; damaged files (1): model-00003-of-00003" in message
    assert "in the index" not in message


def test_index_against_shards(tmp_path: Path) -> None:
    weight_map = write_sharded(tmp_path, llama_tensors())
    first, norm = "model-00001-of-00003.safetensors", "model.norm.weight"
    there, norm_there = weight_map.pop(Q), weight_map[norm]
    assert norm_there != first
    write_index(tmp_path, weight_map | {"ghost": there, norm: first})
    lost, stray = error_of(tmp_path).split("; in a file, not so in the index (2): ")
    assert lost.endswith(f"in the index, not in its file (2): {norm} (in {first}), ghost (in {there})")
    assert f"{norm} (in {norm_there})" in stray
    assert f"{Q} (in {there})" in stray


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_broken_index(text: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "model.safetensors.index.json is no index of shards (" in error_of(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_index_stays_in_its_directory(file: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    write_index(tmp_path, {Q: file})
    assert f"names files outside its directory ({file})" in error_of(tmp_path)


def test_one_file_and_an_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, llama_tensors())
    write_single(tmp_path, llama_tensors())
    assert "has both model.safetensors and model.safetensors.index.json: remove the one" in error_of(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    write_config(tmp_path)
    message = error_of(tmp_path)
    assert "has neither model.safetensors nor model.safetensors.index.json: fetch the weights, or use" in message
    (tmp_path / "pytorch_model.bin").touch()
    assert "(found pytorch_model.bin: convert them to safetensors)" in error_of(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"{tmp_path} has no config.json: give the directory of a checkpoint"
    for text, reason in (("{", "cannot be read as JSON"), ("[1]", "holds a list, not an object")):
        (tmp_path / "config.json").write_text(text)
        assert reason in error_of(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "a/b/c", "~/nothing-here-at-all", "a b"])
def test_no_directory(name: str) -> None:
    message = error_of(name)
    assert message == f"{name} is no directory here, and cannot be a hub id (owner/name): check the path"


def test_file_instead_of_directory(tmp_path: Path) -> None:
    file = write_config(tmp_path) / "config.json"
    assert error_of(file) == f"{file} is a file: give the directory that holds config.json and the weights"


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    write_sharded(tmp_path / "repo", llama_tensors())
    (tmp_path / "repo" / "tokenizer.json").write_text("{}")
    for unwanted in ("original/params.json", "onnx/model.safetensors", "consolidated.safetensors", "model.bin"):
        path = tmp_path / "repo" / unwanted
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve({"mill/tiny": tmp_path / "repo"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_hub_id(hub: FakeHub, tmp_path: Path) -> None:
    expected = logits(load(tmp_path / "repo"))
    assert torch.equal(logits(load("mill/tiny")), expected)
    assert sorted(hub.asked) == sorted(
        [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        + ["model.safetensors.index.json", "config.json", "tokenizer.json"]
    )
    hub.asked.clear()
    assert torch.equal(logits(load("mill/tiny", revision="main")), expected)
    assert hub.asked == []


def test_hub_offline_uses_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load("mill/tiny"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.down = True
    assert torch.equal(logits(load("mill/tiny")), expected)


def test_hub_without_weights(hub: FakeHub) -> None:
    directory = resolve_model("mill/tiny", weights=False)
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 97
    load("mill/tiny", load_format="random")
    assert not [name for name in hub.asked if name.endswith(".safetensors")]


def test_hub_refusals(hub: FakeHub) -> None:
    url = re.escape(hub.url)
    with pytest.raises(CheckpointError, match=f"mill/none is no directory here, and {url} does not know it: check"):
        resolve_model("mill/none")
    with pytest.raises(CheckpointError, match=f"mill/tiny has no revision 'v9' on {url}: give a branch"):
        resolve_model("mill/tiny", "v9")
    hub.gated.add("mill/tiny")
    with pytest.raises(CheckpointError, match=f"mill/tiny is gated on {url}: accept its terms there and set HF_TOKEN"):
        resolve_model("mill/tiny")


def test_hub_out_of_reach(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = "copy the checkpoint to this machine and give its directory, or set HF_HUB_CACHE .* or HF_ENDPOINT"
    hub.down = True
    with pytest.raises(CheckpointError, match=f"could not be fetched from {re.escape(hub.url)} .*{remedy}"):
        resolve_model("mill/tiny")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=f"could not be fetched from http://127.0.0.1:9 .*{remedy}"):
        resolve_model("mill/tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=remedy):
        resolve_model("mill/tiny")
