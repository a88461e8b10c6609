"""`headrace bench`: one subcommand a benchmark."""

from __future__ import annotations

import argparse

from headrace.bench import adapters, cpu, gpu, kernels, parity, quantization, seams

BENCHES = {
    "adapters": adapters,
    "cpu": cpu,
    "gpu": gpu,
    "kernels": kernels,
    "parity": parity,
    "quantization": quantization,
    "seams": seams,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of all benchmarks."""
    benches = parser.add_subparsers(dest="bench", required=True, metavar="benchmark")
    for name, module in BENCHES.items():
        text = (module.__doc__ or "").strip().splitlines()[0].split(": ", 1)[1]
        module.add_arguments(benches.add_parser(name, help=text, description=module.__doc__))


def run(arguments: argparse.Namespace) -> int:
    """Run the one that was asked for. Returns the exit status."""
    return BENCHES[arguments.bench].run(arguments)
