"""The command line: generate, chat, serve, quantize, bench. Thin; each command is a module below."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from headrace import __version__
from headrace.checks import did_you_mean, unknown
from headrace.errors import HeadraceError, OutputError

COMMANDS = {
    "generate": ("headrace.commands.generate", "complete the prompts of a JSONL file or of the command line"),
    "chat": ("headrace.commands.chat", "talk to a model on the terminal"),
    "serve": ("headrace.commands.serve", "serve a model over OpenAI's HTTP API"),
    "quantize": ("headrace.commands.quantize", "write a checkpoint again with 8-bit or 4-bit weights"),
    "bench": ("headrace.bench.command", "measure, and compare with peers in the same run"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of a command with all its options fills a screen."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(
            2,
            f"{self.prog}: {message.removesuffix('?')}{'?' if message.endswith('?') else ';'} see {self.prog} --help\n",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn errors made on purpose into one line.

    Returns the exit status: 0; 1 if an output, or part of it, is missing; 2 for what was asked wrongly; 130 after
    Ctrl-C; 141 if the reader of the output went away, as for any program that the signal of a broken pipe ends.
    """
    try:
        try:
            status = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as left:  # --help, --version, and what the parser refuses
            status = left.code if isinstance(left.code, int) else 2
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"standard output: {error.strerror}") from error
        return status
    except BrokenPipeError:
        _silence()
        return 141
    except OutputError as error:
        _say(f"headrace: {error}")
        _silence()
        return 1
    except HeadraceError as error:
        _say(f"headrace: {error}")
        return 2
    except KeyboardInterrupt:
        _say("headrace: interrupted")
        return 130


def _run(words: list[str]) -> int:
    parser = Parser(
        prog="headrace",
        description="A generation engine in which every way of generating faster is a part. "
        "The bundled model is used where none is named.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the engine decides")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    subs = {}
    for name, (module, text) in COMMANDS.items():
        subs[name] = commands.add_parser(name, help=text, description=text)
        # Only the command that is used loads its module: `headrace --help` must not wait for torch.
        if name in words:
            importlib.import_module(module).add_arguments(subs[name])
    asked = next((word for word in words if not word.startswith("-")), None)
    if asked is not None and asked not in COMMANDS:
        parser.error(unknown("command", asked, COMMANDS))
    arguments, rest = parser.parse_known_args(words)
    if rest:
        sub = subs[arguments.command]
        flags = re.findall(r"--[\w-]+", sub.format_usage())
        hints = (f"{word}{did_you_mean(word.split('=')[0], flags)}" for word in rest)
        sub.error(f"unknown arguments: {', '.join(hints)}")
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(name)s: %(message)s")
    return int(importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _silence() -> None:
    """Nothing more can be written: let the interpreter's last flush find a file that takes everything."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
