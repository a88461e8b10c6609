"""The command line: generate, chat, quantize, bench. Thin; each command is a module below."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from headrace import __version__
from headrace.errors import HeadraceError

COMMANDS = {
    "generate": ("headrace.commands.generate", "complete the prompts of a JSONL file or of the command line"),
    "chat": ("headrace.commands.chat", "talk to a model on the terminal"),
    "quantize": ("headrace.commands.quantize", "write a checkpoint again with 8-bit or 4-bit weights"),
    "bench": ("headrace.bench.command", "measure, and compare with peers in the same run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors made on purpose into one line. Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="A generation engine in which every way of generating faster is a part. "
        "The bundled model is used where none is named.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine decides")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        # Only the command that is used loads its module: `headrace --help` must not wait for torch.
        if name in words:
            importlib.import_module(module).add_arguments(sub)
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headrace: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
