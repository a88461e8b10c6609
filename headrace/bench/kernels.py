"""`headrace bench kernels`: each compiled CPU kernel against what torch offers for the same job, in one run."""

from __future__ import annotations

import argparse

from headrace.bench.report import headline, machine, table
from headrace.kernels.attention.benchmark import benchmark as benchmark_attention
from headrace.kernels.draw.benchmark import benchmark as benchmark_draw


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("kernel", nargs="?", choices=["draw", "attention"], help="only this one")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    print(headline(machine()))
    for name, benchmark in (("draw", benchmark_draw), ("attention", benchmark_attention)):
        if arguments.kernel in (None, name):
            print(f"\n## {name}\n\n{table(benchmark())}")
    return 0
