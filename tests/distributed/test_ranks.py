"""Two processes as one engine: the tokens of one rank, whatever the schedule and the parts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from pair import PROMPTS, TINY, alone, both, logprobs, tokens, work
from tiny import make_engine
from tiny_models import reference

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, HeadraceError, RequestError
from headrace.models.checkpoint import load_model
from headrace.parts import REGISTRIES
from headrace.ranks import Ranks
from headrace.registry import Part
from headrace.request import Finish
from headrace.team import Lead

EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "gpt-oss": ("gpt_oss", {}),
    "olmo2": ("olmo2", {}),
    "deepseek-v3": ("deepseek_v3", {"num_key_value_heads": 4}),
}
ENGINE = {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, and a drafter that is often right."""
    places = {}
    for name, (family, options) in FAMILIES.items():
        places[name] = tmp_path_factory.mktemp(name)
        reference(family, places[name], **(EVEN | options))
    places["drafter"] = tmp_path_factory.mktemp("drafter")
    model = reference("llama", places["drafter"], **EVEN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(places["drafter"])
    return places


def compare(lead: Lead, directory: Path, wants: dict[str, Any] | None = None, **options: Any) -> tuple[Engine, Engine]:
    """The same work on one rank and on two: equal tokens, and log-probabilities but for rounding."""
    one = alone(directory, **options).engine
    expected = work(one, wants)
    with both(lead, directory, **options) as front:
        found = work(front.engine, wants)
        assert tokens(found) == tokens(expected)
        assert logprobs(found) == pytest.approx(logprobs(expected), rel=1e-9, abs=1e-9)
    return one, front.engine


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, lead: Lead, models: dict[str, Path], events: Counter[str]) -> None:
    one, two = compare(lead, models[name])
    bytes_one, bytes_two = one.allocated_bytes, two.allocated_bytes
    copied = name in ("one-kv-head", "deepseek-v3")  # the one head that there is stands on both ranks
    assert bytes_two == bytes_one // (1 if copied else 2)
    stats = two.stats
    events.update(
        {"chunk": stats.chunks, "famine": stats.preemptions, "abort": stats.aborts, "hit": two.cache.hit_tokens}
    )
    if name != "gpt-oss":  # by the time that the others may start, its windows have passed the prompt
        events["fork"] += stats.forks


def refusal(directory: Path, options: dict[str, Any]) -> str:
    """What an engine on two ranks says instead of starting."""
    model = load_model(directory, device="cpu", dtype="float64")
    try:
        make_engine(model=model, tensor_parallel_size=2, ranks=Ranks(0, 2), **options)
    except HeadraceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("part", [pytest.param(part, id=part.name) for seam in REGISTRIES for part in seam])
def test_every_part_runs_or_is_refused(part: Part[Any], lead: Lead, models: dict[str, Path]) -> None:
    given = {k: str(models["drafter"]) if v == "<checkpoint>" else v for k, v in part.example.items()}
    options = {k: v for k, v in given.items() if k in ENGINE}
    wants = {k: v for k, v in given.items() if k not in ENGINE}
    sentence = refusal(models["llama"], options)
    if sentence:
        assert part.name == "quest", sentence
        assert "tensor_parallel_size=2" in sentence
        with pytest.raises(ConfigError, match="no rank has all of them"):
            LLM(str(models["llama"]), **(TINY | options | {"tensor_parallel_size": 2}))
        return
    if SamplingParams(**wants).constraint:  # grammars are of text, and end
        write_tokenizer(models["llama"])
        wants, options = wants | {"ignore_eos": False}, options | {"skip_tokenizer_init": False}
    compare(lead, models["llama"], wants, **options)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of the model's 131 tokens: three special ones, the letters of ASCII, and pairs of digits."""
    letters = [chr(code) for code in range(33, 127)]
    pairs = [f"{i:02}" for i in range(131 - 3 - len(letters))]
    vocab = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters, *pairs])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"preemption": "swap", "num_pages": 30}, ["swaps"]),
        ({"preemption": "auto", "evictor": "key_norm", "cache_budget": 12, "cache_interval": 5, "num_pages": 26}, []),
        ({"preemption": "swap", "evictor": "key_norm", "cache_budget": 12, "cache_interval": 5}, []),
        ({"async_scheduling": True, "check_invariants": False, "decoder": "ngram,autoregressive"}, []),
        ({"async_scheduling": True, "check_invariants": False}, ["ahead", "steady"]),
        ({"max_num_batched_tokens": None, "num_pages": None, "kv_cache_gib": 0.01}, []),
        ({"max_num_batched_tokens": None, "num_pages": None, "enable_prefix_caching": False}, []),
    ],
    ids=["swap", "auto", "swap-evicted", "ngram-ahead", "ahead", "measured", "free-memory"],
)
def test_schedules(options: dict[str, Any], counts: list[str], lead: Lead, models: dict[str, Path]) -> None:
    _, engine = compare(lead, models["llama"], **options)
    assert all(getattr(engine.stats, name) for name in counts)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_narrow_types_differ_at_near_ties_only(
    dtype: str, lead: Lead, models: dict[str, Path], events: Counter[str]
) -> None:
    """Where a token differs, both were about as likely: the sum over ranks is rounded otherwise than one product."""
    events.update({"equal": 0} if dtype == "float32" else {"near-tie": 0})
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=8, ignore_eos=True)
    runs = []
    for front in (alone(models["llama"], dtype=dtype), None):
        with both(lead, models["llama"], dtype=dtype) if front is None else contextlib.nullcontext(front) as one:
            samples = [one.engine.add(prompt, params, request_id=str(i))[0] for i, prompt in enumerate(PROMPTS)]
            while one.engine.has_work:
                one.engine.step()
            runs.append(samples)
    for mine, theirs in zip(*runs, strict=True):
        pairs = zip(mine.output_ids, theirs.output_ids, strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is None:
            events["equal"] += 1
            continue
        events["near-tie"] += 1
        top = mine.top_logprobs[first]
        assert top is not None
        gap = top[mine.output_ids[first]].logprob - top[theirs.output_ids[first]].logprob
        assert 0 <= gap < (1e-4 if dtype == "float32" else 0.1)


def test_deadlines_refusals_and_records(lead: Lead, models: dict[str, Path]) -> None:
    """What goes by the clock ends on all ranks in the same step; what is refused is refused by all."""
    with both(lead, models["llama"]) as front:
        engine = front.engine
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        with pytest.raises(RequestError, match="vocabulary"):
            engine.add([1, 2, 10_000], params, request_id="wrong")
        with pytest.raises((TypeError, ValueError)):
            engine.add(["a", None], params, request_id="worse")  # type: ignore[list-item]
        with pytest.raises(RequestError, match="cannot be sent"):
            engine.add([1, 2], params, request_id="odd", arrival_s=(x for x in [1.0]))  # type: ignore[arg-type]
        (late,) = engine.add(PROMPTS[0], params, request_id="late", deadline_s=0.05)
        (fine,) = engine.add(PROMPTS[1], params, request_id="fine", deadline_s=60.0)
        for _ in range(4):
            engine.step()
        record = engine.export(fine)
        engine.abort("fine")
        while engine.has_work:
            engine.step()
        assert late.finish is Finish.TIMEOUT
        resumed = engine.resume(record)
        while engine.has_work:
            engine.step()
        engine.forget_prefixes()
        (whole,) = engine.add(PROMPTS[1], dataclasses.replace(params), request_id="whole")
        while engine.has_work:
            engine.step()
        assert resumed.output_ids == whole.output_ids
        engine.check_idle()


def test_async_readers(lead: Lead, models: dict[str, Path]) -> None:
    """An engine in a thread, with readers that leave and one that is aborted by name."""
    params = SamplingParams(temperature=0.8, max_tokens=20, seed=3, n=2, ignore_eos=True)
    one = alone(models["qwen3"])
    asked = [one.engine.add(prompt, params, request_id=str(i)) for i, prompt in enumerate(PROMPTS)]
    while one.engine.has_work:
        one.engine.step()
    wanted = [[sample.output_ids for sample in samples] for samples in asked]

    async def read(llm: AsyncLLM, i: int) -> list[list[int]]:
        last = None
        async for output in llm.generate({"prompt_token_ids": PROMPTS[i]}, params, request_id=str(i)):
            last = output
            if i == 4:
                break
            if i == 3:
                await llm.abort("3")
        assert last is not None
        return [sample.token_ids for sample in last.outputs]

    async def serve(front: Any) -> list[list[list[int]]]:
        async with AsyncLLM(front=front) as llm:
            return await asyncio.gather(*(read(llm, i) for i in range(len(PROMPTS))))

    with both(lead, models["qwen3"]) as front:
        results = asyncio.run(serve(front))
        front.engine.check_idle()
    assert results[:3] == wanted[:3]


def test_stop_strings_end_requests_on_all_ranks(lead: Lead) -> None:
    """The other rank finds them with a tokenizer of its own."""
    from headrace.llm import BUNDLED_MODEL

    options = {"skip_tokenizer_init": False, "max_model_len": 256, "num_pages": 128, "dtype": "float32"}
    params = SamplingParams(temperature=0.0, max_tokens=40, stop=["return", "\n\n"], seed=1)
    texts = ["def fibonacci(n):\n", "import os\n\n\ndef walk(path):\n", "class Stack:\n"]
    results = []
    for front in (alone(BUNDLED_MODEL, **options), None):
        with both(lead, BUNDLED_MODEL, **options) if front is None else contextlib.nullcontext(front) as one:
            samples = [one.add(one.encode(text), params, request_id=str(i), number=i) for i, text in enumerate(texts)]
            while one.engine.has_work:
                one.engine.step()
            one.engine.check_idle()
            results.append([one.output(group).outputs[0].text for group in samples])
            assert {group[0].finish for group in samples} == {Finish.STOP}
    assert results[0] == results[1]


def test_an_engine_without_its_ranks_is_refused() -> None:
    with pytest.raises(HeadraceError, match="started on 1 ranks"):
        make_engine(tensor_parallel_size=2)
