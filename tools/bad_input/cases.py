"""What can be tried: something that is refused, a command that ends with one line, and what only looks wrong."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from typing import NamedTuple

from headrace.cli import main
from headrace.errors import (
    HeadraceError,
)
from tools.bad_input.bench import Bench


class Case(NamedTuple):
    """Refused: `act` raises an error of exactly this type."""

    name: str
    error: type[HeadraceError]
    act: Callable[[Bench], object]


class Command(NamedTuple):
    """The command line: arguments, of which `{dir}` and `{model}` are filled in; input files; exit status."""

    name: str
    status: int
    arguments: str
    lines: bytes | None = None


class Allowed(NamedTuple):
    """Not refused: `act` returns in words what happens."""

    name: str
    act: Callable[[Bench], str]


def refusal(bench: Bench, case: Case) -> HeadraceError:
    """The error that a case is refused with. Anything else is a bug: it comes through, or is an AssertionError."""
    try:
        case.act(bench)
    except HeadraceError as error:
        if type(error) is not case.error:
            raise AssertionError(f"{case.name}: {type(error).__name__} instead of {case.error.__name__}") from error
        return error
    raise AssertionError(f"{case.name}: nothing was refused")


def line_of(bench: Bench, command: Command) -> str:
    """The last line that a command leaves on standard error. Raises AssertionError for another exit status."""
    if command.lines is not None:
        (bench.root / "in.jsonl").write_bytes(command.lines)
    small = "--device cpu --num-pages 96 --page-size 4 --max-num-seqs 4 --max-num-batched-tokens 64"
    words = [w.format(dir=bench.root, model=f"--model {bench.model} {small}") for w in command.arguments.split()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(" ".join(words).split())
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
    kept = (bench.root / "out.jsonl").read_text() if (bench.root / "out.jsonl").exists() else ""
    for name in ("in.jsonl", "out.jsonl"):
        (bench.root / name).unlink(missing_ok=True)
    if status != command.status:
        raise AssertionError(f"{command.name}: status {status} instead of {command.status}: {err.getvalue()}")
    if kept:
        return f"the line says: {json.loads(kept)['error']}"
    return err.getvalue().splitlines()[-1]
