"""Engines on one rank and on two, over the same checkpoint, and the same work for both."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.front import TextFront
from headrace.params import SamplingParams
from headrace.progress import Stages
from headrace.ranks import ONE
from headrace.request import Request
from headrace.start import Settings, load_tokenizer, start
from headrace.team import Lead

VOCAB = 131
TINY: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "dtype": "float64",
    "page_size": 4,
    "num_pages": 34,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 13,
    "max_model_len": 96,
    "preemption": "recompute",
    "check_invariants": True,
}
"""Little of everything, so that prompts are cut and requests preempted."""
PROMPTS = [[(11 * i * (j + 1) + 5 * j) % VOCAB for i in range(17 + 3 * j)] for j in range(5)]
PROMPTS[3][:16] = PROMPTS[0][:16]
REPEATING = [7, 8, 9, 10] * 6


def alone(directory: Path, **options: Any) -> TextFront:
    """An engine on one rank."""
    config = EngineConfig(model=str(directory), **(TINY | options))
    settings = Settings(config, directory, "cpu")
    stages = Stages()
    return start(settings, load_tokenizer(settings, stages), ONE, stages)


@contextlib.contextmanager
def both(
    lead: Lead, directory: Path, change: Callable[[Settings], Settings] = lambda settings: settings, **options: Any
) -> Iterator[TextFront]:
    """An engine on two ranks. `change`: what the other rank is told instead."""
    config = EngineConfig(model=str(directory), tensor_parallel_size=2, **(TINY | options))
    settings = Settings(config, directory, "cpu")
    lead.begin(change(settings))
    stages = Stages()
    front = start(settings, load_tokenizer(settings, stages), lead, stages)
    try:
        yield front
    finally:  # a failed test must not leave the other rank waiting
        lead.over()


def work(engine: Engine, wants: dict[str, Any] | None = None, drop: int = 6) -> dict[str, list[Request]]:
    """Requests of all kinds, one of which is aborted after some steps; the others to their end."""
    wants = wants or {}
    found: dict[str, list[Request]] = {}
    for i, prompt in enumerate([*PROMPTS, REPEATING, PROMPTS[1]]):
        params: dict[str, Any] = {"temperature": 0.8 * (i % 2), "max_tokens": 16, "seed": i, "ignore_eos": True}
        if i == 1:
            params |= {"n": 3}
        if i == 2:
            params |= {"logprobs": 3, "prompt_logprobs": 2}
        if i == 4:
            params |= {"seed": None, "top_p": 0.9, "repetition_penalty": 1.2}
        found[str(i)] = engine.add(prompt, SamplingParams(**(params | wants)), request_id=str(i), priority=i % 2)
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        if steps == drop:
            engine.abort("5")
        if steps == 2 * drop:  # finds its prefix
            again = SamplingParams(temperature=0.8, max_tokens=16, seed=9, ignore_eos=True)
            found["late"] = engine.add([*PROMPTS[0], 1, 2], dataclasses.replace(again, **wants), request_id="late")
    engine.check_idle()
    return found


def tokens(found: dict[str, list[Request]]) -> dict[str, list[list[int]]]:
    """Outputs by request, but for the aborted one."""
    return {name: [r.output_ids for r in samples] for name, samples in found.items() if name != "5"}


def logprobs(found: dict[str, list[Request]]) -> list[float]:
    """Every log-probability that was asked for or reported."""
    values = [value for samples in found.values() for r in samples for value in r.token_logprobs]
    for position in [*found["2"][0].top_logprobs, *found["2"][0].prompt_logprobs]:
        values += [entry.logprob for entry in (position or {}).values()]
    return values
