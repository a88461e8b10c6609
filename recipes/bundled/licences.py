"""Decides from a distribution's core metadata whether its source may enter the corpus.

Order: `License-Expression` (SPDX, PEP 639), then the `License ::` classifiers, then the free `License` field.
Only permissive licences pass; copyleft, proprietary and undeclared ones do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

ALLOWED_SPDX = frozenset(
    "0bsd apache-2.0 bsd-1-clause bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cnri-python hpnd isc libpng mit mit-0 "
    "mit-cmu ncsa psf-2.0 python-2.0 python-2.0.1 unlicense x11 zlib".split()
)
ALLOWED_CLASSIFIERS = {
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Python Software Foundation License": "PSF",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "zlib/libpng License": "Zlib",
    "The Unlicense (Unlicense)": "Unlicense",
    "CC0 1.0 Universal (CC0 1.0) Public Domain Dedication": "CC0-1.0",
    "Boost Software License 1.0 (BSL-1.0)": "BSL-1.0",
    "University of Illinois/NCSA Open Source License": "NCSA",
}
FORBIDDEN_WORDS = re.compile(
    r"\b[AL]?GPL|\bGNU\b|\bMPL\b|Mozilla Public|Affero|\bEPL\b|Eclipse Public|CC[- ]BY|NonCommercial|"
    r"proprietary|LicenseRef|all rights reserved\.? *$",
    re.I,
)
# Whole licence texts in the `License` field are known by a sentence that the licence cannot do without.
TEXT_MARKS = (
    ("MIT", re.compile(r"permission is hereby granted, free of charge", re.I)),
    ("BSD", re.compile(r"redistribution and use in source and binary forms", re.I)),
    ("Apache-2.0", re.compile(r"apache license,?\s+version 2\.0", re.I)),
)
SHORT_NAMES = (
    (
        "Apache-2.0",
        re.compile(
            r"^(the )?apache([ -]software)?([ -]licen[sc]e)?,?[ -]*(v|version)?[ .]*2(\.0)?( licen[sc]e)?$", re.I
        ),
    ),
    ("MIT", re.compile(r"^(the )?(expat|mit)([ -]licen[sc]e)?$", re.I)),
    (
        "BSD",
        re.compile(
            r"^(the )?((new|modified|simplified|[23]-clause) )?bsd([ -]?[23](-clause)?)?([ -]licen[sc]e)?$", re.I
        ),
    ),
    ("ISC", re.compile(r"^isc([ -]licen[sc]e)?$", re.I)),
    ("PSF", re.compile(r"^(psf|psf-2\.0|python software foundation( licen[sc]e)?)$", re.I)),
    ("HPND", re.compile(r"^(hpnd|mit-cmu)$", re.I)),
    ("Zlib", re.compile(r"^zlib(/libpng)?([ -]licen[sc]e)?$", re.I)),
    ("Unlicense", re.compile(r"^(the )?unlicense$", re.I)),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a distribution may be used, under which licence, and which metadata field said so."""

    allowed: bool
    licence: str
    source: str


def spdx_allowed(expression: str) -> bool:
    """True when an SPDX expression can be met with allowed licences alone (AND: all, OR: any)."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)
    try:
        allowed, rest = _spdx_or(tokens)
    except IndexError:
        return False
    return allowed and not rest


def _spdx_or(tokens: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _spdx_and(tokens)
    while tokens and tokens[0].upper() == "OR":
        other, tokens = _spdx_and(tokens[1:])
        value = value or other
    return value, tokens


def _spdx_and(tokens: list[str]) -> tuple[bool, list[str]]:
    value, tokens = _spdx_term(tokens)
    while tokens and tokens[0].upper() == "AND":
        other, tokens = _spdx_term(tokens[1:])
        value = value and other
    return value, tokens


def _spdx_term(tokens: list[str]) -> tuple[bool, list[str]]:
    if tokens[0] == "(":
        value, tokens = _spdx_or(tokens[1:])
        return value and tokens[0] == ")", tokens[1:]
    value, tokens = tokens[0].lower() in ALLOWED_SPDX, tokens[1:]
    if tokens and tokens[0].upper() == "WITH":  # an exception only adds permissions
        tokens = tokens[2:]
    return value, tokens


def _from_classifiers(names: list[str], field: str) -> Verdict | None:
    labels = [name.split("::")[-1].strip() for name in names]
    labels = [label for label in labels if label != "OSI Approved"]
    if not labels:
        return None
    joined = "; ".join(ALLOWED_CLASSIFIERS.get(label, label) for label in labels)
    short_field_objects = len(field) <= 120 and FORBIDDEN_WORDS.search(field) is not None
    allowed = all(label in ALLOWED_CLASSIFIERS for label in labels) and not short_field_objects
    return Verdict(allowed, f"{joined} ({field})" if short_field_objects else joined, "classifier")


def _from_field(field: str) -> Verdict:
    if not field or field.upper() == "UNKNOWN":
        return Verdict(False, "not declared", "none")
    if "\n" not in field and len(field) <= 120:
        if spdx_allowed(field):
            return Verdict(True, field, "licence field")
        for label, pattern in SHORT_NAMES:
            if pattern.match(field):
                return Verdict(True, label, "licence field")
        return Verdict(False, field, "licence field")
    if not FORBIDDEN_WORDS.search(field):
        for label, pattern in TEXT_MARKS:
            if pattern.search(field):
                return Verdict(True, label, "licence text")
    return Verdict(False, field.strip().splitlines()[0][:80], "licence text")


class Headers(Protocol):
    """What is read of a METADATA file; `email.message.Message` and `importlib.metadata`'s own type both have it."""

    def __getitem__(self, name: str) -> Any: ...

    def __contains__(self, name: str) -> bool: ...

    def get_all(self, name: str) -> list[Any] | None: ...


def decide(metadata: Headers) -> Verdict:
    """The verdict on one distribution from its METADATA headers."""
    name, expression, field = (
        str(metadata[key] or "").strip() if key in metadata else "" for key in ("Name", "License-Expression", "License")
    )
    if name.lower().startswith("nvidia-"):
        return Verdict(False, expression or field[:80] or "not declared", "name")
    if expression:
        return Verdict(spdx_allowed(expression), expression, "licence expression")
    classifiers = [c for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")]
    return _from_classifiers(classifiers, field) or _from_field(field)
