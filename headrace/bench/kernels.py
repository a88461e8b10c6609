"""`headrace bench kernels`: each compiled CPU kernel against what torch offers for the same job, in one run."""

from __future__ import annotations

import argparse
import importlib

from headrace.bench.report import headline, machine, table

KERNELS = ("draw", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("kernel", nargs="?", choices=KERNELS, help="only this one")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    print(headline(machine()))
    for name in KERNELS:
        if arguments.kernel in (None, name):
            module = importlib.import_module(f"headrace.kernels.{name}.benchmark")
            print(f"\n## {name}\n\n{table(module.benchmark())}")
    return 0
