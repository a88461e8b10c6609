"""Calibration: run token sequences through a model whose linear maps are watched."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.quantization.watch import watched_stores

ROWS = 512
PAGE = 16


def feed(model: CausalLM, sequences: Sequence[Sequence[int]]) -> None:
    """Evaluate every sequence once, each for itself, so that watched stores hold the moments of these rows alone.

    Tokens are scored, for else the last layer would see one row a sequence. Sequences are cut to what the model holds.
    """
    longest = model.max_model_len - 1
    pages = 2 * (-(-model.max_model_len // PAGE) + 1)
    config = EngineConfig(
        num_pages=pages, page_size=PAGE, max_num_seqs=1, max_num_batched_tokens=ROWS, enable_prefix_caching=False
    )
    engine = Engine(config, model)
    for store in watched_stores(model):
        store.forget()  # the engine has tried out some steps
    params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, detokenize=False)
    for number, sequence in enumerate(sequences):
        engine.add(list(sequence[:longest]), params, request_id=str(number))
        while engine.has_work:
            engine.step()
