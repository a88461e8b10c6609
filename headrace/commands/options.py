"""Command-line options made from the fields of the option dataclasses, and read back into them."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

NAMED_TWICE = ("decoder", "evictor", "cache_budget")
"""Request parameters with the name of an engine option: on the command line the name is the engine's."""


def add_options(
    parser: argparse.ArgumentParser, kind: type, title: str, *, skip: tuple[str, ...] = (), **defaults: Any
) -> None:
    """One `--option` for each field of the dataclass, with the field's help and default.

    `defaults` are those of the command where they differ from the dataclass's own.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(kind)
    for spec in dataclasses.fields(kind):
        if spec.name in skip:
            continue
        value = _value_type(hints[spec.name])
        if value is None:
            continue
        text = spec.metadata["help"]
        default = defaults.get(spec.name, spec.default)
        if default is not None:
            text += f" (default: {default})"
        settings: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS, "dest": spec.name}
        flag = "--" + spec.name.replace("_", "-")
        if value is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            many = typing.get_origin(value) is list
            element = typing.get_args(value)[0] if many else value
            settings |= {"type": element, "choices": spec.metadata["choices"]}
            if spec.metadata["file"]:
                settings |= {"type": text_or_file, "help": settings["help"] + "; @FILE reads it from a file"}
            settings["metavar"] = None if settings["choices"] else spec.metadata["metavar"] or element.__name__.upper()
            group.add_argument(flag, nargs="+" if many else None, **settings)


def read_options(arguments: argparse.Namespace, kind: type[T], *, skip: tuple[str, ...] = (), **fixed: Any) -> T:
    """The dataclass with the options that were given; `fixed` are defaults that differ from the dataclass's own.

    `skip` are fields that belong to another dataclass of the same command.
    """
    names = [f.name for f in dataclasses.fields(kind) if f.name not in skip]  # type: ignore[arg-type]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return kind(**{**fixed, **given})


def text_or_file(value: str) -> str:
    """The value, or what stands in the file behind an @."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{value[1:]} cannot be read ({error}): name a text file behind the @"
        ) from error


def _value_type(hint: Any) -> Any:
    """The type that a word of the command line becomes; None for types that have no such form (mappings)."""
    kinds = [k for k in typing.get_args(hint) if k is not types.NoneType] if _is_union(hint) else [hint]
    lists = [k for k in kinds if typing.get_origin(k) is list]
    if lists:
        return lists[0]
    return None if typing.get_origin(kinds[0]) is dict else kinds[0]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
