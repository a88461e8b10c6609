"""`parity`: a result is the same bit for bit whatever runs beside it, in float32 and bfloat16; and what it refuses."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CONFIG, DEVICE, EOS, VOCAB, cut, pad, run_all

from headrace import LLM
from headrace.config import EngineConfig
from headrace.engine.assembly import check_parity
from headrace.engine.engine import Engine
from headrace.errors import ConfigError
from headrace.layers.adapters import AdapterBank
from headrace.llm import BUNDLED_MODEL
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams
from headrace.quantization.watch import Watched
from headrace.request import Request
from headrace.step import LayerState

LEN = 400
GEOMETRY = CONFIG | {"hidden_size": 64, "intermediate_size": 200, "head_dim": 16, "max_position_embeddings": LEN}
DTYPES = ("float32", "bfloat16")


def write(directory: Path, **changes: Any) -> Path:
    """A checkpoint's directory of which only the configuration is there."""
    (directory / "config.json").write_text(json.dumps(GEOMETRY | changes))
    return directory


def load(directory: Path, dtype: str, parity: bool = True, **options: Any) -> CausalLM:
    """Weights large enough that results differ, of a type in which sums are rounded."""
    model = load_model(directory, device=DEVICE, dtype=dtype, load_format="random", parity=parity, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.dim() > 1 else 1.0)
    return model


def engine_of(model: CausalLM, **options: Any) -> Engine:
    settings: dict[str, Any] = {"num_pages": 400, "max_num_batched_tokens": 1024, "max_num_seqs": 16, "page_size": 4}
    settings |= {"max_model_len": LEN, "async_scheduling": False, "cuda_graphs": False, "preemption": "recompute"}
    config = EngineConfig(**{**settings, "check_invariants": True, "parity": model.parity, **options})
    return Engine(config, model, eos_ids=[EOS])


class Seen:
    """The bits of the rows that tokens are drawn from, by request and position, whatever step they were in."""

    def __init__(self, engine: Engine) -> None:
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        draw = engine.runner._draw

        def watched(rows: Any, raw_MV: torch.Tensor, *rest: Any) -> Any:
            segments = rest[1]
            places = torch.cat([seg.out_row_M for _, seg in segments])[: len(raw_MV)]
            indices, positions = rows.req[places].tolist(), rows.t[places].tolist()
            names = {r.index: f"{r.request_id}.{r.sample}" for r in engine.running}
            for index, position, logits_V in zip(indices, positions, raw_MV, strict=True):
                if index in names:
                    self.logits[names[index], position] = logits_V.clone()
            return draw(rows, raw_MV, *rest)

        engine.runner._draw = watched  # type: ignore[method-assign]


Asked = tuple[tuple[int, ...], SamplingParams]


def asked(rng: random.Random, count: int, shared: Sequence[int]) -> list[Asked]:
    """Prompts of many lengths, some of which begin alike, with and without noise."""
    found = []
    for i in range(count):
        head = shared[: rng.choice([0, 0, 30, 131])]
        prompt = (*head, *(rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 9, 33, 80]))))
        params = SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            max_tokens=rng.choice([1, 4, 28]),
            logprobs=2,
            prompt_logprobs=1 if rng.random() < 0.2 else None,
            ignore_eos=True,
        )
        found.append((prompt, params))
    # Short prompts that grow, so that pages run out.
    longer = SamplingParams(temperature=1.0, max_tokens=90, ignore_eos=True, logprobs=1)
    return [*found, *((tuple(rng.randrange(VOCAB) for _ in range(5)), replace(longer, seed=i)) for i in range(4))]


def outcome(request: Request) -> tuple[Any, ...]:
    """Tokens, and log-probs to the last bit."""
    return request.output_ids, request.token_logprobs, request.top_logprobs, request.prompt_logprobs


def tokens_only(wanted: Sequence[Asked]) -> list[Asked]:
    """The same without top log-probs, for which steps are not padded."""
    return [(prompt, replace(params, logprobs=None, prompt_logprobs=None)) for prompt, params in wanted]


def alone(model: CausalLM, wanted: Sequence[Asked]) -> tuple[list[tuple[Any, ...]], dict[Any, torch.Tensor]]:
    """Each request with an engine for itself, its prompt in one step."""
    engine = engine_of(model, enable_prefix_caching=False)
    seen = Seen(engine)
    outcomes = []
    for i, (prompt, params) in enumerate(wanted):
        (request,) = engine.add(prompt, params, request_id=str(i))
        run_all(engine)
        outcomes.append(outcome(request))
    return outcomes, seen.logits


def together(engine: Engine, wanted: Sequence[Asked], rng: random.Random) -> list[Request]:
    """All of them, arriving in any order while others run."""
    queue = list(enumerate(wanted))
    rng.shuffle(queue)
    requests: dict[int, Request] = {}
    while queue or engine.has_work:
        for _ in range(rng.choice([0, 1, 5])):
            if queue:
                i, (prompt, params) = queue.pop()
                (requests[i],) = engine.add(prompt, params, request_id=str(i))
        engine.step()
    engine.check_idle()
    return [requests[i] for i in range(len(wanted))]


def differences(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> int:
    """Rows that a token was drawn from in both runs (a chunk's last row is one in its own only), with other bits."""
    return sum(not torch.equal(found[key], expected[key]) for key in found.keys() & expected.keys())


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40},
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen3", "bfloat16"), ("qwen2", "float32"), ("mistral", "bfloat16")],
)
def test_bits_are_those_of_the_request_alone(family: str, dtype: str, tmp_path: Path, events: Counter[str]) -> None:
    """Chunks of any size, prefix hits, famine, neighbours, padded steps: logits, tokens and log-probs are the same."""
    model = load(write(tmp_path, **FAMILIES[family]), dtype)
    rng = random.Random(family + dtype)
    shared = [rng.randrange(VOCAB) for _ in range(131)]
    wanted = asked(rng, 12, shared)
    outcomes, logits = alone(model, wanted)
    events.update(dict.fromkeys(["rows compared", "chunk", "hit", "padded shape", "piece", "planned ahead"], 0))
    if family != "mistral":  # a window gives its pages back
        events["famine"] = 0
    for budget, pages, ahead in ((3, 400, False), (7, 62, False), (50, 62, True), (1024, 62, True)):
        engine = engine_of(
            model,
            max_num_batched_tokens=budget,
            num_pages=pages,
            async_scheduling=ahead,
            max_model_len=240,
            preemption="swap" if budget == 7 else "recompute",
        )
        seen = Seen(engine)
        if ahead:
            pad(engine)
        else:  # what is not recorded whole runs in pieces
            cut(engine)
        if ahead and DEVICE == "cuda":  # a step that is recorded shows nobody what it holds
            del engine.runner._draw
            seen.logits = logits
        requests = together(engine, tokens_only(wanted) if ahead else wanted, rng)
        assert not differences(seen.logits, logits)
        assert [outcome(request)[: 2 if ahead else 4] for request in requests] == [
            x[: 2 if ahead else 4] for x in outcomes
        ]
        assert set(logits) <= set(seen.logits)
        events["rows compared"] += len(logits)
        events["chunk"] += engine.stats.chunks
        if "famine" in events:
            events["famine"] += engine.stats.preemptions
        events["hit"] += engine.cache.hit_tokens
        events["planned ahead"] += engine.stats.ahead
        events["piece"] += engine.runner.pieces.replays if engine.runner.pieces else 0
        events["padded shape"] += len(engine.runner.graphs.keys) if engine.runner.graphs else 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_parity_bits_differ(dtype: str, tmp_path: Path, events: Counter[str]) -> None:
    """The comparison above can fail: a row's last bits follow from its batch where sums have no fixed order."""
    model = load(write(tmp_path), dtype, parity=False)
    rng = random.Random(dtype)
    wanted = asked(rng, 12, [rng.randrange(VOCAB) for _ in range(131)])
    _, logits = alone(model, wanted)
    events.update({"rows that differ": 0})
    engine = engine_of(model, max_num_batched_tokens=50)
    seen = Seen(engine)
    together(engine, wanted, rng)
    # Where tokens differ, rows behind them have another past.
    events["rows compared"] += len(seen.logits.keys() & logits.keys())
    events["rows that differ"] += differences(seen.logits, logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_bytes_are_the_same(dtype: str, tmp_path: Path) -> None:
    """Keys and values of a prompt, evaluated whole or in odd chunks beside others."""
    model = load(write(tmp_path), dtype)
    rng = random.Random(7)
    prompt = tuple(rng.randrange(VOCAB) for _ in range(203))
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    def cached(engine: Engine) -> list[torch.Tensor]:
        (request,) = engine.add(prompt, params, request_id="it")
        while request.n_done < len(prompt) + 4:
            engine.step()
        (pages,) = engine.cache.page_tables(0)
        index = torch.arange(request.n_done - 1, device=engine.device)
        page = pages[request.index].long()[index // 4]
        planes = [plane for layer in range(2) for (one,) in [engine.cache.layer_planes(layer)] for plane in one]
        found = [plane[:, page, index % 4].clone()[:, : len(prompt)] for plane in planes]
        run_all(engine)
        return found

    whole = cached(engine_of(model, enable_prefix_caching=False))
    assert len(whole) == 4
    assert all(plane.abs().sum() > 0 for plane in whole)
    for budget in (1, 5, 13, 64):
        engine = engine_of(model, max_num_batched_tokens=budget, enable_prefix_caching=False)
        for i in range(3):
            engine.add(prompt[i : 40 + 9 * i], params, request_id=str(i))
        assert all(map(torch.equal, cached(engine), whole))


def test_speculation_gives_the_same_log_probs(tmp_path: Path, events: Counter[str]) -> None:
    """Rows of drafts are rows like others."""
    model = load(write(tmp_path), "bfloat16" if DEVICE == "cuda" else "float32")
    rng = random.Random(5)
    wanted = [
        ((4, 9, 17, 30) * 6 + (rng.randrange(VOCAB),), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
        for _ in range(6)
    ]
    expected, _ = alone(model, wanted)
    engine = engine_of(model, decoder="ngram", draft_tokens=3)
    requests = [engine.add(*one, request_id=str(i))[0] for i, one in enumerate(wanted)]
    while engine.has_work:
        events["drafted"] += sum(request.drafted for request in engine.running)
        engine.step()
    assert [outcome(request) for request in requests] == expected
    assert events["drafted"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": ({"codec": "fp8"}, "codec='fp8'"),
    "quest": ({"selector": "quest", "selector_budget": 64}, "selector='quest'"),
    "key_norm": ({"evictor": "key_norm", "cache_budget": 32}, "evictor='key_norm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_parts_of_the_cache(case: str, tmp_path: Path) -> None:
    model = load(write(tmp_path), "float32")
    options, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        engine_of(model, page_size=16, **options)


def test_refuses_models_that_it_does_not_cover(tmp_path: Path) -> None:
    """Each in one sentence."""
    with pytest.raises(ConfigError, match="room for adapters"):
        load(write(tmp_path), "float32", adapters=AdapterBank(2, 8))
    with pytest.raises(ConfigError, match="parity=True, and the model was built without"):
        engine_of(load(write(tmp_path), "float32", parity=False), parity=True)
    with pytest.raises(ConfigError, match="float64"):
        engine_of(load(write(tmp_path), "float64"))
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    with pytest.raises(ConfigError, match="experts"):
        load(write(tmp_path, **mixtral, num_experts_per_tok=2), "float32")
    names = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 96}
    (tmp_path / "config.json").write_text(json.dumps(names | {"n_embd": 24, "n_head": 3, "n_layer": 1}))
    with pytest.raises(ConfigError, match="layer norms"):
        load(tmp_path, "float32")
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        LLM(
            write(tmp_path),
            device="cpu",
            load_format="random",
            skip_tokenizer_init=True,
            parity=True,
            tensor_parallel_size=2,
        )
    if DEVICE == "cpu":
        with pytest.raises(ConfigError, match=r"activations 'gelu'.*CPU.*or a GPU"):
            load(write(tmp_path, hidden_act="gelu"), "float32")


def test_refuses_what_no_checkpoint_here_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights, decoders with other masks, layers with fixed states."""
    with pytest.raises(ConfigError, match="weights are quantised"):
        load_model(BUNDLED_MODEL, device="cpu", parity=True, quantization=Watched("test"))
    model = load(write(tmp_path), "float32")
    engine = engine_of(model)
    decoders: Any = {"canopy": SimpleNamespace(tree=True, causal=False)}
    with pytest.raises(ConfigError, match="decoder='canopy' evaluates rows"):
        check_parity(engine.config, model, engine.runner.target.form, {}, decoders)
    states = [LayerState("fixed", 1, 8, 8)]
    monkeypatch.setattr(model, "layer_states", lambda: states)
    with pytest.raises(ConfigError, match="fixed states"):
        check_parity(engine.config, model, engine.runner.target.form, {}, {})


def test_the_bundled_model_alone_and_in_a_batch() -> None:
    """Through the interface, steps recorded on a GPU, and with a draft model: tokens and log-probs."""
    options: dict[str, Any] = {"device": DEVICE, "dtype": "float32" if DEVICE == "cpu" else "bfloat16", "parity": True}
    llm = LLM(max_model_len=512, max_num_batched_tokens=256, **options)
    prompts = [
        f"def f{i}(x{', y' * i}):\n    " + "return x\n" * (7 * i % 50) for i in range(7 if DEVICE == "cpu" else 32)
    ]
    params = [SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12, logprobs=2) for i in range(len(prompts))]

    def read(outputs: Any) -> list[Any]:
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]

    batched = read(llm.generate(prompts, params))
    again = read(llm.generate(prompts[::-1], params[::-1]))[::-1]
    assert batched == again
    llm.engine.forget_prefixes()
    single = [read(llm.generate([prompt], [one]))[0] for prompt, one in zip(prompts, params, strict=True)]
    assert batched == single
    # Without top log-probs steps are recorded.
    plain = [replace(one, logprobs=None) for one in params]
    recorded = [output.outputs[0].token_ids for output in llm.generate(prompts, plain)]
    assert recorded == [tokens for tokens, _ in batched]
    drafting = LLM(max_model_len=256, max_num_batched_tokens=100, decoder="draft_model", draft_tokens=3, **options)
    assert read(drafting.generate(prompts, params)) == batched
