"""The parts that an engine is made of: chosen by options, and checked against one another.

What does not compose is refused here, with a sentence, before memory for a cache is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from headrace.cache.manager import CacheGroup, group_layers
from headrace.cache.states import StateGroup, check_decoder, group_states
from headrace.codecs.base import Codec, load_codecs
from headrace.codecs.forms import Form, Selected
from headrace.config import EngineConfig
from headrace.decoding.base import Decoder, Setup
from headrace.engine.runner import Stream
from headrace.errors import ConfigError
from headrace.eviction.base import Evictor, Unit, finest, load_evictors
from headrace.models.base import CausalLM
from headrace.parts import DECODERS
from headrace.ranks import Ranks
from headrace.selection.base import Selector, load_selector
from headrace.step import LayerState

PLAIN = next(iter(DECODERS)).name
"""The decoder that every engine has: the first one registered."""

PARITY_TYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""By device the types for which all kernels of a model have a fixed order of sums."""


@dataclass(frozen=True)
class Parts:
    """The parts of an engine."""

    decoders: dict[str, Decoder]
    """By name, the default of requests first."""
    evictors: dict[str, Evictor]
    codec: Codec
    selector: Selector
    streams: dict[Stream, list[CacheGroup]]
    """The model that decodes and those of the decoders, with their cache groups."""
    state_groups: list[StateGroup]
    """Fixed states of the model that decodes."""

    @property
    def target(self) -> Stream:
        """The model that decodes."""
        return next(iter(self.streams))

    @property
    def groups(self) -> list[CacheGroup]:
        """Of all models."""
        return [group for found in self.streams.values() for group in found]


def assemble(config: EngineConfig, model: CausalLM, max_len: int, ranks: Ranks) -> Parts:
    """The parts that the options name, for sequences of `max_len` tokens at most. Raises ConfigError for those that do
    not compose."""
    weight = next(model.parameters())
    setup = Setup(config, model, config.max_num_seqs, max_len, weight.device)
    decoders: dict[str, Decoder] = {name: DECODERS[name].make(setup) for name in _decoder_names(config)}
    states = model.layer_states()
    evictors = load_evictors(config, states)
    own_models = [own for decoder in decoders.values() for own in decoder.models]
    codec, own_codec = load_codecs(config, weight.dtype, states)
    selector = load_selector(config, states)
    check_cache_parts(config, codec, selector, evictors)
    check_ranks(ranks.size, config, states, selector)
    # Decoders' own models keep and read everything.
    form = Selected(codec, selector) if selector.selects else codec.form(weight.device)
    if config.parity:
        check_parity(config, model, form, evictors, decoders)
    forms = [form, *(own_codec.form(weight.device) for _ in own_models)]
    codecs = [codec, *(own_codec for _ in own_models)]
    streams = _streams([model, *own_models], codecs, forms, finest(list(evictors.values())))
    state_groups = group_states(states)
    for name, part in decoders.items():
        own_states = [state for own in part.models for state in own.layer_states()]
        check_decoder(name, state_groups, drafts=part.e_max - 1 + part.n_soft, tree=part.tree, own=own_states)
    return Parts(decoders, evictors, codec, selector, streams, state_groups)


def _decoder_names(config: EngineConfig) -> list[str]:
    """The decoders to load, the default of requests first; plain decoding is always among them."""
    names = [name.strip() for name in config.decoder.split(",")]
    return list(dict.fromkeys([*names, PLAIN]))


def _streams(
    models: Sequence[CausalLM], codecs: Sequence[Codec], forms: Sequence[Form], unit: Unit
) -> dict[Stream, list[CacheGroup]]:
    """Layers and cache groups of several models, numbered one after the other. `unit` is what may have a length of its
    own in the first, which decodes."""
    streams: dict[Stream, list[CacheGroup]] = {}
    first_layer = first_group = 0
    for model, codec, form in zip(models, codecs, forms, strict=True):
        states = model.layer_states()
        groups = group_layers(states, codec, first_layer, split=unit != "request" and not streams)
        of_model = range(first_group, first_group + len(groups))
        streams[Stream(model, first_layer, of_model, form)] = groups
        first_layer, first_group = first_layer + len(states), first_group + len(groups)
    return streams


def check_cache_parts(config: EngineConfig, codec: Codec, selector: Selector, evictors: Mapping[str, Evictor]) -> None:
    """Raise ConfigError for a codec or a selector that stands on whole pages beside an evictor that moves slots."""
    moving = [name for name, evictor in evictors.items() if evictor.evicts]
    if codec.seal_interval and moving:
        raise ConfigError(
            f"codec={config.codec!r} seals whole pages, and evictor={moving[0]!r} moves slots out of them: load one of "
            "the two"
        )
    if selector.selects and moving:
        raise ConfigError(
            f"selector={config.selector!r} chooses among whole pages of tokens, and evictor={moving[0]!r} moves slots "
            "between them: load one of the two"
        )


def check_ranks(size: int, config: EngineConfig, states: Sequence[LayerState], selector: Selector) -> None:
    """Raise ConfigError for parts that ranks with different heads would decide differently, and for a number of ranks
    that is not the one asked for."""
    if size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}, and the engine is started on {size} ranks: start "
            "it by LLM or AsyncLLM, which start the ranks"
        )
    if size == 1:
        return
    if selector.selects:
        raise ConfigError(
            f"selector={config.selector!r} chooses pages by the keys of all heads of a layer, and with "
            f"tensor_parallel_size={size} no rank has all of them: leave one of the two out"
        )
    if any(state.kind == "fixed" for state in states):
        raise ConfigError(
            f"tensor_parallel_size is {size}, and the model has layers with fixed states, which are not divided: use "
            "tensor_parallel_size=1"
        )


def check_parity(
    config: EngineConfig,
    model: CausalLM,
    form: Form,
    evictors: Mapping[str, Evictor],
    decoders: Mapping[str, Decoder],
) -> None:
    """Raise ConfigError for parts whose results may follow from the other rows of a step."""
    place = next(model.parameters())
    types = PARITY_TYPES[place.device.type]
    if not model.parity:
        raise ConfigError(
            "parity=True, and the model was built without: load it with load_model(..., parity=True), as LLM does"
        )
    if place.dtype not in types:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise ConfigError(
            f"parity=True, and the model is in {str(place.dtype).removeprefix('torch.')}: on {place.device.type} the "
            f"order of sums is fixed for {known}; choose another dtype, or leave parity out"
        )
    if any(state.kind == "fixed" for state in model.layer_states()):
        raise ConfigError(
            "parity=True, and the model has layers with fixed states, whose order of sums is not fixed: leave parity "
            "out, or use another model"
        )
    if not form.parity:
        raise ConfigError(
            f"parity=True, and with codec={config.codec!r}, selector={config.selector!r} attention reads another table "
            "in every step, so its order of sums is not fixed: leave out codec and selector, or parity"
        )
    for name in (name for name, evictor in evictors.items() if evictor.evicts):
        raise ConfigError(
            f"parity=True, and evictor={name!r} chooses slots by sums whose order is not fixed: leave one of the "
            "two out"
        )
    for name in (name for name, decoder in decoders.items() if decoder.tree or not decoder.causal):
        raise ConfigError(
            f"parity=True, and decoder={name!r} evaluates rows that see other slots than all up to their own, "
            "for which the order of sums is not fixed: leave one of the two out"
        )
