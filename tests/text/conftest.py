"""Trained tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import KINDS

from headrace.text import Tokenizer


@pytest.fixture(scope="session", params=sorted(KINDS))
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved tokenizer of each kind."""
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="session")
def make_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A fresh model directory of one kind, to be changed at will."""
    return lambda kind: KINDS[kind](tmp_path_factory.mktemp("tokenizer") / kind)
