"""Values from outside on their way in: unknown names, wrong types, and how a message shows a value.

Numbers of other libraries (numpy, torch) become plain ones here, so that nothing behind it meets them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import os
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar, cast

from headrace.errors import HeadraceError

T = TypeVar("T")

SHOWN = 60
"""Characters of a value that a message shows."""
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def show(value: Any) -> str:
    """A value for a message: its repr, cut; what cannot be shown is named by its type."""
    try:
        text = repr(value)
    except Exception:  # such as a number of more digits than Python prints, or a repr that fails
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is close, else nothing."""
    if not isinstance(name, str):
        return ""
    names, word = list(known), name.lower()
    begun = [other for other in names if len(word) > 2 and other.startswith(word)]
    close = begun or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The sentence about a name that is not known: the close one, else all."""
    names = list(known)
    return f"unknown {what} {show(name)}{did_you_mean(name, names) or '; known: ' + ', '.join(names)}"


def names_checked(what: str, error: type[HeadraceError]) -> Callable[[type[T]], type[T]]:
    """Decorator for a dataclass: a keyword that is no field raises `error`, and the closest field is named."""

    def add(kind: type[T]) -> type[T]:
        made = kind.__init__

        @functools.wraps(made)
        def checked(self: Any, *args: Any, **given: Any) -> None:
            names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
            for name in given:
                if name not in names:
                    raise error(unknown(what, name, names))
            made(self, *args, **given)

        kind.__init__ = checked  # type: ignore[method-assign]
        return kind

    return add


def settle_types(instance: Any, error: type[HeadraceError]) -> None:
    """Bring each field of a frozen dataclass to the plain type that its annotation names; what has none raises `error`.

    Whole numbers of any library become `int`, paths `str`, other iterables than text a list of its own. Annotations
    with other types than these are not looked at.
    """
    for name, kinds in _annotations(cast("Hashable", type(instance))).items():
        value = getattr(instance, name)
        plain = _settle(name, value, kinds, error)
        if plain is not value:
            object.__setattr__(instance, name, plain)


@functools.cache
def _annotations(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each field may have."""
    hints = typing.get_type_hints(kind)
    found = {}
    for spec in dataclasses.fields(kind):
        hint = hints[spec.name]
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if all(k in _KINDS or k is types.NoneType or typing.get_origin(k) in (list, dict) for k in kinds):
            found[spec.name] = kinds
    return found


def _settle(name: str, value: Any, kinds: tuple[Any, ...], error: type[HeadraceError]) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if kind in _KINDS:
            found, plain = _plain(value, kind)
            if found:
                return plain
        elif origin is dict and isinstance(value, Mapping):
            return {_element(name, k, inner[0], error): _element(name, v, inner[1], error) for k, v in value.items()}
        elif origin is list and isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
            try:
                elements = list(value)
            except TypeError:  # an array without dimensions
                continue
            return [_element(name, x, inner[0], error) for x in elements]
    raise error(f"{name} is {show(value)}; it must be {_must(kinds)}")


def _element(name: str, value: Any, kind: Any, error: type[HeadraceError]) -> Any:
    found, plain = _plain(value, kind)
    if not found:
        raise error(f"{name} has {show(value)}, which is not {_KINDS[kind]}")
    return plain


def _must(kinds: tuple[Any, ...]) -> str:
    words = []
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is list:
            words.append(f"a list of {_MANY[inner[0]]}")
        elif origin is dict:
            words.append(f"a dict from {_MANY[inner[0]]} to {_MANY[inner[1]]}")
        elif kind is not types.NoneType:
            words.append(_KINDS[kind])
    words += ["None"] if types.NoneType in kinds else []
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _plain(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether the value is of the kind, and its plain form."""
    if kind is bool:
        is_bool = _is_bool(value)
        return is_bool, bool(value) if is_bool else value
    if kind is str:
        path = os.fspath(value) if isinstance(value, os.PathLike) else value
        return isinstance(path, str), path
    if kind is int:
        number = whole_number(value)
        return number is not None, number
    return _as_float(value)


def _as_float(value: Any) -> tuple[bool, Any]:
    if _is_bool(value) or isinstance(value, (str, bytes)):
        return False, value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a torch tensor of several numbers
        return False, value
    return True, value if type(value) in (int, float) else number


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")  # numpy's, by its names


def whole_number(value: Any) -> int | None:
    """The value as a plain int if it is a whole number of Python, numpy or torch, else None; bool is none."""
    if type(value) is int:
        return value
    if _is_bool(value) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
