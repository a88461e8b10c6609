"""Write a dense checkpoint again with its linear maps in another form."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from headrace.errors import ConfigError
from headrace.models.base import CausalLM
from headrace.models.checkpoint import INDEX, SINGLE, load_model, read_headers, resolve_model
from headrace.quantization import Quantization
from headrace.quantization.watch import Watched, WatchedStore, watched_stores


class Written(NamedTuple):
    """What became of a checkpoint."""

    modules: int
    """Linear maps that are quantised."""
    weights: int
    """Weights in them."""
    before_bytes: int
    after_bytes: int
    """Of all tensors."""


def quantise_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: Quantization,
    *,
    feed: Callable[[CausalLM], None] | None = None,
) -> Written:
    """Copy a checkpoint, its blocks' linear maps in the form. Embedding, head, norms and experts stay as they are.

    Args:
        source: directory or hub id of a dense checkpoint.
        out: a directory that does not exist or is empty.
        form: as `quantization_config` would describe it.
        feed: runs calibration text through the model, for forms that round by the second moments of the inputs;
            None: to the nearest code. All moments are those of the dense model.

    Raises:
        ConfigError: `out` holds something, or the source is quantised.
        CheckpointError: the source is damaged.
        UnsupportedModelError: the form cannot hold one of the maps.
    """
    source, out = resolve_model(source), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already: give a directory that is empty, or that does not exist")
    model = load_model(source, device="cpu", dtype="float32", quantization=Watched(str(source)))
    stores = watched_stores(model)
    if not stores:
        raise ConfigError(f"{source} has no linear maps that could be quantised: nothing to do")
    for store in stores:
        form.make(store.names, store.widths, store.inputs, torch.device("meta"))
    if feed is not None:
        feed(model)
    maps = {name: (store, start, end) for store in stores for name, start, end in store.spans}
    return _write(source, out, form, maps, calibrated=feed is not None)


def _write(
    source: Path,
    out: Path,
    form: Quantization,
    maps: Mapping[str, tuple[WatchedStore, int, int]],
    *,
    calibrated: bool,
) -> Written:
    stored: dict[str, Tensor] = {}
    before = weights = 0
    entries = read_headers(source)
    for name, entry in entries.items():
        with safe_open(entry.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        before += tensor.nbytes
        base = _module_of(name, maps)
        if base is None:
            stored[name] = tensor
            continue
        store, start, end = maps[base]
        moments = store.moments_EE if calibrated else None
        weights += store.inputs * (end - start)
        prefix = name.removesuffix(".weight")
        stored |= {
            f"{prefix}.{part}": value.contiguous()
            for part, value in form.pack(store.dense()[start:end], moments).items()
        }
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, out / path.name)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = form.describe()
    (out / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    save_file(stored, out / SINGLE, metadata={"format": "pt"})
    return Written(len(maps), weights, before, sum(tensor.nbytes for tensor in stored.values()))


def _module_of(name: str, maps: Mapping[str, tuple[WatchedStore, int, int]]) -> str | None:
    """The linear map whose weight a tensor is, its name with or without the prefix that some checkpoints leave out."""
    base = name.removesuffix(".weight")
    if base == name:
        return None
    found = [full for full in maps if full == base or full.endswith(f".{base}")]
    return min(found, key=len, default=None)
