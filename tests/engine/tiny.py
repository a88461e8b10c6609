"""A tiny random model in float64, and engines over it. In float64 a tie between schedules is a bug, not rounding."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.graphs import BUCKETS, Pool, StepGraphs
from headrace.engine.pieces import StepPieces
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.params import SamplingParams
from headrace.ranks import ONE, Ranks
from headrace.request import Request
from headrace.step import RowTable

DEVICE = os.environ.get("HEADRACE_TEST_DEVICE", "cpu")
"""Where the suites run: `make test-gpu` runs them on a GPU too."""

FEWER = DEVICE != "cpu" or "HEADRACE_TEST_FEWER" in os.environ
"""Whether property tests try fewer examples."""
VOCAB = 61
EOS = 3
MODEL_LEN = 96

SPELLINGS = [
    *[b""] * 4,
    *(letter.encode() for letter in 'abcdefghijklmnopqrstuvwxyz0123456789{}[]":,-. \n'),
    *(b"ab", b"cd", b"tr", b"ue", b"null", b"false", b'": ', b"12", b"\xc3", b"\xa9"),
]
"""What the tokens spell, where a constraint asks; the first four are special."""
assert len(SPELLINGS) == VOCAB


def examples(count: int) -> int:
    """Examples of a property test; on a GPU, where steps of tiny models take longer, 25, in which every event still has
    to happen: with HEADRACE_TEST_FEWER set, a CPU shows that it does."""
    return min(count, 25) if FEWER else count


def most_examples(count: int) -> int:
    """The same where some events are rare."""
    return min(count, 60) if FEWER else count


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": MODEL_LEN,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}


@functools.cache
def tiny_model(dtype: str = "float64", seed: int = 0, device: str = DEVICE) -> CausalLM:
    """Weights large enough that the next token depends on the whole context."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        model = load_model(directory, device="cpu", dtype=dtype, load_format="random", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale)
    return model.to(device)


def make_engine(
    *,
    model: CausalLM | None = None,
    eos_ids: Sequence[int] = (EOS,),
    clock: Callable[[], float] = time.perf_counter,
    ranks: Ranks = ONE,
    **options: Any,
) -> Engine:
    """An engine over the tiny model that audits itself after every step, on a GPU too, and so plans none ahead."""
    settings: dict[str, Any] = {"num_pages": 512, "max_num_batched_tokens": 4096, "max_num_seqs": 8, "page_size": 4}
    settings["async_scheduling"] = False
    settings["cuda_graphs"] = False  # to record steps takes longer than to run so few: `pad` asks for it
    settings["preemption"] = "recompute"  # the default goes by measured seconds, and tests should not
    config = EngineConfig(**{**settings, "check_invariants": True, "device": DEVICE, **options})
    return Engine(config, model or tiny_model(), eos_ids=eos_ids, clock=clock, ranks=ranks, spellings=lambda: SPELLINGS)


def run_all(engine: Engine, most_steps: int = 100_000) -> None:
    """Step until nothing is left to do."""
    for _ in range(most_steps):
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


@functools.cache
def alone(prompt: tuple[int, ...], params_key: str, dtype: str = "float64") -> tuple[tuple[int, ...], str | None]:
    """Tokens and finish reason of a request that has an engine for itself, on the CPU: in float64 a GPU's are the
    same, and steps so small take a GPU longer."""
    device = DEVICE if dtype != "float64" else "cpu"
    engine = make_engine(model=tiny_model(dtype, device=device), enable_prefix_caching=False, device=device)
    (request,) = engine.add(prompt, SamplingParams.from_dict(json.loads(params_key)), request_id="alone")
    run_all(engine)
    return tuple(request.output_ids), request.finish.reason


def alone_of(request: Request) -> tuple[tuple[int, ...], str | None]:
    """The same for a request of another engine, by plain decoding."""
    params = {**request.params.to_dict(), "decoder": None}
    return alone(tuple(request.tokens[: request.prompt_len]), json.dumps(params))


def cut(engine: Engine) -> None:
    """Let an engine run the steps that are not recorded whole in the pieces that a GPU records, from the first of a
    size on, and on a GPU record them."""
    runner = engine.runner
    if runner.pieces is None:
        pool = Pool(engine.device, 0) if engine.device.type == "cuda" else None
        runner.pieces = StepPieces(engine.device, len(runner.rows.tok), len(runner.target.groups), pool)
    runner.pieces.recent.meetings = 1


def pad(engine: Engine) -> None:
    """Let an engine pad its steps to the shapes that a GPU records, and on a GPU record them; the others as `cut`."""
    runner = engine.runner
    if runner.graphs is None:
        pool = Pool(engine.device, 0) if engine.device.type == "cuda" else None
        runner.graphs = StepGraphs(engine.device, len(runner.rows.tok), pool)
        runner.graphs.recent.meetings = 1
        runner.rows = RowTable.allocate(
            max(len(runner.rows.tok), BUCKETS[-1]), BUCKETS[-1] + 1, engine.table.ghost, 1, engine.device
        )
    cut(engine)
