"""Time of parity attention on a GPU by the size of its tiles, against attention as it is otherwise.

`python -m headrace.kernels.attention.benchmark_parity` prints JSON lines: for decoding and prompts of an 8B model
microseconds a layer without parity (`off_us`, squares left out), and with it for each number of lines of a tile, splits
and bytes of a block, from which `gpu_shape.PARITY_LINES`, `PARITY_SPLITS` and `PARITY_STREAM` are chosen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.kernels.attention import gpu, gpu_shape
from headrace.kernels.attention.benchmark_gpu import MODEL_8B, Geometry, Step, make_step
from headrace.kernels.gpu_replay import replay_us

WORKS = ((64, 1, 1024), (1, 1, 1024), (8, 1, 8192), (1, 2048, 0), (1, 2048, 6144))
"""Requests, rows of each, slots committed before."""
MODEL_0_6B = Geometry(heads=16, kv_heads=8, size=128)
LAYERS = 8
"""Layers with pools of their own, so that keys do not stay in the L2 cache."""


def times(seconds: float, geometry: Geometry) -> Iterator[dict[str, Any]]:
    """One row a work."""
    for n_reqs, n_rows, committed in WORKS:
        step = make_step(n_reqs, n_rows, committed, LAYERS, torch.device("cuda"), geometry)
        found: dict[str, Any] = {"requests": n_reqs, "rows": n_rows, "slots": committed + n_rows}
        found["off_us"] = _us(partial(_layers, step, parity=False), seconds)
        chosen = gpu_shape.PARITY_LINES, gpu_shape.PARITY_SPLITS, gpu_shape.PARITY_STREAM
        try:
            for lines, splits, limits in itertools.product(
                (16, 64), (1, 2, 4, 8), (gpu_shape.STREAMS, gpu_shape.WIDE_STREAMS)
            ):
                gpu_shape.PARITY_LINES, gpu_shape.PARITY_SPLITS, gpu_shape.PARITY_STREAM = lines, splits, limits
                name = f"{lines} lines, {splits} splits, {limits.block_bytes >> 10} KiB"
                found[name] = _us(partial(_layers, step, parity=True), seconds)
        finally:
            gpu_shape.PARITY_LINES, gpu_shape.PARITY_SPLITS, gpu_shape.PARITY_STREAM = chosen
        yield found


def _layers(step: Step, parity: bool) -> Tensor:
    """All layers once."""
    page_size = step.pools[0][0].shape[2]
    plan = gpu.GpuPlan(step.rows, step.page_table_BP, step.kv_len_B, page_size, parity=parity)
    return [step.attend(layer, plan) for layer in range(LAYERS)][-1]


def _us(call: Callable[[], object], seconds: float) -> float:
    """Microseconds a layer, captured in a graph and replayed for about `seconds`."""
    return round(replay_us(call, seconds) / LAYERS, 1)


def main() -> int:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.05, help="for each measurement (default: 0.05)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here: run it where there is one")
    for model, geometry in (("8b", MODEL_8B), ("0.6b", MODEL_0_6B)):
        for row in times(arguments.seconds, geometry):
            sys.stdout.write(json.dumps({"model": model, **row}) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
