"""`headrace bench kernels`: each compiled kernel against what torch offers for the same job, in one run."""

from __future__ import annotations

import argparse
import importlib

import torch

from headrace.bench.report import headline, machine, table
from headrace.errors import ConfigError

KERNELS = {"cpu": ("draw", "attention"), "cuda": ("attention", "project")}
"""By device, the operations that have a benchmark there: `benchmark.py` on the CPU, `benchmark_gpu.py` on a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("kernel", nargs="?", choices=sorted({*KERNELS["cpu"], *KERNELS["cuda"]}), help="only this one")
    parser.add_argument("--device", choices=tuple(KERNELS), default="cpu", help="where to measure (cpu)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    names = KERNELS[arguments.device]
    if arguments.kernel is not None and arguments.kernel not in names:
        raise ConfigError(
            f"kernel {arguments.kernel!r} has no benchmark on {arguments.device}: there are {', '.join(names)}"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch finds no GPU: leave it out to measure on the CPU")
    print(headline(machine()))
    for name in names:
        if arguments.kernel in (None, name):
            form = "benchmark" if arguments.device == "cpu" else "benchmark_gpu"
            module = importlib.import_module(f"headrace.kernels.{name}.{form}")
            print(f"\n## {name}\n\n{table(module.benchmark())}")
    return 0
