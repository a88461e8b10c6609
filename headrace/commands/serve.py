"""`headrace serve`: OpenAI's HTTP API on one model."""

from __future__ import annotations

import argparse

from headrace.commands.options import add_options, read_options
from headrace.config import EngineConfig
from headrace.errors import ConfigError
from headrace.serve.settings import ServeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "model", nargs="?", help="directory or hub id of the checkpoint; the bundled model if not given"
    )
    add_options(parser, ServeConfig, "server")
    add_options(parser, EngineConfig, "engine", skip=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes. Returns the exit status."""
    settings = read_options(arguments, ServeConfig)
    config = read_options(arguments, EngineConfig)
    settings.keys()  # a file that cannot be read is said before anything is loaded
    try:
        from headrace.serve import server  # here, so that --help does not wait for it
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "headrace":
            raise
        raise ConfigError(f"headrace serve needs {error.name}: pip install 'headrace[serve]'") from error
    return server.run(settings, config, say=lambda line: print(line, flush=True))
