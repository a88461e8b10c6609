"""From options to an engine that runs: the same steps on every rank."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed

from headrace.config import EngineConfig
from headrace.engine.assembly import check_ranks
from headrace.engine.engine import Engine
from headrace.errors import ConfigError
from headrace.front import TextFront
from headrace.layers.adapters import AdapterBank
from headrace.layers.placement import Pieces, Placement, whole_shape
from headrace.models.checkpoint import load_model, resolve_model
from headrace.models.registry import build_model, read_config
from headrace.progress import Stages
from headrace.ranks import ONE, Ranks
from headrace.selection.base import load_selector
from headrace.team import Lead
from headrace.text.tokenizer import Tokenizer

log = logging.getLogger("headrace")

WHOLE_SHARE = 0.05
"""Of the weights of its layers a rank may hold so much whole: routers and the like."""
IN_A_LAYER = re.compile(r"\.\d+\.")


class Settings(NamedTuple):
    """What an engine is made from. Plain data: it travels to the other ranks."""

    config: EngineConfig
    path: Path
    """Directory of the checkpoint."""
    device: str
    """"cpu" or "cuda"."""


def choose_device(name: str) -> str:
    """ "cpu" or "cuda" for the option `device`. Raises ConfigError if torch finds no GPU."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError(
            "device is 'cuda'; torch finds no GPU here: use device='cpu' or install a CUDA build of torch"
        )
    return "cuda" if name == "cuda" or (name == "auto" and has_gpu) else "cpu"


def load_tokenizer(settings: Settings, stages: Stages) -> Tokenizer | None:
    """The tokenizer; None if none is wanted. Raises TokenizerError or CheckpointError."""
    config = settings.config
    if config.skip_tokenizer_init:
        return None
    with stages.stage("tokenizer"):
        return Tokenizer.from_dir(resolve_model(config.tokenizer, weights=False) if config.tokenizer else settings.path)


def start(settings: Settings, tokenizer: Tokenizer | None, ranks: Ranks, stages: Stages) -> TextFront:
    """Load this rank's share of the model and start an engine over it. How long that takes goes to `stages`.

    Raises ConfigError for options that cannot work, CheckpointError for broken files, CapacityError for want of memory.
    """
    config = settings.config
    began_s = time.perf_counter()
    if settings.device == "cuda":
        with stages.stage("device"):
            torch.empty(1, device=settings.device)  # makes the context, which takes long and belongs to no other stage
    places = config.adapter_places
    network = load_model(
        str(settings.path),
        device=settings.device,
        dtype=config.dtype,
        load_format=config.load_format,
        max_model_len=config.max_model_len,
        seed=config.seed,
        adapters=AdapterBank(places, config.max_adapter_rank) if places else None,
        ranks=ranks,
        stages=stages,
        parity=config.parity,
    )
    if tokenizer and tokenizer.vocab_size > network.config.vocab_size:
        log.warning(
            "the tokenizer knows %d tokens and the model %d: a prompt with one of the others is refused",
            tokenizer.vocab_size,
            network.config.vocab_size,
        )
    nbytes = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    ranks.meet(nbytes, time.perf_counter() - began_s)
    eos_ids = tokenizer.eos_ids if tokenizer else list(network.config.eos_token_ids)
    spellings = tokenizer.spellings if tokenizer else None
    engine = Engine(config, network, eos_ids=eos_ids, ranks=ranks, spellings=spellings, stages=stages)
    if config.draft_model and not any(decoder.models for decoder in engine.decoders.values()):
        raise ConfigError(
            f"draft_model is {config.draft_model!r}, but decoder={config.decoder!r} runs no model of its own: leave it "
            "out, or load a decoder that drafts with a model"
        )
    log.info("started: %s", stages)
    return TextFront(engine, tokenizer)


def gather(settings: Settings) -> Ranks:
    """The ranks that `tensor_parallel_size` asks for, the others in processes of their own that begin to load.

    Raises ConfigError, before any process is started, for a number of ranks that the model, the options or the machine
    do not allow.
    """
    config, size = settings.config, settings.config.tensor_parallel_size
    if size == 1:
        return ONE
    if config.adapter_places:
        raise ConfigError(
            f"tensor_parallel_size is {size}, and there is room for {config.adapter_places} adapters: adapters are not "
            "divided among ranks yet: use tensor_parallel_size=1, or leave out adapters and max_adapters"
        )
    form = read_config(settings.path).quantization
    if form is not None:
        raise ConfigError(
            f"tensor_parallel_size is {size}, and the checkpoint's weights are in the form {form.method!r}, which is "
            "not divided among ranks yet: use tensor_parallel_size=1, or a checkpoint with dense weights"
        )
    if settings.device == "cuda":
        _check_gpus(size)
    place = Placement(torch.device("meta"), torch.float32, ranks=Ranks(size=size), parity=config.parity)
    outline = build_model(read_config(settings.path), max_model_len=config.max_model_len, place=place)
    whole = {name: prod(whole_shape(views)) for name, views in outline.tensors().items() if IN_A_LAYER.search(name)}
    kept = {name: n for name, n in whole.items() if not isinstance(outline.tensors()[name], Pieces)}
    if sum(kept.values()) > WHOLE_SHARE * sum(whole.values()):
        largest = max(kept, key=kept.__getitem__)
        raise ConfigError(
            f"tensor_parallel_size is {size}, but layers of model type {outline.config.model_type!r} are not divided "
            f"among ranks yet ({largest} would be whole on each of them): use tensor_parallel_size=1"
        )
    check_ranks(size, config, outline.layer_states(), load_selector(config, outline.layer_states()))
    lead = Lead(size, settings.device)
    try:
        # What was given as the id of a hub lies on this machine by now.
        lead.begin(settings._replace(config=replace(config, model=str(settings.path), revision=None)))
    except BaseException as error:
        raise lead.failed(error) from None
    return lead


def _check_gpus(size: int) -> None:
    count = torch.cuda.device_count()
    if size > count:
        raise ConfigError(
            f"tensor_parallel_size is {size}; torch finds {count} GPUs here: lower it, or make more of them visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    if torch.cuda.current_device() != 0:
        raise ConfigError(
            f"tensor_parallel_size is {size}, and the current GPU is {torch.cuda.current_device()}; rank r takes GPU "
            "r: make GPU 0 the current one, and choose the GPUs with CUDA_VISIBLE_DEVICES"
        )
    if not torch.distributed.is_nccl_available():
        raise ConfigError(f"tensor_parallel_size is {size}; this build of torch has no NCCL: install one that has")
