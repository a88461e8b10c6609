"""Whatever comes in, only errors of `headrace.errors` come out: constructors, files and records under random values."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import SamplingParams
from headrace.checks import show
from headrace.commands.generate import read_jobs
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import HeadraceError
from headrace.models.checkpoint import load_model
from headrace.models.registry import families
from headrace.text.tokenizer import Tokenizer
from tools.bad_input import CONFIG, Bench, with_header

COUNTS = {"fine": 0, "refused": 0}
# Values that have broken somebody's checks: wrong types, ends of ranges, numbers that are none.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64, -(2**70), 10**400, -(10**5000)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]),
    st.text(max_size=4),
    st.sampled_from(["", "auto", "ngram", "full", "key_norm", "fp8", "quest", "draft_model", "a,b", ",", "\ud800"]),
    st.binary(max_size=3),
    st.lists(st.integers(-2, 300), max_size=3),
    st.lists(st.one_of(st.text(max_size=2), st.none(), st.floats()), max_size=3),
    st.dictionaries(st.integers(-1, 300), st.floats(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.builds(object),
    st.just(int),
    st.just([[]]),
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 300),
        st.sampled_from([2**31, 2**63, 10**400]),
        st.floats(),
        st.text(max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=600)


def mostly(values: st.SearchStrategy[Any], others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Three times of four the first: `one_of` would count each kind of odd values."""
    return st.integers(0, 3).flatmap(lambda n: values if n else others)


def attempt(events: Counter[str], act: Callable[[], object]) -> bool:
    """Count what happens; anything but an error of ours comes through."""
    try:
        act()
    except HeadraceError as error:
        if not str(error):
            raise AssertionError("an error without a word") from error
        events["refused"] += 1
        events[type(error).__name__] += 1
        return False
    events["fine"] += 1
    return True


INTEGERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**20, 2**30, 2**31, 2**64 - 1, 2**64, 10**400]))
FLOATS = st.one_of(st.floats(0, 1), st.floats(), st.sampled_from([1e-300, 1e-45, 1e-5, 1e4, 1e300, -float("inf")]))
IDS = st.lists(st.integers(-1, 264), max_size=4)
OF_A_TYPE: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("dict", st.dictionaries(st.integers(0, 264), FLOATS, max_size=3)),
    ("list[int]", IDS),
    ("list[str]", st.lists(st.text(max_size=2), max_size=2)),
    ("bool", st.booleans()),
    ("int", INTEGERS),
    ("float", FLOATS),
    ("str", st.sampled_from(["", "auto", "ngram", "full", "key_norm", "fp8", "quest", "swap", "splitfuse", "x"])),
]


def some(kind: type, *others: str) -> st.SearchStrategy[dict[str, Any]]:
    """One to three fields of a dataclass, or others, with values of their type or odd ones."""
    named = {spec.name: str(spec.type) for spec in dataclasses.fields(kind)} | dict.fromkeys(others, "")  # type: ignore[arg-type]

    def one(name: str) -> st.SearchStrategy[tuple[str, Any]]:
        fitting = [values for word, values in OF_A_TYPE if word in named[name]]
        return st.tuples(st.just(name), mostly(fitting[0], ODD) if fitting else ODD)

    pair = st.sampled_from(sorted(named)).flatmap(one)
    return st.lists(pair, min_size=1, max_size=3).map(dict)


def test_sampling_parameters(bench: Bench, events: Counter[str]) -> None:
    """What the constructor takes, a request can be served with, or is refused for, or fails alone."""
    events.update({**COUNTS, "served": 0})

    @MANY
    @given(changes=some(SamplingParams, "unknown"))
    def run(changes: dict[str, Any]) -> None:
        if not attempt(events, lambda: SamplingParams(**changes)):
            return
        length = {} if "min_tokens" in changes else {"max_tokens": 3}
        params = SamplingParams(**{**length, **changes})
        assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
        if params.n > 8:
            return
        if attempt(events, lambda: bench.llm.generate({"prompt_token_ids": [5, 6]}, params)):
            events["served"] += 1
        bench.llm.engine.check_idle()

    run()


def test_engine_options(bench: Bench, events: Counter[str]) -> None:
    """What the configuration takes, an engine starts with, or refuses."""
    events.update({**COUNTS, "started": 0})
    model = load_model(bench.model, device="cpu", dtype="float32")
    small = {"page_size": 4, "max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 32}

    @FEW
    @given(changes=some(EngineConfig, "unknown"))
    def run(changes: dict[str, Any]) -> None:
        if not attempt(events, lambda: EngineConfig(**changes)):
            return
        sized = {} if changes.get("kv_cache_gib") is not None else {"num_pages": 24}
        given = {**small, **sized, **changes, "draft_model": None}  # a draft model would have to be there
        events["started"] += attempt(events, lambda: Engine(EngineConfig(**given), model))

    run()


def test_config_json(bench: Bench, events: Counter[str]) -> None:
    events.update(COUNTS)
    rope = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "attention_factor"]
    rope += ["beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "low_freq_factor"]
    rope += ["high_freq_factor", "partial_rotary_factor"]
    names = [*CONFIG, "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "dtype", "torch_dtype"]
    names += [
        "bos_token_id",
        "rms_norm_eps",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
    ]
    names += ["quantization_config", "unknown", "partial_rotary_factor", "original_max_position_embeddings"]
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kinds = [{"rope_type": "default"}, {"rope_type": "llama3", "factor": 2.0, **bounds}]
    kinds += [{"rope_type": kind, "factor": 2.0} for kind in ("linear", "dynamic", "yarn", "proportional")]
    kinds += [{"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}]
    changed = st.dictionaries(st.sampled_from(rope), mostly(st.floats(0.5, 64), JSON), max_size=2)
    scaling = st.builds(lambda kind, changes: {**kind, **changes}, st.sampled_from(kinds), changed)

    values = mostly(st.integers(1, 64), st.one_of(FLOATS, JSON))

    @MANY
    @given(
        changes=st.dictionaries(st.sampled_from(names), values, max_size=2),
        rotation=mostly(st.none(), scaling),
        family=st.sampled_from(families()),
    )
    def run(changes: dict[str, Any], rotation: Any, family: tuple[str, tuple[str, ...]]) -> None:
        known = {"model_type": family[0], "architectures": list(family[1])}
        path = bench.root / "copy"
        path.mkdir(exist_ok=True)
        text = json.dumps({**CONFIG, **known, **({"rope_scaling": rotation} if rotation else {}), **changes})
        (path / "config.json").write_text(text)
        attempt(events, lambda: load_model(path, device="cpu", load_format="random", dtype="float32"))

    run()


HEADER_ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "BOOL", "x"]),
            "shape": st.lists(st.integers(-2, 2**40), max_size=3),
            "data_offsets": st.lists(st.integers(-8, 2**40), min_size=1, max_size=3),
        }
    ),
)


def test_safetensors_headers(bench: Bench, events: Counter[str]) -> None:
    """Changed entries, changed bytes, and cuts anywhere."""
    events.update({"refused": 0, "CheckpointError": 0, "entries": 0, "bytes": 0, "cut": 0})
    whole = (bench.model / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    names = list(json.loads(whole[8 : 8 + size]))

    def try_out(kind: str, data: bytes) -> None:
        path = bench.copy()
        (path / "model.safetensors").write_bytes(data)
        events[kind] += 1
        attempt(events, lambda: load_model(path, device="cpu"))

    @FEW
    @given(name=st.sampled_from([*names, "more", "__metadata__"]), entry=HEADER_ENTRIES)
    def entries(name: str, entry: Any) -> None:
        try_out("entries", with_header(whole, lambda header: header.update({name: entry})))

    @FEW
    @given(place=st.integers(0, size + 40), byte=st.integers(0, 255))
    def single(place: int, byte: int) -> None:
        try_out("bytes", whole[:place] + bytes([byte]) + whole[place + 1 :])

    @FEW
    @given(length=st.integers(0, len(whole) - 1))
    def cut(length: int) -> None:
        try_out("cut", whole[:length])

    entries()
    single()
    cut()


TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]


def test_tokenizer_files(bench: Bench, events: Counter[str]) -> None:
    events.update({**COUNTS, "TokenizerError": 0})
    names = ["added_tokens_decoder", "eos_token", "bos_token", "extra_special_tokens", "additional_special_tokens"]
    names += [
        "chat_template",
        "eos_token_id",
        "model",
        "decoder",
        "added_tokens",
        "pre_tokenizer",
        "normalizer",
        "version",
    ]
    tokens = st.dictionaries(
        st.sampled_from(["3", "300", "-1", "x", "258"]),
        st.fixed_dictionaries({"content": st.one_of(st.text(max_size=3), JSON), "special": JSON}),
        max_size=2,
    )

    @FEW
    @given(
        file=st.sampled_from(TOKENIZER_FILES),
        changes=st.dictionaries(st.sampled_from(names), st.one_of(JSON, tokens), min_size=1, max_size=2),
    )
    def run(file: str, changes: dict[str, Any]) -> None:
        path = bench.copy() / file
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**old, **changes}))

        def use() -> None:
            tokenizer = Tokenizer.from_dir(path.parent)
            tokenizer.decode(tokenizer.encode("ab"))
            if tokenizer.chat_templates:
                tokenizer.apply_chat_template([{"role": "user", "content": "a"}])

        attempt(events, use)

    run()


def test_records(bench: Bench, events: Counter[str]) -> None:
    """A record with a changed entry is refused, or it is resumed and runs to its end."""
    events.update({**COUNTS, "RequestError": 0})
    record = bench.record()

    @MANY
    @given(
        name=st.sampled_from(list(record)),
        value=st.one_of(ODD, JSON, st.lists(JSON, max_size=6), st.lists(st.integers(0, 260), min_size=5, max_size=7)),
    )
    def run(name: str, value: Any) -> None:
        def resume() -> None:
            request = bench.llm.engine.resume({**record, name: value})
            while bench.llm.engine.has_work:
                bench.llm.engine.step()
            assert request.finish

        attempt(events, resume)
        bench.llm.engine.check_idle()

    run()


def test_record_parameters(bench: Bench, events: Counter[str]) -> None:
    events.update(COUNTS)
    record = bench.record()

    @FEW
    @given(changes=some(SamplingParams, "unknown"))
    def run(changes: dict[str, Any]) -> None:
        def resume() -> None:
            bench.llm.engine.resume({**record, "params": {**record["params"], **changes}})
            while bench.llm.engine.has_work:
                bench.llm.engine.step()

        attempt(events, resume)
        bench.llm.engine.check_idle()

    run()


def test_prompts(bench: Bench, events: Counter[str]) -> None:
    events.update({**COUNTS, "RequestError": 0})
    prompts = st.one_of(
        ODD,
        st.fixed_dictionaries({"prompt_token_ids": ODD}),
        st.fixed_dictionaries({"prompt": ODD}, optional={"prompt_token_ids": ODD}),
        st.lists(ODD, max_size=2),
    )
    params = SamplingParams(max_tokens=1)

    @FEW
    @given(prompt=prompts)
    def run(prompt: Any) -> None:
        attempt(events, lambda: bench.llm.generate(prompt, params))
        bench.llm.engine.check_idle()

    run()


def test_conversations(bench: Bench, events: Counter[str]) -> None:
    events.update({**COUNTS, "RequestError": 0})
    message = st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "wizard", "", None, 5]),
            "content": mostly(st.text(max_size=3), ODD),
        }
    )

    @FEW
    @given(messages=mostly(st.lists(message, min_size=1, max_size=2), ODD))
    def run(messages: Any) -> None:
        attempt(events, lambda: bench.llm.chat(messages, SamplingParams(max_tokens=1)))
        bench.llm.engine.check_idle()

    run()


def test_lines(tmp_path: Path, events: Counter[str]) -> None:
    events.update({**COUNTS, "RequestError": 0})
    names = [spec.name for spec in dataclasses.fields(SamplingParams)]
    record = st.fixed_dictionaries(
        {"prompt": st.text(max_size=3)},
        optional={"params": st.one_of(JSON, st.dictionaries(st.sampled_from(names), JSON))},
    )
    line = st.one_of(st.binary(max_size=12), st.one_of(JSON, record).map(lambda x: json.dumps(x).encode()))
    path = tmp_path / "in.jsonl"

    @FEW
    @given(lines=st.lists(line, max_size=2))
    def run(lines: list[bytes]) -> None:
        path.write_bytes(b"\n".join(lines))
        attempt(events, lambda: read_jobs(path, SamplingParams()))

    run()


@given(value=ODD)
def test_every_value_can_be_shown(value: Any) -> None:
    assert 0 < len(show(value)) <= 60


def test_a_value_that_cannot_be_shown_is_named_by_its_type() -> None:
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert show(Silent()) == "a Silent"
    assert show(10**5000) == "a int"
    with pytest.raises(HeadraceError, match="max_tokens is a int"):
        SamplingParams(max_tokens=-(10**5000))
