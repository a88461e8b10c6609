"""Time of products of few rows on a GPU, with the weights of two models, against the library's products.

Each case is captured in a CUDA graph over as many copies of its weight as it takes that they do not stay in the L2
cache, and replayed; times are of one product, norm, gate and sum included. `python -m
headrace.kernels.project.benchmark_gpu` also measures whole layers in a chain (`--chain`) and looks for better cuts
(`--sweep`), and prints JSON lines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.kernels.gpu_replay import replay_us
from headrace.kernels.gpu_sizes import apart, processors, shared_bytes
from headrace.kernels.project import gpu
from headrace.kernels.project.gpu_shape import Shape, block_rows
from headrace.kernels.rms_norm.gpu import rms_norm_gpu
from headrace.kernels.silu_mul.gpu import silu_mul_gpu

COLD_BYTES = 256 * 2**20
"""Bytes of weights that a replay reads at least: several times an L2 cache."""
ROWS = (1, 2, 4, 8, 16)
LAYERS = 28
EPS = 1e-5


class Case(NamedTuple):
    """A product of a model."""

    outputs: int
    inputs: int
    normed: bool = False
    gated: bool = False
    onto: bool = False


MODELS = {
    "8b": {
        "qkv": Case(6144, 4096, normed=True),
        "o": Case(4096, 4096, onto=True),
        "gate_up": Case(28672, 4096, normed=True, gated=True),
        "down": Case(4096, 14336, onto=True),
        "head": Case(128256, 4096),
    },
    "0.6b": {
        "qkv": Case(4096, 1024, normed=True),
        "o": Case(1024, 2048, onto=True),
        "gate_up": Case(6144, 1024, normed=True, gated=True),
        "down": Case(1024, 3072, onto=True),
        "head": Case(151936, 1024),
    },
}


class Work(NamedTuple):
    """Tensors of a case; `y` is what onto adds to."""

    case: Case
    x: Tensor
    y: Tensor
    norm: tuple[Tensor, float]
    weights: Sequence[Tensor]

    def fused(self, weight: Tensor, shape: Shape | None = None) -> Tensor:
        """The product by the kernels of this folder."""
        if self.case.onto:
            gpu.project_onto_gpu(self.y, self.x, weight, shape=shape)
            return self.y
        norm = self.norm if self.case.normed else None
        return gpu.project_gpu(self.x, weight, norm=norm, gated=self.case.gated, shape=shape)

    def composed(self, weight: Tensor) -> Tensor:
        """The product by the library, with kernels of their own for norm and gate."""
        if self.case.onto:
            return self.y.addmm_(self.x, weight.t())
        x = rms_norm_gpu(self.x, *self.norm) if self.case.normed else self.x
        y = F.linear(x, weight)
        return silu_mul_gpu(y) if self.case.gated else y

    def us(self, call: Callable[[Tensor], object], seconds: float) -> float:
        """Microseconds of a product, all weights in turn."""

        def all_weights() -> None:
            for weight in self.weights:
                call(weight)

        return replay_us(all_weights, seconds) / len(self.weights)

    def gb_per_s(self, us: float) -> float:
        """The rate at which weights are read."""
        return round(self.weights[0].nbytes / us / 1e3, 1)


def make_work(case: Case, rows: int, device: torch.device, weights: Sequence[Tensor] | None = None) -> Work:
    """Random tensors of a case; `weights`: those of another number of rows."""
    options: Any = {"dtype": torch.bfloat16, "device": device}
    if weights is None:
        copies = -(-COLD_BYTES // (case.outputs * case.inputs * 2))
        # Products that do not grow, so that sums stay numbers over any count of replays.
        weights = [torch.randn(case.outputs, case.inputs, **options).mul_(1e-3) for _ in range(copies)]
    x, y = torch.randn(rows, case.inputs, **options), torch.randn(rows, case.outputs, **options)
    return Work(case, x, y, (torch.randn(case.inputs, **options), EPS), weights)


def describe(shape: Shape) -> str:
    """A cut in one word."""
    form = "row" if shape.is_row else "tile"
    return f"{form} {shape.block_n}x{shape.block_e}/{shape.splits} w{shape.n_warps} s{shape.n_stages} a{shape.ahead_e}"


def benchmark(
    models: Sequence[str] = tuple(MODELS),
    names: Sequence[str] | None = None,
    rows: Sequence[int] = ROWS,
    seconds: float = 0.1,
) -> list[dict[str, Any]]:
    """One row a product and number of rows: microseconds and rate, against the library's, and the cut.

    `seconds` is the time spent on each measurement.
    """
    result = []
    for model, name in itertools.product(models, names or MODELS[models[0]]):
        weights = None
        for n in rows:
            work = make_work(MODELS[model][name], n, torch.device("cuda"), weights)
            weights = work.weights
            us = work.us(work.fused, seconds)
            with apart():
                apart_us = work.us(work.fused, seconds)
            composed_us = work.us(work.composed, seconds)
            row = {
                "model": model,
                "product": name,
                "rows": n,
                "us": round(us, 2),
                "gb_per_s": work.gb_per_s(us),
                "no_overlap_us": round(apart_us, 2),
                "composed_us": round(composed_us, 2),
                "ratio": round(composed_us / us, 3),
                "cut": describe(gpu.shape_of(work.x, weights[0], gated=work.case.gated)),
            }
            result.append(row)
    return result


def benchmark_chain(
    models: Sequence[str] = tuple(MODELS), rows: Sequence[int] = ROWS, seconds: float = 0.2, layers: int = LAYERS
) -> list[dict[str, Any]]:
    """Microseconds a layer of its four products in a row, each waiting for the one before it, without attention."""
    result = []
    for model in models:
        cases = {name: case for name, case in MODELS[model].items() if name != "head"}
        stacks = [
            [torch.randn(c.outputs, c.inputs, dtype=torch.bfloat16, device="cuda").mul_(1e-3) for c in cases.values()]
            for _ in range(layers)
        ]
        layer_bytes = sum(weight.nbytes for weight in stacks[0])
        for n in rows:
            x = torch.randn(n, cases["qkv"].inputs, dtype=torch.bfloat16, device="cuda")
            norm = torch.ones_like(x[0])

            def fused(x: Tensor = x, norm: Tensor = norm, stacks: Any = stacks) -> None:
                for qkv, o, gate_up, down in stacks:
                    mixed = gpu.project_gpu(x, qkv, norm=(norm, EPS))
                    gpu.project_onto_gpu(x, mixed[:, : o.shape[1]], o)
                    gpu.project_onto_gpu(x, gpu.project_gpu(x, gate_up, norm=(norm, EPS), gated=True), down)

            def composed(x: Tensor = x, norm: Tensor = norm, stacks: Any = stacks) -> None:
                for qkv, o, gate_up, down in stacks:
                    mixed = F.linear(rms_norm_gpu(x, norm, EPS), qkv)
                    x.addmm_(mixed[:, : o.shape[1]], o.t())
                    x.addmm_(silu_mul_gpu(F.linear(rms_norm_gpu(x, norm, EPS), gate_up)), down.t())

            us = replay_us(fused, seconds) / layers
            with apart():
                apart_us = replay_us(fused, seconds) / layers
            row = {
                "model": model,
                "rows": n,
                "us_a_layer": round(us, 2),
                "gb_per_s": round(layer_bytes / us / 1e3, 1),
                "no_overlap_us": round(apart_us, 2),
                "composed_us": round(replay_us(composed, seconds) / layers, 2),
            }
            result.append(row)
    return result


def neighbours(shape: Shape, work: Work) -> Iterator[Shape]:
    """Cuts that differ from one in one number, or in two that keep its tile's size, and that fit the chip."""
    double, half = (lambda n: n * 2), (lambda n: n // 2)
    changes: list[dict[str, Callable[[int], int]]] = [
        {field: change} for field in ("block_n", "block_e", "splits", "n_warps", "ahead_e") for change in (half, double)
    ]
    changes += [
        {"block_n": half, "block_e": double},
        {"block_n": double, "block_e": half},
        {"block_n": half, "splits": half},
        {"block_n": double, "splits": double},
    ]
    if not shape.is_row:
        changes += [{"n_stages": lambda n: n + 1}, {"n_stages": lambda n: n - 1}, {"n_stages": lambda n: n + 3}]
    changes.append({"ahead_e": lambda n: 0 if n else 256})
    for change in changes:
        numbers: dict[str, Any] = {field: step(getattr(shape, field)) for field, step in change.items()}
        new = shape._replace(**numbers)
        if new != shape and fits(new, work):
            yield new


def fits(shape: Shape, work: Work) -> bool:
    """Whether a cut can run, and is not absurd."""
    device, smallest = work.x.device, 1 if shape.is_row else 16
    results = work.case.outputs // (2 if work.case.gated else 1)
    tile = shape.block_n * (2 if work.case.gated else 1) * shape.block_e
    programs = -(-results // shape.block_n) * shape.splits
    if shape.is_row:
        can_run = 8 <= tile // (32 * shape.n_warps) <= 128
    else:
        stage = (tile + block_rows(work.x.shape[0]) * shape.block_e) * 2
        can_run = shape.n_stages >= 2 and shape.n_stages * stage <= shared_bytes(device) and tile <= 2**15
    return (
        can_run
        and min(shape.block_n, shape.block_e // 16) >= smallest
        and shape.block_n <= 256
        and 1 <= shape.splits <= 16
        and shape.splits * shape.block_e <= max(work.case.inputs, shape.block_e)
        and 1 <= shape.n_warps <= 16
        and 0 <= shape.ahead_e <= 4096
        and processors(device) // 2 <= programs <= processors(device) * 256
    )


def sweep(work: Work, limit_s: float, seconds: float = 0.03) -> dict[str, Any]:
    """Look for the fastest cut from the chosen one on, always towards the best neighbour, for at most `limit_s`.

    With one row the other form is tried too. Every cut is compared with the library's result before it is timed.
    """
    stop_s = time.monotonic() + limit_s
    chosen = gpu.shape_of(work.x, work.weights[0], gated=work.case.gated)
    starts = [chosen]
    if chosen.is_row:
        starts.append(Shape(False, 16, 256, 1, 4, 4, 512))
    times: dict[Shape, float] = {}
    problems: list[str] = []

    def measure(shape: Shape) -> None:
        if shape in times or time.monotonic() > stop_s:
            return
        times[shape] = float("inf")
        try:
            work.y.zero_()
            got = work.fused(work.weights[0], shape).clone()
            work.y.zero_()
            expected = work.composed(work.weights[0]).clone()
            error = float((got.double() - expected.double()).norm() / expected.double().norm())
            if not error < 2e-2:
                problems.append(f"{describe(shape)}: wrong by {error:.2g}")
                return
            times[shape] = work.us(lambda weight: work.fused(weight, shape), seconds)
        except Exception as refused:  # the compiler and the launcher each have errors of their own
            problems.append(f"{describe(shape)}: {type(refused).__name__} {str(refused)[:80]}")

    for start in starts:
        best = start
        measure(best)
        while time.monotonic() < stop_s:
            for shape in neighbours(best, work):
                measure(shape)
            closer = min((s for s in times if s.is_row == start.is_row), key=lambda s: times[s])
            # Less than one part in 200 is noise.
            if times[closer] > times[best] * 0.995:
                break
            best = closer
    ordered = sorted((s for s in times if times[s] < float("inf")), key=lambda s: times[s])
    return {
        "chosen": describe(chosen),
        "chosen_us": round(times[chosen], 2) if times[chosen] < float("inf") else None,
        "tried": len(times),
        "done": time.monotonic() < stop_s,
        "best": [
            {"us": round(times[s], 2), "gb_per_s": work.gb_per_s(times[s]), "cut": describe(s), **s._asdict()}
            for s in ordered[:5]
        ],
        "problems": problems[:5],
    }


def main() -> None:
    """Measure what the options name, one JSON line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--products", nargs="+", choices=tuple(MODELS["8b"]), default=list(MODELS["8b"]))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--chain", action="store_true", help="whole layers instead of single products")
    parser.add_argument("--sweep", action="store_true", help="look for better cuts")
    parser.add_argument("--limit-s", type=float, default=240.0, help="of the whole sweep, shared evenly (240)")
    options = parser.parse_args()

    def show(row: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    if options.chain:
        for row in benchmark_chain(options.models, options.rows):
            show(row)
    elif not options.sweep:
        for row in benchmark(options.models, options.products, options.rows):
            show(row)
    else:
        stop_s = time.monotonic() + options.limit_s
        todo = len(options.models) * len(options.products) * len(options.rows)
        for model, name in itertools.product(options.models, options.products):
            weights = None
            for n in options.rows:
                work = make_work(MODELS[model][name], n, torch.device("cuda"), weights)
                weights = work.weights
                # What a product leaves of its share goes to those behind it.
                found = sweep(work, (stop_s - time.monotonic()) / todo)
                todo -= 1
                show({"model": model, "product": name, "rows": n, **found})


if __name__ == "__main__":
    main()
