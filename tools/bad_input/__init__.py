"""Everything that a caller can do wrong, in one list: the tests try each, and docs/errors.md is what came of it.

A `Case` is refused with an error of `headrace.errors`, a `Command` ends with an exit status and one line, and an
`Allowed` looks wrong and is not. `Bench` is the tiny model that they run on.
"""

from __future__ import annotations

from collections.abc import Iterator

from tools.bad_input.bench import CONFIG, NAN_TOKEN, Bench, FullDisk, with_header
from tools.bad_input.cases import Allowed, Case, Command, line_of, refusal
from tools.bad_input.files import CHECKPOINT, OUTPUT, TOKENIZER
from tools.bad_input.options import ALLOWED, COMMANDS, ENGINE, MEMORY
from tools.bad_input.requests import ASYNC, CHAT, PARAMETERS, PROMPTS, RECORDS

__all__ = [
    "ALLOWED",
    "CHAT",
    "COMMANDS",
    "CONFIG",
    "GROUPS",
    "NAN_TOKEN",
    "PARAMETERS",
    "PROMPTS",
    "RECORDS",
    "Allowed",
    "Bench",
    "Case",
    "Command",
    "FullDisk",
    "line_of",
    "refusal",
    "rows",
    "with_header",
]

GROUPS = {
    "Requests: `generate`": PROMPTS,
    "Sampling parameters": PARAMETERS,
    "Chat": CHAT,
    "Many callers: `AsyncLLM`": ASYNC,
    "Portable records": RECORDS,
    "Engine options": ENGINE,
    "Memory": MEMORY,
    "Checkpoints": CHECKPOINT,
    "Tokenizers": TOKENIZER,
    "Output files": OUTPUT,
}


def rows(bench: Bench) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table of docs/errors.md."""
    for title, cases in GROUPS.items():
        yield (
            title,
            ["what is given", "error", "what it says"],
            [[case.name, case.error.__name__, bench.sentence(refusal(bench, case))] for case in cases],
        )
    yield (
        "Command line",
        ["what is given", "exit status", "the last line"],
        [[command.name, str(command.status), bench.sentence(line_of(bench, command))] for command in COMMANDS],
    )
    yield (
        "What is allowed",
        ["what is given", "what happens"],
        [[allowed.name, bench.sentence(allowed.act(bench))] for allowed in ALLOWED],
    )
