"""What can be loaded and what is refused, with which sentence; records; names and places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import adapted_engine, alone, contents, directories
from lora_files import modules_of, write_adapter
from tiny import CONFIG, make_engine, run_all, tiny_model

from headrace.config import EngineConfig
from headrace.errors import AdapterError, CheckpointError, ConfigError, RequestError, UnsupportedModelError
from headrace.layers.adapters import AdapterBank
from headrace.models.adapters import read_adapter
from headrace.models.adapters import write_adapter as put
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams
from headrace.request import RECORD_VERSION

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 24), "model.layers.1.mlp.down_proj": (24, 40)}
Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "AB")
PROMPT = [(5 * i + 2) % 61 for i in range(19)]


def params(name: str | None, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.8, "seed": 3, "max_tokens": 12, "ignore_eos": True} | options, adapter=name
    )


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dora": ({"use_dora": True}, UnsupportedModelError, r"use_dora is True \(it also scales.*merge the adapter"),
    "magnitudes": (
        {"edit": {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(24)}},
        UnsupportedModelError,
        "DoRA is not implemented",
    ),
    "modules": ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, r"modules_to_save is \['lm_head'\]"),
    "bias": ({"bias": "all"}, UnsupportedModelError, "bias is 'all'.*train with bias='none'"),
    "bias of B": ({"lora_bias": True}, UnsupportedModelError, "lora_bias is True"),
    "other method": ({"peft_type": "IA3"}, UnsupportedModelError, "peft_type is 'IA3'; only LORA"),
    "no method": ({"peft_type": ...}, UnsupportedModelError, "peft_type is None"),
    "start": ({"init_lora_weights": "pissa"}, UnsupportedModelError, "'pissa', which changes the model's own weights"),
    "tokens": ({"trainable_token_indices": [3]}, UnsupportedModelError, "trains rows of the embedding"),
    "repeated": ({"layer_replication": [[0, 2], [1, 2]]}, UnsupportedModelError, "layer_replication"),
    "parameters": ({"target_parameters": ["w"]}, UnsupportedModelError, "target_parameters"),
    "invocation": ({"alora_invocation_tokens": [1]}, UnsupportedModelError, "only tokens behind an invocation"),
    "news": ({"use_next_year": 3}, UnsupportedModelError, r"use_next_year is 3 \(which is not known here\)"),
    "no rank": ({"r": ...}, CheckpointError, "r is None; it must be a positive number"),
    "no alpha": ({"lora_alpha": "8"}, CheckpointError, "lora_alpha is '8'"),
    "a pattern that is none": ({"rank_pattern": {"(": 3}}, CheckpointError, r"'\(' is no pattern"),
    "patterns in a list": ({"alpha_pattern": ["q_proj"]}, CheckpointError, "alpha_pattern is .* must map"),
    "another rank": ({"r": 5}, CheckpointError, r"says rank 5 for model.*and its factors have rank 4"),
    "embedding": (
        {"edit": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 61)}},
        UnsupportedModelError,
        "factors of an embedding are not implemented",
    ),
    "other names": ({"edit": {"q_proj.lora_A": torch.ones(4, 24)}}, CheckpointError, "that PEFT saves are named"),
    "one factor": ({"edit": {Q_B: None}}, CheckpointError, "one factor only of model.layers.0.self_attn.q_proj"),
    "ranks that differ": ({"edit": {Q_B: torch.ones(24, 3)}}, CheckpointError, r"\[4, 24\] and \[24, 3\]"),
    "one axis": ({"edit": {Q_A: torch.ones(4)}}, CheckpointError, r"must be \[rank, inputs\]"),
    "integers": ({"edit": {Q_A: torch.ones(4, 24, dtype=torch.int32)}}, CheckpointError, "not floating numbers"),
    "NaN": ({"edit": {Q_A: torch.full((4, 24), torch.nan)}}, CheckpointError, "hold NaN or infinity"),
    "the head": (
        {"shapes": {"lm_head": (61, 24)}},
        UnsupportedModelError,
        "changes lm_head; in this model adapters can change down_proj, gate_proj",
    ),
    "another model": ({"shapes": {"model.layers.7.self_attn.q_proj": (24, 24)}}, UnsupportedModelError, r"layers\.7"),
    "another width": (
        {"shapes": {"model.layers.0.self_attn.k_proj": (24, 32)}},
        CheckpointError,
        "k_proj from 32 to 24, in the model from 24 to 8",
    ),
    "too large a rank": ({"rank": 9}, AdapterError, "has rank 9; max_adapter_rank is 8: raise it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    options, kind, sentence = REFUSED[case]
    options = dict(options)
    write_adapter(tmp_path / "a", options.pop("shapes", SHAPES), **options)
    engine = adapted_engine(2, {"x": "all"})
    with pytest.raises(kind, match=sentence):
        engine.load_adapter("a", tmp_path / "a")
    # Nothing is left of it, and the others work on.
    assert list(engine.adapters.loaded) == ["x"]
    engine.load_adapter("y", contents()["odd"])
    (one,) = engine.add(PROMPT, params("x"), request_id="1")
    (two,) = engine.add(PROMPT, params("y"), request_id="2")
    run_all(engine)
    assert (tuple(one.output_ids), tuple(two.output_ids)) == (alone("all", one), alone("odd", two))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    write_adapter(tmp_path, SHAPES)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    kept = config.read_text(), weights.read_bytes()
    weights.write_bytes(kept[1][:200])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors cannot be read .*fetch it again"):
        read_adapter(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"found adapter_model.bin: save it with safe_serialization=True"):
        read_adapter(tmp_path)
    for text, sentence in (("{", "cannot be read as JSON"), ("[]", "holds a list, not an object")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=sentence):
            read_adapter(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="is no directory here"):
        read_adapter(tmp_path / "nowhere")


def test_values_that_do_not_fit_the_type(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", SHAPES, alpha=1e6, size=10.0)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    bank = AdapterBank(1, 8)
    load_model(tmp_path / "m", device="cpu", dtype="float16", load_format="random", adapters=bank)
    with pytest.raises(CheckpointError, match="do not fit into float16: use dtype='bfloat16' or 'float32'"):
        put(read_adapter(tmp_path / "a"), bank, 1)
    assert not bank.pattern
    assert not any(room.factors.a_SEK.any() or room.factors.b_SQN.any() for room in bank.rooms)


def test_names_and_places() -> None:
    engine = adapted_engine(2, {"x": "all", "y": "one"})
    with pytest.raises(AdapterError, match=r"max_adapters is 2, and as many are loaded \(x, y\): unload one first"):
        engine.load_adapter("z", contents()["odd"])
    with pytest.raises(AdapterError, match="'x' is loaded already: unload it first"):
        engine.load_adapter("x", contents()["odd"])
    with pytest.raises(AdapterError, match="no adapter 'z' is loaded; there are: x, y"):
        engine.unload_adapter("z")
    with pytest.raises(RequestError, match="adapter='z' is not loaded; there are: x, y; load it with load_adapter"):
        engine.add(PROMPT, params("z"), request_id="1")
    with pytest.raises(RequestError, match="adapter=3 is not loaded"):
        engine.add(PROMPT, SamplingParams(adapter=3), request_id="1")  # type: ignore[arg-type]
    for name in ("", "a,b", "a=b", 3):
        with pytest.raises(ConfigError, match="a name is text without commas and equal signs"):
            engine.load_adapter(name, contents()["odd"])  # type: ignore[arg-type]
    engine.add(PROMPT, params("y"), request_id="waits")
    with pytest.raises(AdapterError, match=r"'y' is used by unfinished requests \(waits\): wait for"):
        engine.unload_adapter("y")
    engine.step()
    with pytest.raises(AdapterError, match="is used by unfinished"):
        engine.unload_adapter("y")
    engine.unload_adapter("x")
    engine.abort("waits")
    engine.unload_adapter("y")
    assert not engine.adapters.loaded
    engine.check_idle()
    with pytest.raises(AdapterError, match="this engine has room for none; start it with max_adapters=1"):
        make_engine().load_adapter("x", contents()["all"])
    with pytest.raises(RequestError, match="there are: none"):
        make_engine().add(PROMPT, params("x"), request_id="1")


def test_options() -> None:
    assert EngineConfig(adapters=" a = b/c , d=e=f,").adapter_sources == {"a": "b/c", "d": "e=f"}
    assert EngineConfig(adapters={"a": "x,y=z"}).adapter_sources == {"a": "x,y=z"}
    assert EngineConfig(adapters="a=b").adapter_places == 1
    assert EngineConfig(adapters="a=b", max_adapters=5).adapter_places == 5
    assert EngineConfig().adapter_places == 0
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"adapters": "a=b,c=d", "max_adapters": 1}, "adapters names 2, and max_adapters is 1: raise it"),
        ({"adapters": "a"}, "adapters has no directory for 'a': write name=directory"),
        ({"adapters": "=b"}, "an adapter is named ''"),
        ({"adapters": "a=b,a=c"}, "adapters names one twice"),
        ({"max_adapters": -1}, "max_adapters is -1; it must be at least 0"),
        ({"max_adapter_rank": 0}, "max_adapter_rank is 0; it must be at least 1"),
    ]
    for options, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            EngineConfig(**options)
    with pytest.raises(ConfigError, match="max_adapters is 2, but the model was built without room for adapters"):
        make_engine(max_adapters=2)


def test_adapters_named_in_the_options() -> None:
    engine = adapted_engine(2, adapters={"x": directories()["all"], "y": directories()["one"]})
    assert [(a.name, a.slot, a.rank) for a in engine.adapters.loaded.values()] == [("x", 1, 4), ("y", 2, 1)]


def test_entries_follow_the_content_and_not_the_name() -> None:
    """The same name with other content finds nothing; the same content finds its entries, whatever its name."""
    engine = adapted_engine(2, {"x": "all"})

    def hits(name: str | None) -> int:
        (request,) = engine.add(PROMPT, params(name, max_tokens=1), request_id="r")
        run_all(engine)
        return request.hit_tokens

    assert hits("x") == 0
    assert hits("x") == 16
    assert hits(None) == 0
    engine.unload_adapter("x")
    engine.load_adapter("x", contents()["odd"])
    assert hits("x") == 0
    engine.load_adapter("y", contents()["all"])
    assert hits("y") == 16


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    def digest(name: str, **options: Any) -> str:
        write_adapter(tmp_path / name, SHAPES, **options)
        return read_adapter(tmp_path / name).digest

    first = digest("a")
    assert digest("b", base_model_name_or_path="elsewhere", lora_dropout=0.5) == first
    others = [
        digest("c", seed=1),
        digest("d", alpha=9),
        digest("e", use_rslora=True),
        digest("f", alpha_pattern={"q_proj": 3}),
        digest("g", dtype=torch.float64),
    ]
    assert len({first, *others}) == 6


def test_records_name_the_adapter_by_its_content() -> None:
    engine = adapted_engine(2, {"x": "all", "other": "one"}, max_num_batched_tokens=7)
    (request,) = engine.add(PROMPT, params("x"), request_id="r")
    expected = alone("all", request)
    records: list[Mapping[str, Any]] = []
    while engine.has_work:
        engine.step()
        records.append(json.loads(json.dumps(engine.export(request))))
    assert tuple(request.output_ids) == expected
    assert len(records) > 12
    assert records[0]["version"] == RECORD_VERSION
    assert records[0]["adapter"] == contents()["all"].digest
    for names in ({"x": "all"}, {"renamed": "all", "x": "one"}):
        again = adapted_engine(2, names)
        for record in records[:-1:4]:
            resumed = again.resume(dict(record))
            assert resumed.params.adapter == next(name for name, kind in names.items() if kind == "all")
            run_all(again)
            assert tuple(resumed.output_ids) == expected
        again.check_idle()
    for names in ({}, {"x": "one"}):
        refusing = adapted_engine(2, names)
        with pytest.raises(RequestError, match=r"made with the adapter 'x' of digest .*load the same adapter first"):
            refusing.resume(dict(records[5]))
        assert not refusing.has_work
    with pytest.raises(RequestError, match=r"not loaded here \(none\)"):
        make_engine().resume(dict(records[5]))
    plain = adapted_engine(1, {"x": "all"})
    (without,) = plain.add(PROMPT, params(None), request_id="r")
    assert plain.export(without)["adapter"] is None


def test_an_engine_finds_its_room_empty() -> None:
    """A second engine over the same model begins without the first one's adapters."""
    first = adapted_engine(1, {"x": "all"})
    second = make_engine(model=first.model)
    assert not second.adapters.loaded
    second.load_adapter("x", contents()["one"])
    (request,) = second.add(PROMPT, params("x"), request_id="r")
    run_all(second)
    assert tuple(request.output_ids) == alone("one", request)


def test_room_is_taken_once() -> None:
    """Loading and unloading moves no tensor, and what is taken is what the shapes say."""
    engine = adapted_engine(3)
    bank = engine.model.adapters
    assert bank is not None
    before = [(x.data_ptr(), x.shape) for room in bank.rooms for x in (room.factors.a_SEK, room.factors.b_SQN)]
    shapes = modules_of({k: v[0] for k, v in tiny_model().tensors().items()})
    assert bank.nbytes == 4 * 8 * 8 * sum(n + e for n, e in shapes.values())
    for name in ("all", "one", "odd"):
        engine.load_adapter(name, contents()[name])
    engine.unload_adapter("one")
    engine.load_adapter("full", contents()["full"])
    assert before == [(x.data_ptr(), x.shape) for room in bank.rooms for x in (room.factors.a_SEK, room.factors.b_SQN)]
