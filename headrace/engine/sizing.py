"""How much a step and the cache may hold: measured step times, free memory."""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import Callable, Sequence

import torch

from headrace.cache.manager import CacheGroup, cache_bytes
from headrace.config import EngineConfig
from headrace.errors import CapacityError, ConfigError
from headrace.ranks import ONE, Ranks

log = logging.getLogger("headrace")

GIB = 2**30
KNEE_SHARE = 0.95
"""The knee: the fewest rows that reach this share of the best measured rows per second."""
SLOWEST_STEP_S = 0.25
"""Larger steps are not even measured: streams would stutter."""
MAX_ROWS = {"cpu": 2048, "cuda": 8192}


def measure_knee(time_step: Callable[[int], float], most: int) -> tuple[int, dict[int, float]]:
    """The row budget at the knee of rows per second, and the measured seconds by number of rows.

    `time_step(rows)` gives the seconds of one step. Doubles the rows until a step gets too slow.
    """
    measured: dict[int, float] = {}
    rows = min(16, most)
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


def available_memory_bytes(device: torch.device) -> int:
    """Memory that can be taken now: the GPU's free memory, or what the operating system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ask for the total instead
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def choose_pages(
    config: EngineConfig,
    groups: Sequence[CacheGroup],
    device: torch.device,
    max_len: int,
    state_bytes: int = 0,
    ranks: Ranks = ONE,
) -> int:
    """Pages of the cache, the trash page included, beside `state_bytes` of fixed states: as many as all ranks can hold.

    Without groups pages cost nothing, and there are as many as could be of use. Raises CapacityError if the states or
    not even one page fit, ConfigError for a number of pages where no layer keeps any.
    """
    if config.num_pages is not None and not groups:
        raise ConfigError(
            f"num_pages is {config.num_pages}, but no layer of the model keeps pages: leave it out; "
            "max_num_seqs bounds the fixed states"
        )
    useful = 1 + config.max_num_seqs * -(-max_len // config.page_size)
    if config.num_pages is not None:
        return config.num_pages
    # What one rank takes must not be missing when the next one looks.
    free_bytes = ranks.least(available_memory_bytes(device))
    if device.type == "cpu":
        free_bytes //= ranks.size  # they share one machine's memory
    if config.kv_cache_gib is not None:
        budget = int(config.kv_cache_gib * GIB)
        if budget > free_bytes:
            raise CapacityError(
                f"kv_cache_gib is {config.kv_cache_gib}; {free_bytes / GIB:.2f} GiB are available on {device}: lower it"
            )
    elif device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        budget = int(config.gpu_memory_utilization * total) - (total - free_bytes) - GIB
    else:
        budget = free_bytes // 5
    if state_bytes > max(budget, 0):
        raise CapacityError(
            f"the fixed states of max_num_seqs = {config.max_num_seqs} requests take {state_bytes / 2**20:.1f} MiB; "
            f"{max(budget, 0) / 2**20:.1f} MiB are there for the cache: lower max_num_seqs, or raise "
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
            f"{max(budget, 0) / 2**20:.1f} MiB for the cache hold no page of {size(1) / 2**20:.2f} MiB: "
            "free memory, or raise gpu_memory_utilization or kv_cache_gib"
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
