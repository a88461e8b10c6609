"""Time of products with a fixed order of sums on a GPU, with the weights of two models, against the library's.

Each case is captured in a CUDA graph over as many copies of its weight as it takes that they do not stay in the L2
cache, and replayed; times are of one product. `python -m headrace.kernels.project_fixed.benchmark_gpu` prints JSON
lines; with `--sweep` also a list of other cuts for every case, each with whether its bits are those of the chosen cut
(with another number of splits they are not), and the best of few and of many rows by number of splits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.errors import ConfigError
from headrace.kernels.gpu_replay import replay_us
from headrace.kernels.project.benchmark_gpu import MODELS, Case
from headrace.kernels.project_fixed.gpu import multiply_gpu
from headrace.kernels.project_fixed.gpu_shape import FEW_ROWS, Shape, choose_shape

COLD_BYTES = 256 * 2**20
"""Bytes of weights that a replay reads at least: several times an L2 cache."""
ROWS = (1, 16, 64, 256, 2048, 8192)
SWEPT_ROWS = (64, 2048)


class Work(NamedTuple):
    """Tensors of a case; `y` is what is added to."""

    case: Case
    x: Tensor
    y: Tensor
    weights: Sequence[Tensor]

    def fixed(self, weight: Tensor, shape: Shape | None = None) -> Tensor:
        """The product by the kernel of this folder."""
        return multiply_gpu(self.x, weight, None, self.y if self.case.onto else None, shape=shape)

    def library(self, weight: Tensor) -> Tensor:
        """The product by the library."""
        return self.y.addmm_(self.x, weight.t()) if self.case.onto else F.linear(self.x, weight)

    def us(self, call: Callable[[Tensor], object], seconds: float) -> float:
        """Microseconds of a product, all weights in turn."""

        def all_weights() -> None:
            for weight in self.weights:
                call(weight)

        return replay_us(all_weights, seconds) / len(self.weights)


def make_work(case: Case, rows: int, weights: Sequence[Tensor] | None = None) -> Work:
    """Random tensors of a case; `weights`: those of another number of rows."""
    options: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    if weights is None:
        copies = -(-COLD_BYTES // (case.outputs * case.inputs * 2))
        # Products that do not grow, so that sums stay numbers over any count of replays.
        weights = [torch.randn(case.outputs, case.inputs, **options).mul_(1e-3) for _ in range(copies)]
    return Work(case, torch.randn(rows, case.inputs, **options), torch.randn(rows, case.outputs, **options), weights)


def benchmark(
    models: Sequence[str], names: Sequence[str], rows: Sequence[int], seconds: float
) -> Iterator[dict[str, Any]]:
    """One row a product and number of rows: microseconds and rates, against the library's, and the cut."""
    for model, name in itertools.product(models, names):
        weights = None
        for n in rows:
            work = make_work(MODELS[model][name], n, weights)
            weights = work.weights
            case = work.case
            us, library_us = work.us(work.fixed, seconds), work.us(work.library, seconds)
            yield {
                "model": model,
                "product": name,
                "rows": n,
                "us": round(us, 2),
                "library_us": round(library_us, 2),
                "ratio": round(library_us / us, 3),
                "gb_per_s": round(weights[0].nbytes / us / 1e3, 1),
                "tflop_per_s": round(2e-6 * n * case.outputs * case.inputs / us, 1),
                "cut": describe(choose_shape(n, case.outputs, case.inputs, 2)),
            }


def describe(shape: Shape) -> str:
    """A cut in one word."""
    r, n, e, splits, apart, warps, stages, ahead, group = shape
    return f"{r}x{n}x{e}/{splits}{'a' if apart else ''} w{warps} s{stages} a{ahead} g{group}"


def cuts(rows: int) -> Iterator[Shape]:
    """Those worth a try, the likeliest first."""
    if rows > FEW_ROWS:
        for tile, splits in itertools.product(
            ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3)), (1, 2, 4, 8)
        ):
            r, n, e, warps, stages = tile
            yield Shape(r, n, e, splits, False, warps, stages)
        return
    tiles = ((64, 128, 5), (128, 64, 6), (64, 64, 8), (128, 128, 4), (128, 64, 4))
    for splits, (n, e, stages) in itertools.product((1, 2, 3, 4, 6, 8), tiles):
        yield Shape(64, n, e, splits, splits > 1, 4, stages, 256)
    yield Shape(64, 64, 128, 2, True, 4, 5, 0)
    yield Shape(64, 64, 128, 2, True, 4, 5, 1024)


def sweep(models: Sequence[str], names: Sequence[str], rows: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """One row a product and number of rows: its fastest cut for each number of splits, in microseconds."""
    for model, name in itertools.product(models, names):
        weights = None
        for n in rows:
            work = make_work(MODELS[model][name], n, weights)
            weights = work.weights
            best: dict[int, tuple[float, str]] = {}
            problems = []
            by_splits: dict[int, Tensor] = {}
            for cut in cuts(n):
                if cut.splits > 1 and work.case.inputs // cut.splits < 128:
                    continue
                try:
                    work.y.zero_()
                    got = work.fixed(weights[0], cut).clone()
                    if not torch.equal(by_splits.setdefault(cut.splits, got), got):
                        problems.append(f"{describe(cut)} has other bits")
                    us = work.us(partial(work.fixed, shape=cut), seconds)
                except Exception as error:
                    problems.append(f"{describe(cut)}: {type(error).__name__}")
                    continue
                best[cut.splits] = min(best.get(cut.splits, (us, describe(cut))), (us, describe(cut)))
            library_us = work.us(work.library, seconds)
            found = {str(splits): f"{us:.1f} {cut}" for splits, (us, cut) in sorted(best.items())}
            yield {
                "model": model,
                "product": name,
                "rows": n,
                "library_us": round(library_us, 1),
                **found,
                "problems": problems,
            }


def main() -> int:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--products", nargs="+", default=["qkv", "o", "gate_up", "down", "head"])
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each measurement (default: 0.05)")
    parser.add_argument("--sweep", action="store_true", help="time other cuts instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here: run it where there is one")
    began_s = time.monotonic()
    measure, rows = (sweep, SWEPT_ROWS) if arguments.sweep else (benchmark, ROWS)
    for row in measure(arguments.models, arguments.products, arguments.rows or rows, arguments.seconds):
        sys.stdout.write(json.dumps({"at_s": round(time.monotonic() - began_s), **row}) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
