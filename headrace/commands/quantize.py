"""`headrace quantize`: write a checkpoint again with 8-bit or 4-bit weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headrace.errors import ConfigError

METHODS = ("fp8", "awq", "gptq")
CALIBRATION_TOKENS = 16_384
SEQUENCE = 512
"""Tokens of a calibration sequence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", help="directory or hub id of a checkpoint with floating-point weights")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="gptq",
        help="layout: fp8 (compressed-tensors, a scale an output), awq (version gemm), gptq (default: gptq)",
    )
    parser.add_argument("--group-size", type=int, default=128, help="inputs of a group, -1: all (default: 128)")
    parser.add_argument(
        "--calibrate",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="text by which awq and gptq round (GPTQ's algorithm); without it every weight goes to the nearest code",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        help=f"tokens of that text to use (default: {CALIBRATION_TOKENS})",
    )
    parser.add_argument(
        "--desc-act", action="store_true", help="gptq: round inputs by falling second moment (needs --calibrate)"
    )


def run(arguments: argparse.Namespace) -> int:
    """The whole command. Returns the exit status."""
    from headrace.engine.feed import feed  # here, so that --help does not wait for torch
    from headrace.models.checkpoint import resolve_model
    from headrace.models.convert import quantise_checkpoint
    from headrace.quantization.write import form_of
    from headrace.text.tokenizer import Tokenizer

    texts: list[Path] | None = arguments.calibrate
    if texts is not None and arguments.method == "fp8":
        raise ConfigError("calibrate was given, but method fp8 rounds to the nearest code: leave it out")
    if arguments.desc_act and (texts is None or arguments.method != "gptq"):
        raise ConfigError("desc_act orders inputs by calibration text, in the layout gptq: add --calibrate FILE")
    form = form_of(arguments.method, arguments.group_size, desc_act=arguments.desc_act)
    sequences: list[list[int]] = []
    if texts is not None:
        tokenizer = Tokenizer.from_dir(resolve_model(arguments.model, weights=False))
        ids = [token for path in texts for token in tokenizer.encode(path.read_text(encoding="utf-8"))]
        ids = ids[: arguments.calibration_tokens]
        sequences = [ids[start : start + SEQUENCE] for start in range(0, len(ids), SEQUENCE)]
        if not sequences:
            raise ConfigError(f"calibrate: {', '.join(map(str, texts))} hold no text: give files with text")
    written = quantise_checkpoint(
        arguments.model, arguments.out, form, feed=(lambda model: feed(model, sequences)) if sequences else None
    )
    print(
        f"{arguments.out}: {written.modules} linear maps, {written.weights:,} weights; all tensors "
        f"{written.before_bytes:,} bytes before, {written.after_bytes:,} after",
        file=sys.stderr,
    )
    return 0
