"""Every registered codec, and four of the tests, against what a coded cache is by definition."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coders
import keepers
import pytest
import tenants
import torch
from coders import EXACT, alone_of, coded_engine, run_coded
from masked import random_model, run_masked, window_model
from tiny import VOCAB, make_engine, run_all

from headrace.codecs.base import CODECS, Codec, Setup
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, RequestError
from headrace.params import SamplingParams
from headrace.parts import CODECS as LOADED
from headrace.parts import EVICTORS
from headrace.request import Request

PROMPTS = [tuple((5 * i * (j + 1) + j) % VOCAB for i in range(3 + 14 * j)) for j in range(4)]
PLAIN = "model"
SEALING = ["test_sealed", "test_sealed_same"]
ALL = [*LOADED.names(), *coders.CODERS]
BY_SLOT = [name for name in ALL if name not in SEALING]
CODED = [name for name in ALL if name != PLAIN]
BUDGET, INTERVAL = 11, 5


@pytest.fixture(autouse=True)
def _parts() -> Iterator[None]:
    with coders.registered(), keepers.registered(keepers.KEEPERS), tenants.registered(*tenants.TENANTS.items()):
        yield


def codec_of(name: str, page_size: int = 4) -> Codec:
    return CODECS[name].make(Setup(torch.float64, page_size))


def serve(engine: Engine, prompt: tuple[int, ...] = PROMPTS[2], **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, **params}
    (request,) = engine.add(prompt, SamplingParams(**settings), request_id="r")
    run_all(engine)
    engine.check_idle()
    return request


@pytest.mark.parametrize("name", [*EXACT, PLAIN])
def test_an_exact_codec_changes_no_token(name: str) -> None:
    engine, plain = coded_engine(name), make_engine(model=random_model())
    for prompt in PROMPTS:
        ours, theirs = serve(engine, prompt, max_tokens=40), serve(plain, prompt, max_tokens=40)
        assert ours.output_ids == theirs.output_ids
        assert ours.token_logprobs == theirs.token_logprobs, "not even a bit"
    assert (engine.upkeep.stats.seals > 10) == (name in SEALING)


@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("budget_rows", [1, 3, 4096])
@pytest.mark.parametrize("name", ALL)
def test_a_coded_cache_is_dense_attention_over_what_it_decodes_to(name: str, budget_rows: int, page_size: int) -> None:
    """Every drawn token and every log-prob of prompt and output, however the prompt is cut."""
    for prompt in PROMPTS[1:]:
        engine = coded_engine(name, max_num_batched_tokens=budget_rows, page_size=page_size)
        request = serve(engine, prompt, logprobs=0, prompt_logprobs=0)
        logits_TV = run_coded(random_model(), request.tokens, codec_of(name, page_size))
        assert request.output_ids == logits_TV[len(prompt) - 1 : -1].argmax(1).tolist()
        logprobs = logits_TV.log_softmax(1)
        for t in range(1, len(request.tokens)):
            inside = t < len(prompt)
            position = request.prompt_logprobs[t] if inside else request.top_logprobs[t - len(prompt)]
            assert position is not None
            assert position[request.tokens[t]].logprob == pytest.approx(
                float(logprobs[t - 1, request.tokens[t]]), abs=2e-5
            )


def test_the_codecs_are_lossy() -> None:
    """Otherwise the comparison above would say nothing."""
    plain = run_coded(random_model(), PROMPTS[3], codec_of(PLAIN))
    for name in ALL:
        gap = float((run_coded(random_model(), PROMPTS[3], codec_of(name)) - plain).abs().max())
        assert gap == 0.0 if name in (*EXACT, PLAIN) else gap > 1e-3


def test_fp8_codes_hold_what_they_say() -> None:
    """Relative error of E4M3 with the largest at its top, vector by vector; zeros, tiny and huge vectors, NaN."""
    codec = CODECS["fp8"].make(Setup(torch.float32, 4))
    generator = torch.Generator().manual_seed(0)
    x_RKD = torch.randn(200, 3, 16, generator=generator) * 10 ** torch.randint(-30, 30, (200, 3, 1)).float()
    x_RKD[5], x_RKD[6, 1, 3] = 0.0, torch.nan
    planes = codec.encode(x_RKD, -x_RKD)
    k, v = codec.decode(0, planes)
    assert torch.equal(k[5], torch.zeros(3, 16))
    assert bool(k[6, 1].isnan().any()), "what is broken must not look sound"
    good = torch.ones(200, dtype=torch.bool)
    good[6] = False
    most = x_RKD.abs().amax(2, keepdim=True)
    # Half a step of three bits; below 2**-6 / 448 of the largest the steps are even.
    bound = x_RKD.abs() * 2**-4 * 1.001 + most * 2**-10 / 448
    assert bool(((k - x_RKD).abs() <= bound)[good].all())
    assert torch.equal(v[good], -k[good])
    assert [(p.dtype, p.shape[2:]) for p in planes] == [(torch.uint8, (16,)), (torch.float32, ())] * 2


@pytest.mark.parametrize("evictor", [*[n for n in EVICTORS.names() if n != "full"], *keepers.KEEPERS])
@pytest.mark.parametrize("name", [n for n in BY_SLOT if n != PLAIN])
def test_evicted_and_coded_is_dense_attention_under_the_mask(name: str, evictor: str) -> None:
    """Evictors read decoded keys, and every plane moves with its slot."""
    codec = codec_of(name)

    def coded(k_RKD: torch.Tensor, v_RKD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = codec.decode(0, [x[:, :, None] for x in codec.encode(k_RKD, v_RKD)])
        return k[:, :, 0], v[:, :, 0]

    for prompt in PROMPTS[1:3]:
        engine = coded_engine(
            name, evictor=evictor, cache_budget=BUDGET, cache_interval=INTERVAL, max_num_batched_tokens=6
        )
        request = serve(engine, prompt, logprobs=0)
        groups = [group.layers for group in engine.cache.groups]
        expected = run_masked(
            random_model(), request.tokens, len(prompt), engine.evictors[evictor], BUDGET, groups, coded
        )
        assert request.output_ids == expected.logits_TV[len(prompt) - 1 : -1].argmax(1).tolist()
        logprobs = expected.logits_TV.log_softmax(1)
        for t in range(len(prompt), len(request.tokens)):
            value = request.top_logprobs[t - len(prompt)][request.tokens[t]].logprob
            assert value == pytest.approx(float(logprobs[t - 1, request.tokens[t]]), abs=2e-5)
        assert engine.upkeep.stats.compactions > 3


@pytest.mark.parametrize("decoder", ["ngram", *tenants.TENANTS])
@pytest.mark.parametrize("name", CODED)
def test_every_decoder_emits_what_plain_decoding_emits(name: str, decoder: str) -> None:
    """Drafts and trees across seals, rejected at every offset; the same sealed slots."""
    for draw, params in enumerate([{"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "presence_penalty": 0.6}]):
        for prompt in PROMPTS[draw : draw + 3]:
            plain = serve(coded_engine(name), prompt, **params)
            tenants.teach(prompt, tuple(plain.output_ids))
            for budget in (5, 4096):
                engine = coded_engine(name, decoder=decoder, max_num_batched_tokens=budget)
                assert serve(engine, prompt, **params).tokens == plain.tokens


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", ALL)
def test_what_is_reported_is_what_is_allocated(name: str, page_size: int) -> None:
    """Bytes of all planes, metadata included: what the allocator was asked for, page by page."""
    engine = coded_engine(name, page_size=page_size, num_pages=100, max_num_batched_tokens=7)
    cache = engine.cache
    held = [plane for planes in cache.planes for plane in planes]
    assert cache.allocated_bytes == sum(plane.untyped_storage().nbytes() for plane in held)
    page_bytes = [sum(plane[:, :, 0].numel() * plane.element_size() for plane in planes) for planes in cache.planes]
    (request,) = engine.add(PROMPTS[3], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True), request_id="r")
    most = 0
    while engine.has_work:
        engine.step()
        if not request.pages:
            break
        now = sum(pool.held * size for pool, size in zip(cache.pools, page_bytes, strict=True))
        assert cache.held_bytes(request) == now
        most = max(most, now)
        if name in SEALING:
            opened, sealed = (pool.held for pool in cache.pools)
            assert opened <= engine.codec.open_pages
            assert sealed == len(request.pages[1])
    assert most <= request.peak_cache_bytes <= most + sum(page_bytes) * 10
    engine.check_idle()


def test_sizes_in_bytes() -> None:
    """Three layers with two heads of eight: 96 numbers a token."""
    sizes = {"model": 96 * 8, "test_same": 96 * 8, "fp8": 96 + 12 * 4, "test_uneven": 48 + 6 * 4 + 48 * 2}
    for name, size in sizes.items():
        assert coded_engine(name, num_pages=10).allocated_bytes == size * 4 * 10
    engine = coded_engine("test_sealed", num_pages=300, max_num_seqs=2)
    # 8 + 3 tokens and what is left of a page: 4 open pages a request, and the trash.
    assert engine.allocated_bytes == 96 * 8 * 4 * (1 + 2 * 4) + (96 * 4 + 12 * 4) * 300
    chosen = coded_engine("test_sealed", num_pages=None, kv_cache_gib=4e-5, max_num_seqs=2)
    assert 4e-5 * 2**30 - (96 * 4 + 12 * 4) < chosen.allocated_bytes <= 4e-5 * 2**30


@pytest.mark.parametrize("name", CODED)
def test_a_hit_changes_no_token(name: str) -> None:
    """At every unit border and behind it, before and after pages are sealed, while the first request runs and after."""
    expected = {}
    whole = PROMPTS[3]
    for length in range(5, len(whole), 3):
        expected[length] = serve(coded_engine(name, enable_prefix_caching=False), whole[:length], max_tokens=12).tokens
    for stop_after in (1, 3, 100):
        engine = coded_engine(name, max_num_batched_tokens=16)
        (first,) = engine.add(whole, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), request_id="1")
        for _ in range(stop_after):
            engine.step()
        hits = 0
        for length, tokens in expected.items():
            params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
            (request,) = engine.add(whole[:length], params, request_id=str(length + 100))
            while not request.finish:
                engine.step()
                hits = max(hits, request.hit_tokens)
            assert request.tokens == tokens
        assert hits >= 8
        run_all(engine)
        engine.check_idle()
        assert first.tokens == serve(coded_engine(name, enable_prefix_caching=False), whole).tokens


@pytest.mark.parametrize("name", SEALING)
def test_a_long_hit_starts_although_there_are_few_open_pages(name: str) -> None:
    """Idle pages of a hit count pool by pool: there are many sealed ones, and room for one request's open ones."""
    engine = coded_engine(name, page_size=1, max_num_seqs=1, num_pages=97)
    prompt = (*PROMPTS[3], *PROMPTS[2])
    first = serve(engine, prompt, max_tokens=16)
    assert len(prompt) > 2 * engine.cache.available[0]
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    (again,) = engine.add(first.tokens[:-2], params, request_id="again")
    hit = 0
    while engine.has_work:
        engine.step()
        hit = max(hit, again.hit_tokens)
    assert hit > 2 * engine.cache.available[0]
    assert again.tokens[: len(first.tokens)] == first.tokens
    engine.check_idle()


@pytest.mark.parametrize("name", CODED)
def test_shared_pages_keep_their_contents(name: str) -> None:
    """Others read, fork, seal and end: no published page changes while it is held."""
    engine = coded_engine(name, page_size=2)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (reader,) = engine.add(PROMPTS[2], params, request_id="reader")
    while reader.n_done < 32:
        engine.step()
    whole = [range(reader.freed[p], reader.n_done // 2) for p in range(len(reader.pages))]
    if name in SEALING:
        whole[1] = range(reader.freed[0])
    shared = [[pages[k] for k in mine] for pages, mine in zip(reader.pages, whole, strict=True)]
    assert all(shared)

    def contents() -> list[torch.Tensor]:
        return [
            plane[:, :, ids].clone()
            for planes, ids in zip(engine.cache.planes, shared, strict=True)
            for plane in planes
        ]

    before = contents()
    engine.add(reader.tokens[:25], SamplingParams(n=3, temperature=0.9, seed=1, max_tokens=20), request_id="samples")
    engine.add(reader.tokens[:30], params, request_id="other")
    while reader.n_done < 38:
        engine.step()
        assert all(torch.equal(a, b) for a, b in zip(before, contents(), strict=True))
    run_all(engine)
    engine.check_idle()


@pytest.mark.parametrize("name", CODED)
def test_samples_share_a_prompt(name: str) -> None:
    params = SamplingParams(n=3, temperature=0.9, seed=1, max_tokens=20, ignore_eos=True)
    forks = 0
    for length in (5, 8, 9, 15, 16, 17, 30):
        engine = coded_engine(name)
        samples = engine.add(PROMPTS[3][:length], params, request_id="r")
        run_all(engine)
        engine.check_idle()
        forks += engine.stats.forks
        for sample in samples:
            single = coded_engine(name, enable_prefix_caching=False, max_num_seqs=1)
            own = single.add(PROMPTS[3][:length], params, request_id="own")[sample.sample]
            own.parent = None
            run_all(single)
            assert sample.output_ids == own.output_ids
    assert forks >= 6


@pytest.mark.parametrize("name", ALL)
def test_a_record_taken_at_any_step_continues_with_the_same_tokens(name: str) -> None:
    expected = serve(coded_engine(name)).tokens
    for stop_after in range(1, 30, 4):
        engine = coded_engine(name, max_num_batched_tokens=7)
        (request,) = engine.add(
            PROMPTS[2], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True), request_id="r"
        )
        for _ in range(stop_after):
            engine.step()
        record = engine.export(request)
        other = coded_engine(name, max_num_batched_tokens=11)
        resumed = other.resume(record)
        run_all(other)
        assert resumed.tokens == expected
        different = "fp8" if name == PLAIN else PLAIN
        with pytest.raises(RequestError, match=f"kept with codec='{name}'.*, here with codec='{different}'"):
            coded_engine(different).resume(record)


@pytest.mark.parametrize("name", CODED)
def test_decoders_own_models_keep_their_type(name: str, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file
    from tiny import CONFIG, tiny_model

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {key: views[0].contiguous() for key, views in tiny_model().tensors().items()}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    plain = [serve(coded_engine(name, model=tiny_model()), prompt).tokens for prompt in PROMPTS[:3]]
    engine = coded_engine(name, model=tiny_model(), decoder="draft_model", draft_model=str(tmp_path))
    assert [serve(engine, prompt).tokens for prompt in PROMPTS[:3]] == plain
    own = engine.cache.layer_planes(2)
    assert [[plane.dtype for plane in planes] for planes in own] == [[torch.float64] * 2]


def test_engines_that_cannot_work_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"codec": "nope"}, "codec='nope' is not a known codec; known: "),
        (
            {"codec": "test_sealed", "evictor": "key_norm", "cache_budget": 20},
            "codec='test_sealed' seals whole pages, and evictor='key_norm' moves slots",
        ),
        ({"codec": "test_sealed", "model": window_model()}, "the model has sliding-window layers"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            make_engine(**{"model": random_model(), **options})


@pytest.mark.parametrize("name", [n for n in BY_SLOT if n != PLAIN])
def test_windows_give_pages_back_under_a_codec(name: str) -> None:
    engine = coded_engine(name, model=window_model())
    for prompt in PROMPTS:
        request = serve(engine, prompt)
        alone = coded_engine(name, model=window_model(), enable_prefix_caching=False, page_size=1)
        assert request.tokens == serve(alone, prompt).tokens


SOURCE = '''
"""Keys and values in half the bytes."""

import torch

from headrace.codecs.base import CODECS, Codec
from headrace.step import PageClass, Plane


@CODECS.register("half", label="lossy", summary="Half the bytes.")
class Half(Codec):
    def classes(self, state):
        sizes = {"k": state.head_dim, "v": state.v_head_dim}
        return [PageClass("half", tuple(Plane(name, (size,), torch.float16) for name, size in sizes.items()))]

    def encode(self, k_RKD, v_RKD):
        return k_RKD.half(), v_RKD.half()

    def decode(self, number, planes):
        return planes[0].to(self.dtype), planes[1].to(self.dtype)
'''


def test_a_codec_from_a_file(tmp_path: Path) -> None:
    """A new method is one file: engine, cache and kernels run it without having heard of it."""
    path = tmp_path / "half.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("half", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        engine = coded_engine("half", evictor="full,key_norm", decoder="ngram")
        requests = [
            engine.add(prompt, SamplingParams(max_tokens=12, seed=i), request_id=str(i))[0]
            for i, prompt in enumerate(PROMPTS)
        ]
        run_all(engine)
        engine.check_idle()
        for request in requests:
            assert (tuple(request.output_ids), request.finish.reason) == alone_of(request, "half")
    finally:
        CODECS.remove("half")
