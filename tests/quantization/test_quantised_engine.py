"""Law 1 with quantised weights: tokens of a request alone, whatever runs beside it and however it is cut; and bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import awq, compressed, fp8, gptq, quantise
from lora_files import modules_of, write_adapter
from safetensors.torch import load_file
from test_law_one import serve
from test_layouts import AWQ, GPTQ, SMALL
from tiny import make_engine, run_all
from tiny_models import reference

from headrace.kernels.project_int4.cpu import FEW_ROWS
from headrace.layers.adapters import AdapterBank
from headrace.layers.linear import Linear
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams

FORMS = {
    "awq": (awq(32), AWQ),
    "gptq": (gptq(32, shuffled=True, symmetric=False), GPTQ | {"desc_act": True}),
    "fp8": (fp8("channel"), compressed("channel")),
}
VOCAB = 61


def model_of(form: str, directory: Path, dtype: str) -> CausalLM:
    maker, config = FORMS[form]
    reference("llama", directory / "source", **SMALL, vocab_size=VOCAB)
    return load_model(quantise(directory / "source", directory / "out", maker, config), device="cpu", dtype=dtype)


@pytest.mark.parametrize(("form", "dtype"), [("gptq", "float64"), *((form, "float32") for form in FORMS)])
def test_batch_changes_no_token(form: str, dtype: str, tmp_path: Path, events: Counter[str]) -> None:
    """Float32 runs the compiled forms, on both sides of the choice by rows; the seeds have no ties within rounding."""
    model = model_of(form, tmp_path, dtype)
    events.update(dict.fromkeys(["greedy", "sampled", "many rows", "few rows", "preempted"], 0))
    known: dict[Any, tuple[int, ...]] = {}

    def alone(prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
        key = prompt, str(params.to_dict())
        if key not in known:
            engine = make_engine(model=model, enable_prefix_caching=False)
            (request,) = engine.add(prompt, params, request_id="alone")
            run_all(engine)
            known[key] = tuple(request.output_ids)
        return known[key]

    prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20).map(tuple)
    params = st.builds(
        SamplingParams, temperature=st.sampled_from([0.0, 0.9]), seed=st.integers(0, 2), max_tokens=st.integers(1, 12)
    )
    arrivals = st.lists(st.tuples(st.sampled_from([0, 0, 1, 5]), prompts, params, st.none()), min_size=1, max_size=6)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(arrivals=arrivals, budget=st.sampled_from([FEW_ROWS, 200]), pages=st.sampled_from([9, 9, 100]))
    def run(arrivals: Any, budget: int, pages: int) -> None:
        engine = make_engine(model=model, max_num_batched_tokens=budget, num_pages=pages, max_model_len=32)
        for request in serve(engine, arrivals):
            assert tuple(request.output_ids) == alone(tuple(request.tokens[: request.prompt_len]), request.params)
            events["greedy" if request.params.greedy else "sampled"] += 1
        events["many rows" if budget > FEW_ROWS else "few rows"] += 1
        events["preempted"] += engine.stats.preemptions
        engine.check_idle()

    run()


@pytest.mark.parametrize("form", FORMS)
def test_adapters(form: str, tmp_path: Path) -> None:
    """What an adapter adds to a quantised model is what it adds to the same model with dense weights."""
    maker, config = FORMS[form]
    reference("llama", tmp_path / "source", **SMALL, vocab_size=VOCAB)
    path = quantise(tmp_path / "source", tmp_path / "out", maker, config)
    write_adapter(tmp_path / "a", modules_of(load_file(path / "dense" / "model.safetensors")))
    found = []
    for one in (path, path / "dense"):
        model = load_model(one, device="cpu", dtype="float64", adapters=AdapterBank(2, 8))
        engine = make_engine(model=model, max_adapters=2)
        engine.load_adapter("a", tmp_path / "a")
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        requests = [
            engine.add([5, 9, 2, 7], replace(params, adapter=name), request_id=str(name))[0] for name in (None, "a")
        ]
        run_all(engine)
        found.append([tuple(request.output_ids) for request in requests])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize(("form", "bits"), [("awq", 4 + 40 / 32), ("gptq", 4 + 40 / 32), ("fp8", 8 + 32 / 64)])
def test_bytes(form: str, bits: float, tmp_path: Path) -> None:
    """Of all parameters and buffers that linear maps keep; zeros and scales are 5 bytes for each output of a group."""
    model = model_of(form, tmp_path, "float32")
    stored = weights = 0
    for m in model.modules():
        if isinstance(m, Linear):
            assert m.store is not None
            kept = [*m.parameters(), *m.buffers()]
            assert not any(t.dtype == torch.float32 and t.numel() >= m.inputs * sum(m.outputs) for t in kept)
            stored += sum(t.untyped_storage().nbytes() for t in kept)
            weights += m.inputs * sum(m.outputs)
    # Orders are random here, one a projection; those that the tool makes are one for all projections of an input.
    orders = 8 * 4 * (64 * 6 + 96) * 2 if form == "gptq" else 0
    assert 8 * stored <= bits * weights + orders
    assert stored < 0.4 * 4 * weights
