"""What comes in: prompts with parameters, and records, become requests, or are refused with a sentence.

Nothing is queued here. What a request has beyond its parameters follows from them and from the engine's parts alone, so
that a record can be resumed in another engine of the same kind.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from headrace.checks import show, whole_number
from headrace.config import EngineConfig
from headrace.engine.adapters import Adapters
from headrace.engine.assembly import Parts
from headrace.errors import RequestError
from headrace.eviction.base import budget_of
from headrace.kernels.draw import stream_key
from headrace.models.base import CausalLM
from headrace.params import SamplingParams
from headrace.request import Request, check_record
from headrace.sampling.processors import LogitProcessor
from headrace.tables import MAX_STOP_IDS


class Intake:
    """Checks what is asked of an engine, and derives what follows from it.

    Args:
        config: the engine's options.
        model: the model that decodes.
        parts: the engine's.
        processors: all that may change logits.
        adapters: those that requests may name.
        eos_ids: tokens that end an output unless its parameters say otherwise.
        max_model_len: tokens of the longest request.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: CausalLM,
        parts: Parts,
        processors: Sequence[LogitProcessor],
        adapters: Adapters,
        eos_ids: Sequence[int],
        max_model_len: int,
    ) -> None:
        self.config, self.model, self.parts = config, model, parts
        self.processors, self.adapters, self.eos_ids = processors, adapters, tuple(eos_ids)
        self.vocab_size, self.max_model_len = model.config.vocab_size, max_model_len

    @cached_property
    def model_law(self) -> str:
        """The model that tokens come from, as far as its configuration tells: weights are not compared."""
        said = {name: value for name, value in vars(self.model.config).items() if name != "dtype"}
        digest = hashlib.sha256(repr(sorted(said.items())).encode()).hexdigest()[:12]
        layers = len(self.model.layer_states())
        kind = said.get("model_type", "a model")
        return f"{kind} with {layers} layers and {self.vocab_size} tokens, configuration {digest}"

    @property
    def cache_law(self) -> str:
        """The options of the cache that tokens depend on."""
        config, selects = self.config, self.parts.selector.selects
        law = f"codec={config.codec!r}, selector={config.selector!r}"
        if selects:
            law += f", selector_budget={config.selector_budget}"
        # What is sealed or selected is whole pages.
        return f"{law}, page_size={config.page_size}" if selects or self.parts.codec.seal_interval else law

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The tokens of a prompt that could be served with these parameters. Raises RequestError for one that never
        can; queues nothing."""
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling parameters are {show(params)}: give a SamplingParams(...)")
        tokens = self._checked_prompt(prompt_ids, params)
        self._derived(params, len(tokens), 0, 0)
        return tokens

    def request(self, tokens: Sequence[int], params: SamplingParams, seed: int, sample: int, **fields: Any) -> Request:
        """One sample of a checked prompt. `fields` are others of the request."""
        return Request(
            prompt_len=len(tokens),
            tokens=list(tokens),
            params=params,
            seed=seed,
            sample=sample,
            **fields,
            **self._derived(params, len(tokens), seed, sample),
        )

    def check_record(self, record: Mapping[str, Any]) -> SamplingParams:
        """The parameters of a record. Raises RequestError for one that is damaged, or was taken with another model."""
        params = check_record(record)
        if record["model_law"] != self.model_law:
            raise RequestError(
                f"the record was taken with {show(record['model_law'])}, and this engine runs {self.model_law}: resume "
                "it with the same model"
            )
        return params

    def resumed(self, record: dict[str, Any], params: SamplingParams) -> Request:
        """The request of a record that has passed `check_record`. Raises RequestError if it would have other tokens
        here, or has ended."""
        if record.get("adapter") is not None:
            params = replace(params, adapter=self.adapters.name_of(record["adapter"], params.adapter))
            record = {**record, "params": params.to_dict()}
        evictor, budget, exact_len = record["eviction"]
        if record["cache_law"] != self.cache_law:
            raise RequestError(
                f"the record's cache is kept with {record['cache_law']}, here with {self.cache_law}, so the tokens "
                "would differ: use an engine with the same options"
            )
        derived = self._derived(
            params,
            record["prompt_len"],
            record["seed"],
            record["sample"],
            evictor=evictor,
            cache_budget=budget or None,
            output_ids=record["tokens"][record["prompt_len"] :],
        )
        if derived["exact_len"] != exact_len:
            raise RequestError(
                f"the record's cache is first compacted at token {exact_len}, here at {derived['exact_len']}, so the "
                "tokens would differ: use an engine with the same cache_interval; "
                f"here it is {self.config.cache_interval}"
            )
        request = Request.from_record(record, **derived)
        self._check_whole(request)
        return request

    def _check_whole(self, request: Request) -> None:
        """Raise RequestError unless a request from a record could have got where it stands in this engine."""
        # The prompt was cut, if at all, before the record was taken.
        params = replace(request.params, truncate_prompt_tokens=None)
        self._checked_prompt(request.tokens[: request.prompt_len], params)
        if request.output_ids:
            _check_ids(request.output_ids, self.vocab_size, "the record's output")
        if not set(request.output_ids).isdisjoint(request.stop_ids):
            raise RequestError("the record's output holds a stop token, so the request has ended: nothing to resume")
        if request.n_tok > request.limit or (request.output_ids and request.n_tok == request.limit):
            raise RequestError(
                f"the record has {len(request.output_ids)} output tokens of {request.limit - request.prompt_len} that "
                "its parameters and this engine allow: there is nothing to resume"
            )

    def _derived(
        self,
        params: SamplingParams,
        prompt_len: int,
        seed: int,
        sample: int,
        *,
        evictor: str | None = None,
        cache_budget: int | None = None,
        output_ids: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Fields of a request that follow from the parameters and this engine.

        `evictor`, `cache_budget` and `output_ids` are what a record settled; without them the parameters ask.
        """
        stops = dict.fromkeys(self.stop_ids(params))
        if len(stops) > MAX_STOP_IDS:
            raise RequestError(
                f"stop_token_ids: {len(stops)} stop ids with the model's own; at most {MAX_STOP_IDS}: pass fewer"
            )
        self.prepare(params, output_ids)
        room = self.max_model_len - prompt_len
        names = list(self.parts.decoders)
        decoder = params.decoder or names[0]
        if decoder not in self.parts.decoders:
            raise RequestError(
                f"decoder={decoder!r} is not loaded; this engine has {', '.join(names)}: name it in its decoder option"
            )
        asked = (evictor, cache_budget) if evictor else (params.evictor, params.cache_budget)
        name, budget = budget_of(self.parts.evictors, *asked, self.config.cache_budget)
        exact_len = self.parts.evictors[name].next_trigger(prompt_len, 0, budget)
        if self.parts.selector.selects:  # later rows pass over parts of the cache
            exact_len = min(exact_len, prompt_len)
        adapter = self.adapters.of(params.adapter)
        # Requests with another decoder may lack the cache of this decoder's own models; with another adapter, all.
        salt = decoder.encode() if self.parts.decoders[decoder].models else b""
        if adapter is not None:
            salt += b"\0" + adapter.digest.encode()
        return {
            "evictor": name,
            "cache_law": self.cache_law,
            "model_law": self.model_law,
            "cache_budget": budget,
            "exact_len": exact_len,
            "decoder": decoder,
            "adapter": adapter.slot if adapter else 0,
            "adapter_digest": adapter.digest if adapter else None,
            "salt": salt,
            "stream": stream_key(seed, sample),
            "stop_ids": tuple(stops),
            "limit": prompt_len + min(room, room if params.max_tokens is None else params.max_tokens),
        }

    def stop_ids(self, params: SamplingParams) -> list[int]:
        """Token ids that end a request with these parameters."""
        return list(dict.fromkeys([*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos_ids)]))

    def prepare(self, params: SamplingParams, output_ids: Sequence[int] = ()) -> None:
        """Make what a request with these parameters needs and what takes long, as grammars do. `add` and `resume` do it
        too; whoever must not wait there does it before, in any thread. Raises RequestError for what cannot be done."""
        for processor in self.processors:
            if processor.wants(params):
                processor.prepare(params, self.stop_ids(params), output_ids)

    def _checked_prompt(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        params.check_vocabulary(self.vocab_size)
        tokens = as_ids(prompt_ids)
        if params.truncate_prompt_tokens is not None:
            tokens = tokens[-params.truncate_prompt_tokens :]
        if not tokens:
            raise RequestError("the prompt is empty; a model needs at least one token to continue from")
        _check_ids(tokens, self.vocab_size, "the prompt")
        longest = self.max_model_len - (params.max_tokens != 0)
        if len(tokens) > longest:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; at most {longest} leave room for output in a length of "
                f"{self.max_model_len}: shorten it, pass truncate_prompt_tokens={longest}, or raise max_model_len"
            )
        return tokens


def as_ids(prompt_ids: Sequence[int]) -> list[int]:
    """A list of their own as plain ints, of whole numbers of any library. Raises RequestError for others."""
    try:
        ids = None if isinstance(prompt_ids, (str, bytes, Mapping)) else list(prompt_ids)
    except TypeError:  # nothing to go through, or an array without dimensions
        ids = None
    if ids is None:
        raise RequestError(f"prompt_token_ids is {show(prompt_ids)}; it must be a list of token ids")
    if set(map(type, ids)) <= {int}:
        return ids
    tokens: list[int] = []
    for place, value in enumerate(ids):
        token = whole_number(value)
        if token is None:
            raise RequestError(f"the prompt has {show(value)} at place {place}; token ids are whole numbers from 0")
        tokens.append(token)
    return tokens


def _check_ids(tokens: Sequence[int], vocab_size: int, what: str) -> None:
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(t for t in tokens if not 0 <= t < vocab_size)
        raise RequestError(
            f"{what} has token id {show(wrong)}; the model's vocabulary has {vocab_size} tokens: use ids from 0 to "
            f"{vocab_size - 1}"
        )


def check_urgency(priority: int, deadline_s: float | None) -> None:
    """Raise RequestError unless priority is a whole number and the deadline a positive number of seconds."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority is {show(priority)}; it must be a whole number, and the lower one goes first")
    if deadline_s is None:
        return
    number = isinstance(deadline_s, (int, float)) and not isinstance(deadline_s, bool)
    if not number or not 0.0 < deadline_s <= sys.float_info.max:
        raise RequestError(
            f"deadline_s is {show(deadline_s)}; it must be a positive number of seconds, or None for no deadline"
        )


def check_request_id(request_id: str) -> None:
    """Raise RequestError unless it is a text."""
    if not isinstance(request_id, str):
        raise RequestError(f"request_id is {show(request_id)}; it must be a text")
