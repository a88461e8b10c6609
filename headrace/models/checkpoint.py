"""Checkpoints: finding them, checking them as a whole, and streaming them into a model.

Names, shapes and types of all tensors are compared with the model's before any memory is taken, and every
difference is reported at once. Then each tensor is copied into its place.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError, ConfigError, UnsupportedModelError
from headrace.layers.adapters import AdapterBank
from headrace.layers.placement import Pieces, Placement, whole_shape
from headrace.memory import check_memory
from headrace.models.base import CausalLM
from headrace.models.config import DTYPES, ModelConfig
from headrace.models.registry import build_model, read_config
from headrace.models.streaming import Entry, stream_tensors
from headrace.progress import Stages
from headrace.quantization import Quantization
from headrace.ranks import ONE, Ranks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED = {torch.int32: ("I32",), torch.float8_e4m3fn: ("F8_E4M3",)}
"""Types in files that parameters of codes take; all others take `FLOATS`."""
LISTED = 8
"""Names listed of each kind of problem; the rest is counted."""

# Old checkpoints store the frequencies of the rotation, which follow from the configuration.
REDUNDANT = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
# What a quantised linear map has beside or instead of its weight.
QUANTISED = re.compile(r"(.*)\.(qweight|weight_scale|weight_scale_inv|weight_packed|weight_zero_point)")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
STD = 0.02
HEAD = "lm_head.weight"
NORM = re.compile(r"(.*norm|(.*\.)?ln_\w+)\.weight")
REMEDY = "fetch the checkpoint again, or correct config.json"


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype = "auto",
    load_format: str = "auto",
    max_model_len: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    adapters: AdapterBank | None = None,
    quantization: Quantization | None = None,
    ranks: Ranks = ONE,
    stages: Stages | None = None,
    parity: bool = False,
) -> CausalLM:
    """A model ready for inference: parameters loaded, converted, without gradient.

    Args:
        path_or_id: directory of a checkpoint (config.json and safetensors), or a hub id.
        device: where the parameters go.
        dtype: their type; "auto": the checkpoint's on a GPU, float32 on the CPU.
        load_format: "auto" loads the weights; "random" makes them from `seed` by name and shape alone
            (std 0.02, norms 1) and needs only config.json.
        max_model_len: longest sequence in tokens; None: the checkpoint's max_position_embeddings. With longrope it
            also chooses the frequencies: see `headrace.layers.rotary.inverse_frequencies`.
        seed: seed of random weights.
        revision: revision of a hub id.
        adapters: the model's linear maps get room for adapters in this bank, which must be new.
        quantization: a form of weights for a dense checkpoint, of tools that look at products.
        ranks: those that share the model; only this rank's parts of split tensors are read. Random weights are the
            same model on any number of ranks.
        stages: is told how long what takes; None: nobody asks.
        parity: each row's bits are a function of that row and of what it sees; see `EngineConfig.parity`.

    Raises:
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
        CapacityError: the model is bigger than the memory that is available.
        UnsupportedModelError: the configuration asks for something that is not implemented.
        ConfigError: an argument is impossible.
    """
    if load_format not in ("auto", "random"):
        raise ConfigError(f"load_format is {load_format!r}; choose from auto, random")
    device = torch.device(device)
    wanted = _parse_dtype(dtype)
    directory = resolve_model(path_or_id, revision, weights=load_format == "auto")
    config = read_config(directory)
    if quantization is not None:
        if config.quantization is not None:
            raise ConfigError(
                f"{config.quantization.where} says that the weights are {config.quantization.method} already: give a "
                "checkpoint with float32, bfloat16 or float16 weights"
            )
        config = dataclasses.replace(config, quantization=quantization)
    stages = stages or Stages()
    with stages.stage("outline"):
        # Without the bank: its rooms are those of the model itself.
        place = Placement(device, wanted or _known_dtype(config, device), None, config.quantization, ranks)
        place = place._replace(parity=parity)
        outline = _outline(config, max_model_len, place)
        entries: dict[str, Entry] = {}
        if load_format == "auto":
            entries = _with_prefix(read_headers(directory), outline.prefix)
            entries = {name: entry for name, entry in entries.items() if not outline.ignores(name)}
            _check(directory, config, outline.tensors(), entries)
            if wanted is None and config.dtype is None and device.type != "cpu":
                place = place._replace(dtype=_stored_dtype(entries))
                outline = _outline(config, max_model_len, place)
        elif config.quantization is not None:
            raise ConfigError(
                f"load_format is 'random', but {config.quantization.where} asks for weights in the form "
                f"{config.quantization.method!r}, and random ones are dense: remove that entry, or load the checkpoint"
            )
        needed = _check_memory(outline, place)
    with stages.stage("weights", needed) as advance:
        model = build_model(config, max_model_len=max_model_len, place=place._replace(adapters=adapters))
        model.adapters = adapters
        if load_format == "auto":
            overflow = stream_tensors(model.tensors(), entries, _narrower, advance)
            if overflow:
                kind = str(place.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"values of {_list(overflow)} do not fit into {kind}: use dtype='bfloat16' or 'float32'"
                )
        else:
            fill_random(model, seed, advance)
        with torch.no_grad():
            model.finish_loading()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # what was held on the way would be missing from the cache
    return model.eval()


def _outline(config: ModelConfig, max_model_len: int | None, place: Placement) -> CausalLM:
    """The model without memory."""
    outline = build_model(config, max_model_len=max_model_len, place=place._replace(device=torch.device("meta")))
    outline.tensors()  # linear maps learn their names, and with them what they are stored in
    return outline


def _check_memory(outline: CausalLM, place: Placement) -> int:
    """The bytes that the model takes. Raises CapacityError before anything is taken that does not fit."""
    needed = sum(tensor.numel() * tensor.itemsize for tensor in (*outline.parameters(), *outline.buffers()))
    dtype = str(place.dtype).removeprefix("torch.")
    way_out = "use a smaller model, a narrower dtype, a smaller max_model_len, or a device with more memory"
    check_memory(f"the model in {dtype} takes", needed, place.device, way_out)
    return needed


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The type asked for, or None for "auto"."""
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype if dtype in DTYPES.values() else None
    if found is None:
        raise ConfigError(f"dtype is {dtype!r}; choose from auto, {', '.join(DTYPES)}")
    return found


def _known_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type for "auto", as far as it is known without the checkpoint's headers."""
    if device.type == "cpu":
        return torch.float32
    return config.dtype or torch.bfloat16


def _stored_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """The type for "auto" on a GPU where the configuration names none."""
    stored = {FLOATS[entry.dtype] for entry in entries.values() if entry.dtype in FLOATS}
    return stored.pop() if len(stored) == 1 else torch.bfloat16


def resolve_model(path_or_id: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a checkpoint: a local one as it is, else the snapshot of a hub id, fetched if need be.

    HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured at the time of the call.

    Args:
        path_or_id: directory or hub id ("owner/name").
        revision: branch, tag or commit of a hub id; None: the main branch.
        weights: fetch the weights as well as configuration and tokenizer.

    Raises:
        CheckpointError: there is no such directory and the hub does not give it, with the reason.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision {revision!r} was given, but {name} is a local directory: leave it out")
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the directory that holds config.json and the weights")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name} is no directory here, and cannot be a hub id (owner/name): check the path")
    # The client of the hub takes a tenth of a second to load, and a directory needs none.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or None
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        found = snapshot_download(
            name,
            revision=revision,
            endpoint=endpoint,
            cache_dir=os.environ.get("HF_HUB_CACHE") or None,
            local_files_only=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
            allow_patterns=patterns,
            # Subfolders hold other formats of the same weights, consolidated files the same weights once more.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(_hub_refusal(name, revision, endpoint, error)) from error
    except Exception as error:  # the client also lets errors of its HTTP library through, whichever that is
        raise CheckpointError(
            f"{name} is no directory here, and could not be fetched from {endpoint or 'the hub'} "
            f"({_first_line(error)}): without a connection, copy the checkpoint to this machine and give its "
            "directory, or set HF_HUB_CACHE to a cache that holds it, or HF_ENDPOINT to a mirror that can be reached"
        ) from error
    return Path(found)


def _hub_refusal(name: str, revision: str | None, endpoint: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    hub = endpoint or "the hub"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated on {hub}: accept its terms there and set HF_TOKEN, or give a local directory"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on {hub}: give a branch, tag or commit that exists"
    return (
        f"{name} is no directory here, and {hub} does not know it: check the name, set HF_TOKEN if it is private, "
        "or give a local directory"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def read_headers(directory: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint, from the headers of its files alone.

    Raises CheckpointError, naming every file that is missing, damaged or contradicts the index.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(f"{directory} has both {SINGLE} and {INDEX}: remove the one that is out of date")
    if single.exists():
        entries, damage = _read_files([single])
        if damage:
            raise CheckpointError(_report(directory, {"damaged files": damage}))
        return entries[single]
    if index.exists():
        return _read_sharded(directory, _read_index(index))
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf", "*.pt") for path in directory.glob(pattern))
    hint = f" (found {', '.join(others[:3])}: convert them to safetensors)" if others else ""
    raise CheckpointError(
        f"{directory} has neither {SINGLE} nor {INDEX}{hint}: fetch the weights, or use load_format='random'"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no index of shards ({_first_line(error)}): fetch it again") from error
    outside = sorted({file for file in pairs.values() if Path(file).name != file or file in ("", ".", "..")})
    if outside:
        raise CheckpointError(f"{path} names files outside its directory ({_list(outside)}): fetch it again")
    return pairs


def _read_sharded(directory: Path, weight_map: Mapping[str, str]) -> dict[str, Entry]:
    files = sorted({directory / file for file in weight_map.values()})
    absent = [path for path in files if not path.exists()]
    shards, damage = _read_files(path for path in files if path.exists())
    entries: dict[str, Entry] = {}
    for name, file in weight_map.items():
        entry = shards.get(directory / file, {}).get(name)
        if entry is not None:
            entries[name] = entry
    unreadable = {path.name for path in absent} | {path.name for path in files if path not in shards}
    lost = [
        f"{name} (in {file})" for name, file in weight_map.items() if name not in entries and file not in unreadable
    ]
    stray = [
        f"{name} (in {path.name})"
        for path, held in shards.items()
        for name in held
        if weight_map.get(name) != path.name
    ]
    problems = {
        "missing files": [path.name for path in absent],
        "damaged files": damage,
        "in the index, not in its file": lost,
        "in a file, not so in the index": stray,
    }
    if any(problems.values()):
        raise CheckpointError(_report(directory, problems))
    return entries


def _read_files(files: Iterable[Path]) -> tuple[dict[Path, dict[str, Entry]], list[str]]:
    """The tensors of each readable file, and a sentence for each that is not."""
    found: dict[Path, dict[str, Entry]] = {}
    damage: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
                found[path] = {
                    name: Entry(path, tuple(part.get_shape()), part.get_dtype(), name) for name, part in slices.items()
                }
        except (SafetensorError, OSError, ValueError) as error:
            damage.append(f"{path.name} ({path.stat().st_size} bytes; {_first_line(error)})")
    return found, damage


def _with_prefix(entries: dict[str, Entry], prefix: str) -> dict[str, Entry]:
    """The entries by their full names, where the checkpoint leaves the prefix out."""
    if not prefix or any(name.startswith(prefix) for name in entries):
        return entries
    return {name if name == HEAD else prefix + name: entry for name, entry in entries.items()}


def _check(
    directory: Path, config: ModelConfig, places: Mapping[str, list[Tensor]], entries: Mapping[str, Entry]
) -> None:
    """Compare the checkpoint's tensors with the model's; raise one error that names all differences."""
    form = config.quantization
    known = {name for name in entries if REDUNDANT.fullmatch(name)}
    if form is not None:
        _refuse_quantised_elsewhere(directory, form, places, entries)
        known |= {
            name
            for name in entries
            if name not in places and (form.unused(name) or _is_zero_bias(name, places, entries[name]))
        }
    problems: dict[str, list[str]] = {
        "missing": [name for name in places if name not in entries],
        "unexpected": [name for name in entries if name not in places and name not in known],
        "of the wrong shape": [],
        "of a type that is not implemented": [],
    }
    embedding = next(iter(places))
    if config.tie_word_embeddings and HEAD in problems["unexpected"] and embedding in entries:
        problems["unexpected"].remove(HEAD)
        if not _equal(entries[HEAD], entries[embedding]):
            problems["differing although tie_word_embeddings is true"] = [f"{HEAD} from {embedding}"]
    for name, views in places.items():
        if name not in entries:
            continue
        must = whole_shape(views)
        # One number is stored as [1] or as [].
        if entries[name].shape != must and not (must == (1,) and entries[name].shape == ()):
            problems["of the wrong shape"].append(f"{name} is {list(entries[name].shape)}, must be {list(must)}")
        if entries[name].dtype not in STORED.get(views[0].dtype, FLOATS):
            problems["of a type that is not implemented"].append(f"{name} is {entries[name].dtype}")
    if not any(problems.values()):
        return
    tied = problems["missing"] == [HEAD] and not config.tie_word_embeddings
    remedy = "if the head is the embedding, set tie_word_embeddings in config.json" if tied else REMEDY
    raise CheckpointError(_report(directory, problems, remedy))


def _refuse_quantised_elsewhere(
    directory: Path, form: Quantization, places: Mapping[str, list[Tensor]], entries: Mapping[str, Entry]
) -> None:
    """Raise an error that names the parameters that the checkpoint has quantised and that are dense here."""
    found = [match[1] for match in map(QUANTISED.fullmatch, entries) if match]
    dense = sorted(
        {name for name in found if places.get(f"{name}.weight", [None])[0] is not None}
        - {match[1] for match in map(QUANTISED.fullmatch, places) if match}
    )
    if dense:
        raise UnsupportedModelError(
            f"{directory} has {_list(dense)} quantised ({form.method}), but {form.where} leaves them out, or this "
            "engine has no such form for them (embedding, head, experts, the latents of DeepSeek): use a checkpoint "
            "that keeps these dense"
        )


def _is_zero_bias(name: str, places: Mapping[str, list[Tensor]], entry: Entry) -> bool:
    """Whether a tensor is a bias of zeros, which some tools write for every linear map that they quantise."""
    base, _, part = name.rpartition(".")
    if part != "bias" or f"{base}.qweight" not in places:
        return False
    with safe_open(entry.file, framework="pt") as file:
        return not file.get_tensor(entry.name).any()


def _equal(a: Entry, b: Entry) -> bool:
    if a.shape != b.shape:
        return False
    with safe_open(a.file, framework="pt") as first, safe_open(b.file, framework="pt") as second:
        tensor = first.get_tensor(a.name)
        return torch.equal(tensor, second.get_tensor(b.name).to(tensor.dtype))


def _report(directory: Path, problems: Mapping[str, list[str]], remedy: str = REMEDY) -> str:
    parts = [f"{kind} ({len(items)}): {_list(items)}" for kind, items in problems.items() if items]
    return f"{directory} does not hold the model that its files describe: {'; '.join(parts)}: {remedy}"


def _list(items: list[str]) -> str:
    rest = len(items) - LISTED
    return ", ".join(items[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _narrower(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether the target's range is smaller, not counting bfloat16's last half per cent."""
    if target in STORED:
        return False
    return torch.finfo(target).max < 0.99 * torch.finfo(source).max


def fill_random(model: CausalLM, seed: int, advance: Callable[[int], None]) -> None:
    """Fill a model from a seed: normal with standard deviation 0.02, norms 1. `advance` is told the bytes that are.

    A tensor's values depend on seed, device type and its place in the model's list of tensors, not on the model's
    type: they are drawn in float32 and rounded.
    """
    for index, (name, views) in enumerate(model.tensors().items()):
        device = views[0].device
        # Whole, also where this rank takes a part: the model must not depend on the number of ranks. Filled in the
        # order of a contiguous tensor, whatever the parameter's layout.
        values = torch.empty(whole_shape(views), dtype=torch.float32, device=device)
        if NORM.fullmatch(name):
            values.fill_(1.0 - model.config.norm_offset)
        else:
            generator = torch.Generator(device=device).manual_seed((seed * 1_000_003 + index) % 2**63)
            values.normal_(0.0, STD, generator=generator)
        where = views.where if isinstance(views, Pieces) else [()] * len(views)
        for view, slices in zip(views, where, strict=True):
            view.copy_(values[slices])
        advance(sum(view.numel() * view.itemsize for view in views))
