"""The tiny model in float64 with room for adapters, four adapters for it, and its weights with each merged.

A merged model without any adapter is the oracle: in float64 a tie between the two is a bug.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from lora_files import ALL, modules_of, write_adapter
from tiny import CONFIG, DEVICE, make_engine, run_all, tiny_model

from headrace.engine.engine import Engine
from headrace.layers.adapters import AdapterBank
from headrace.models.adapters import Adapter, read_adapter
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams
from headrace.request import Request

RANK = 8
KINDS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "seed": 1},
    "one": {"rank": 1, "seed": 2, "targets": ("q_proj", "v_proj"), "size": 2.0},
    "odd": {"rank": 7, "seed": 3, "targets": ("k_proj", "o_proj", "gate_proj", "down_proj"), "use_rslora": True},
    "full": {"rank": 8, "seed": 4, "alpha": 16},
}
"""Adapters whose tokens differ from the model's and from each other's."""


@functools.cache
def directories() -> dict[str, str]:
    """Where each adapter lies."""
    made = tempfile.mkdtemp()
    for kind, given in KINDS.items():
        options = dict(given)
        shapes = modules_of({k: v[0] for k, v in tiny_model().tensors().items()}, options.pop("targets", ALL))
        write_adapter(Path(made) / kind, shapes, dtype=torch.float64, **{"size": 0.5, **options})
    return {kind: str(Path(made) / kind) for kind in KINDS}


@functools.cache
def contents() -> dict[str, Adapter]:
    """Each adapter as read."""
    return {kind: read_adapter(directory) for kind, directory in directories().items()}


def _copy(places: int, dtype: str = "float64") -> CausalLM:
    """The tiny model again."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        bank = AdapterBank(places, RANK) if places else None
        model = load_model(directory, device=DEVICE, dtype=dtype, load_format="random", adapters=bank)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), tiny_model().parameters(), strict=True):
            mine.copy_(theirs)
    return model


@functools.cache
def merged(kind: str | None) -> CausalLM:
    """The tiny model with an adapter in its weights."""
    if kind is None:
        return tiny_model()
    model = _copy(0)
    weights = {name: views[0] for name, views in model.tensors().items()}
    with torch.no_grad():
        for module, (a_QE, b_NQ, scale) in contents()[kind].pairs.items():
            weights[f"{module}.weight"] += scale * (b_NQ @ a_QE).to(DEVICE)
    return model


def adapted_engine(
    places: int = 3, names: dict[str, str] | None = None, dtype: str = "float64", **options: Any
) -> Engine:
    """An engine with room for `places` adapters of rank 8; `names`: the kind of each that is loaded."""
    engine = make_engine(model=_copy(places, dtype), **options)
    for name, kind in (names or {}).items():
        engine.load_adapter(name, contents()[kind])
    return engine


@functools.cache
def _alone(kind: str | None, prompt: tuple[int, ...], params_key: str, options_key: str) -> tuple[tuple[int, ...], ...]:
    params = SamplingParams.from_dict(json.loads(params_key))
    options = {"enable_prefix_caching": False, "max_num_seqs": 1} | json.loads(options_key)
    engine = make_engine(model=merged(kind), **options)
    samples = engine.add(prompt, params, request_id="alone")
    for sample in samples:
        sample.parent = None
    run_all(engine)
    return tuple(tuple(sample.output_ids) for sample in samples)


def alone(kind: str | None, request: Request, **options: Any) -> tuple[int, ...]:
    """The tokens of a request's sample under an adapter that is merged, plain, alone, without a prefix cache."""
    params = {**request.params.to_dict(), "decoder": None, "adapter": None}
    prompt = tuple(request.tokens[: request.prompt_len])
    return _alone(kind, prompt, json.dumps(params), json.dumps(options))[request.sample]
