"""A drafter for the tiny model; and one thread: tiny models gain nothing from more, and lose much on busy cores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cores
import pytest
import torch
from safetensors.torch import save_file
from tiny import CONFIG, tiny_model

one_thread = cores.one_thread


@pytest.fixture(scope="session")
def drafter() -> Iterator[str]:
    """A checkpoint with the tiny model's own weights, slightly disturbed: it is often right, and not always."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(7)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(CONFIG))
        tensors = {}
        for name, views in model.tensors().items():
            noise = torch.randn(views[0].shape, generator=generator, dtype=torch.float64)
            tensors[name] = (views[0].cpu() * (1 + 0.1 * noise)).contiguous()
        save_file(tensors, str(Path(directory) / "model.safetensors"))
        yield directory
