"""How much a step and the cache may hold: measured step times, free memory."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headrace.cache.manager import CacheGroup, cache_bytes
from headrace.config import EngineConfig
from headrace.engine.graphs import MOST, RECORDING_BYTES, WIDEST
from headrace.errors import CapacityError, ConfigError, InvariantError
from headrace.memory import GIB, available_memory_bytes, check_memory
from headrace.memory import size as size_of
from headrace.models.base import CausalLM
from headrace.ranks import ONE, Ranks
from headrace.step import MASK_WORDS, Scan, Turn

log = logging.getLogger("headrace")

KNEE_SHARE = 0.95
"""The knee: the fewest rows that reach this share of the best measured rows per second."""
SLOWEST_STEP_S = 0.25
"""Larger steps are not even measured: streams would stutter."""
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
FIRST_ROWS = 16
"""The narrowest step that is measured for the knee."""
FULL_ROWS = 1024
"""Rows of a step that keep a GPU busy: more rows take longer in proportion."""


def widest_budget(time_step: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """The widest row budget whose step is not too slow, and the measured seconds of the one step that is timed.

    For a GPU, which is busy with FULL_ROWS. More rows bring no more rows per second, but where requests decode beside
    prompts every step reads their caches and the weights: the fewer steps prompts take, the less often.
    """
    rows = min(FULL_ROWS, most)
    seconds = time_step(rows)
    budget = rows
    while budget < most and 2 * budget * seconds / rows <= SLOWEST_STEP_S:
        budget = min(2 * budget, most)
    log.info("row budget %d: %d rows take %.1f ms", budget, rows, 1e3 * seconds)
    return budget, {rows: seconds}


def measure_knee(time_step: Callable[[int], float], most: int, first: int = FIRST_ROWS) -> tuple[int, dict[int, float]]:
    """The row budget at the knee of rows per second, and the measured seconds by number of rows.

    `time_step(rows)` gives the seconds of one step. Doubles the rows, from `first` on, until a step gets too slow.
    """
    measured: dict[int, float] = {}
    rows = min(first, most)
    while True:
        measured[rows] = time_step(rows)
        if rows >= most or 2 * measured[rows] > SLOWEST_STEP_S:
            break
        rows = min(2 * rows, most)
    best = max(n / s for n, s in measured.items())
    knee = min(n for n, s in measured.items() if n / s >= KNEE_SHARE * best)
    log.info(
        "row budget %d: %.1f ms a step, %.0f rows/s (best measured %.0f)",
        knee,
        1e3 * measured[knee],
        knee / measured[knee],
        best,
    )
    return knee, measured


RECORD_LESS = "lower max_num_batched_tokens, or use cuda_graphs=False"
"""What is left to do where there is no memory for recorded steps."""
ROW_BYTES = 4 * (12 + MASK_WORDS)
"""Of the tables of a step, for each of its rows."""
REQUEST_BYTES = 4 * 100
"""Of the tables of requests, for each of them, beside its tokens and pages."""


def check_tables(config: EngineConfig, max_len: int, device: torch.device) -> None:
    """Raise CapacityError if the tables of requests and rows alone would not fit; both are made on the host too."""
    a_request = REQUEST_BYTES + 4 * (max_len + -(-max_len // config.page_size))
    rows = min(config.max_num_batched_tokens or MAX_ROWS[device.type], config.max_num_seqs * max_len)
    needed = 2 * config.max_num_seqs * a_request + rows * ROW_BYTES
    check_memory(
        f"max_num_seqs = {config.max_num_seqs} requests of {max_len} tokens and {rows} rows a step need tables of",
        needed,
        device,
        "lower max_num_seqs, max_model_len or max_num_batched_tokens",
    )


class _Nowhere:
    """What layers see of rows that are evaluated for their memory: there is no cache, and attention brings zeros."""

    soft_SE = None

    def __init__(self, n_rows: int, turns: bool, device: torch.device) -> None:
        self.turns = turns
        self.pos_AR = torch.zeros(1, n_rows, dtype=torch.int32, device=device)

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
        turn: Turn | None = None,
    ) -> Tensor:
        """Zeros [R, H, Dv]."""
        return q_RHD.new_zeros(*q_RHD.shape[:2], v_RKD.shape[2])

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Never called: the forward of a model with fixed states is not recorded."""
        raise InvariantError(f"layer {layer} has a fixed state, and its memory was asked for")


@torch.inference_mode()
def forward_bytes(model: CausalLM, n_rows: int, turns: bool) -> int:
    """What the tensors of a forward over so many rows take at most, on a GPU, measured by running one without a cache.

    `turns`: see StepContext.
    """
    device = next(model.parameters()).device
    tok_R = torch.zeros(n_rows, dtype=torch.int32, device=device)
    context = _Nowhere(n_rows, turns, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(tok_R, context)
    most = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what a step takes as it is has its own share of the memory that is left free
    return most


def pieces_bytes(model: CausalLM, most_rows: int, turns: bool) -> tuple[int, int]:
    """What a model's forward recorded in pieces takes: its tensors, of which there is room for one forward over the
    widest step, and all in all."""
    # A tenth for what lies between blocks of different sizes.
    arena = int(1.1 * forward_bytes(model, min(most_rows, WIDEST), turns))
    # Those in pieces, and half as much for whole steps.
    return arena, arena + 3 * MOST * RECORDING_BYTES // 2


def choose_pages(
    config: EngineConfig,
    groups: Sequence[CacheGroup],
    device: torch.device,
    max_len: int,
    state_bytes: int = 0,
    ranks: Ranks = ONE,
    kept_bytes: int = 0,
) -> int:
    """Pages of the cache, the trash page included, beside `state_bytes` of fixed states: as many as all ranks can hold,
    and on a GPU leave `kept_bytes` for what is recorded.

    Without groups pages cost nothing, and there are as many as could be of use. Raises CapacityError if what was asked
    for, or the states, or not even one page fit, ConfigError for a number of pages where no layer keeps any.
    """
    if config.num_pages is not None and not groups:
        raise ConfigError(
            f"num_pages is {config.num_pages}, but no layer of the model keeps pages: leave it out; "
            "max_num_seqs bounds the fixed states"
        )
    useful = 1 + config.max_num_seqs * -(-max_len // config.page_size)
    if config.num_pages is not None:
        asked = cache_bytes(groups, config.num_pages, config.page_size, config.max_num_seqs)
        way_out = f"lower num_pages or page_size, which is {config.page_size}"
        check_memory(f"num_pages is {config.num_pages}, which takes", asked + state_bytes, device, way_out)
        if kept_bytes:
            what = f"num_pages is {config.num_pages}; with {size_of(kept_bytes)} for recorded steps the engine takes"
            check_memory(what, asked + state_bytes + kept_bytes, device, f"{way_out}, {RECORD_LESS}")
        return config.num_pages
    # What one rank takes must not be missing when the next one looks.
    free_bytes = ranks.least(available_memory_bytes(device))
    if device.type == "cpu":
        free_bytes //= ranks.size  # they share one machine's memory
    if config.kv_cache_gib is not None:
        budget = int(config.kv_cache_gib * GIB)
        if budget > free_bytes:
            raise CapacityError(
                f"kv_cache_gib is {config.kv_cache_gib}; {size_of(free_bytes)} are available on {device}: lower it"
            )
        if budget + kept_bytes > free_bytes:
            raise CapacityError(
                f"kv_cache_gib is {config.kv_cache_gib}, and recorded steps take {size_of(kept_bytes)} beside it; "
                f"{size_of(free_bytes)} are available on {device}: lower it, {RECORD_LESS}"
            )
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = int(config.gpu_memory_utilization * total) - (total - free_bytes) - GIB - kept_bytes
    else:
        budget = free_bytes // 5
    if state_bytes > max(budget, 0):
        raise CapacityError(
            f"the fixed states of max_num_seqs = {config.max_num_seqs} requests take {size_of(state_bytes)}; "
            f"{size_of(max(budget, 0))} are there for the cache: lower max_num_seqs, or raise "
            "gpu_memory_utilization or kv_cache_gib"
        )
    budget -= state_bytes
    if not groups:
        return useful

    def size(pages: int) -> int:
        return cache_bytes(groups, pages, config.page_size, config.max_num_seqs)

    # The most pages that fit; of classes that are not kept for all tokens there are fewer.
    pages = bisect.bisect_right(range(useful + 1), budget, key=size) - 1
    if pages < 2:
        raise CapacityError(
            f"{size_of(max(budget, 0))} for the cache hold no page of {size_of(size(1))} beside the one that "
            "holds nothing: free memory, or raise gpu_memory_utilization or kv_cache_gib"
        )
    return ranks.least(pages)


def fit_length(config: EngineConfig, model_len: int, n_pages: int) -> int:
    """The longest sequence served. Raises ConfigError when the one asked for does not fit the model or the cache."""
    capacity = (n_pages - 1) * config.page_size
    asked = config.max_model_len
    if asked is None:
        if capacity < model_len:
            log.warning("the cache holds %d tokens; the model %d: max_model_len is lowered", capacity, model_len)
        return min(model_len, capacity)
    if asked > model_len:
        raise ConfigError(f"max_model_len is {asked}; the model holds {model_len}: lower it")
    if asked > capacity:
        raise ConfigError(
            f"max_model_len is {asked}; the cache of {n_pages} pages holds {capacity} tokens: "
            "lower it, or raise kv_cache_gib or num_pages"
        )
    return asked
