"""`headrace chat`: a conversation on the terminal, streamed token by token."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from headrace.commands.options import NAMED_TWICE, add_options, read_options
from headrace.config import EngineConfig
from headrace.errors import RequestError
from headrace.params import SamplingParams

DEFAULTS: dict[str, Any] = {"max_tokens": 256}
SKIPPED = ("n", "logprobs", "prompt_logprobs", "detokenize", *NAMED_TWICE)
"""Parameters that make no sense in a conversation on a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--system", help="system message that opens the conversation")
    add_options(parser, SamplingParams, "sampling", skip=SKIPPED, **DEFAULTS)
    add_options(parser, EngineConfig, "engine", skip=("seed", "skip_tokenizer_init"))


def run(arguments: argparse.Namespace) -> int:
    """Read a line, stream the answer, until end of input. Returns the exit status."""
    from headrace.llm import LLM  # here, so that --help does not wait for torch

    params = read_options(arguments, SamplingParams, skip=NAMED_TWICE, **DEFAULTS)
    llm = LLM(**dataclasses.asdict(read_options(arguments, EngineConfig, skip=("seed",))))
    messages: list[dict[str, str]] = []
    if arguments.system:
        messages.append({"role": "system", "content": arguments.system})
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return 0
        except UnicodeDecodeError as error:
            print(f"[the line is not {error.encoding} (byte {error.start}): type it again]", file=sys.stderr)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            output = llm.chat(messages, params, on_text=lambda _, text: print(text, end="", flush=True))[0]
        except RequestError as error:
            # The conversation has outgrown the model: forget the oldest exchange, keep the system message.
            print(f"[{error}]", file=sys.stderr)
            keep = 1 if arguments.system else 0
            del messages[keep : keep + 2]
            continue
        print()
        messages.append({"role": "assistant", "content": output.outputs[0].text})
