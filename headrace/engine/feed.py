"""Run token sequences through a model for the sake of what its layers see."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.models.base import CausalLM
from headrace.params import SamplingParams

ROWS = 512
PAGE = 16


def feed(model: CausalLM, sequences: Sequence[Sequence[int]]) -> None:
    """Evaluate every sequence once, each for itself. Sequences are cut to what the model holds."""
    longest = model.max_model_len - 1
    pages = 2 * (-(-model.max_model_len // PAGE) + 1)
    config = EngineConfig(
        num_pages=pages, page_size=PAGE, max_num_seqs=1, max_num_batched_tokens=ROWS, enable_prefix_caching=False
    )
    engine = Engine(config, model)
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    for number, sequence in enumerate(sequences):
        engine.add(list(sequence[:longest]), params, request_id=str(number))
        while engine.has_work:
            engine.step()
