"""Every pair of registered parts of two seams: it runs and each request's tokens are its own, or it is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from tiny import CONFIG, VOCAB, make_engine, run_all, tiny_model

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import HeadraceError
from headrace.params import SamplingParams
from headrace.parts import REGISTRIES
from headrace.registry import Part

PAIRS = [
    pytest.param(one, other, id=f"{one.name}-{other.name}")
    for seam, another in itertools.combinations(REGISTRIES, 2)
    for one in seam
    for other in another
]
ENGINE = {f.name for f in dataclasses.fields(EngineConfig)}
PROMPTS = [[(3 * i * (j + 1) + j) % VOCAB for i in range(20 + j)] for j in range(3)]


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[str]:
    """A drafter: the tiny model's shape with other weights."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        tensors = {name: views[0].cpu().contiguous() for name, views in tiny_model(seed=1).tensors().items()}
        save_file(tensors, str(Path(directory) / "model.safetensors"))
        yield directory


def settings(parts: tuple[Part[Any], ...], checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine options and parameters that turn the parts on."""
    given = {k: checkpoint if v == "<checkpoint>" else v for part in parts for k, v in part.example.items()}
    options = {k: v for k, v in given.items() if k in ENGINE}
    return options, {k: v for k, v in given.items() if k not in ENGINE}


def start(options: dict[str, Any]) -> tuple[Engine | None, str]:
    """The engine, or the sentence with which it refuses."""
    try:
        return make_engine(max_num_batched_tokens=13, **options), ""
    except HeadraceError as refusal:
        return None, str(refusal)


def serve(engine: Engine, prompts: list[list[int]], params: dict[str, Any]) -> list[list[int]]:
    requests = []
    for i, prompt in enumerate(prompts):
        chosen = SamplingParams(**{"temperature": 0.8, "seed": len(prompt), "max_tokens": 16, **params})
        requests += engine.add(prompt, chosen, request_id=str(i))
        engine.step()
    run_all(engine)
    engine.check_idle()
    return [r.output_ids for r in requests]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pair(one: Part[Any], other: Part[Any], checkpoint: str) -> None:
    options, params = settings((one, other), checkpoint)
    engine, refusal = start(options)
    if engine is None:
        assert len(refusal.split()) > 5, "a refusal says what does not go together, and the way out"
        return
    together = serve(engine, [*PROMPTS, PROMPTS[0]], params)
    # What changes tokens stays on alone: lossy parts, and everything that a request asks for.
    changing = tuple(part for part in (one, other) if part.label != "exact" or not set(part.example) <= ENGINE)
    options, params = settings(changing, checkpoint)
    alone = []
    for prompt in [*PROMPTS, PROMPTS[0]]:
        alone += serve(make_engine(enable_prefix_caching=False, max_num_seqs=1, **options), [prompt], params)
    assert together == alone


@pytest.mark.parametrize("part", [pytest.param(part, id=part.name) for seam in REGISTRIES for part in seam])
def test_every_part_starts_alone(part: Part[Any], checkpoint: str) -> None:
    """Otherwise its pairs would all be refused, and nothing would be tested."""
    options, params = settings((part,), checkpoint)
    engine, refusal = start(options)
    assert engine is not None, refusal
    assert len(serve(engine, [PROMPTS[0]], params)[0]) > 0
