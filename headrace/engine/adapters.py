"""The adapters that requests may name: which is loaded where, and by whom it is used.

What a request's tokens depend on is the content of its adapter, so prefix keys and records hold its digest and not its
name: under a name that is given to another adapter nothing of the old one is found.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from headrace.config import EngineConfig, check_adapter_name
from headrace.errors import AdapterError, ConfigError, RequestError
from headrace.layers.adapters import AdapterBank
from headrace.models.adapters import Adapter, check_fit, read_adapter, write_adapter
from headrace.request import Request

log = logging.getLogger("headrace")


class LoadedAdapter(NamedTuple):
    """An adapter in its place."""

    name: str
    slot: int
    """From 1; place 0 changes nothing."""
    digest: str
    rank: int
    source: str


class Adapters:
    """The loaded adapters of an engine by name.

    Args:
        bank: the room that the model was built with; None: there is none.

    Raises:
        ConfigError: the options want adapters, and the model was built without room for any.
    """

    def __init__(self, config: EngineConfig, bank: AdapterBank | None) -> None:
        if config.adapter_places and bank is None:
            raise ConfigError(
                f"max_adapters is {config.adapter_places}, but the model was built without room for adapters: load it "
                "with load_model(..., adapters=AdapterBank(max_adapters, max_adapter_rank)), as LLM does"
            )
        self.bank = bank
        self._loaded: dict[str, LoadedAdapter] = {}
        self._free = list(range(bank.max_adapters, 0, -1)) if bank else []
        for slot in self._free:
            bank.clear(slot)  # type: ignore[union-attr]  # what an engine before this one has left
        for name, source in config.adapter_sources.items():
            self.load(name, source)

    @property
    def loaded(self) -> Mapping[str, LoadedAdapter]:
        """By name, in the order of loading."""
        return dict(self._loaded)

    def load(self, name: str, adapter: str | os.PathLike[str] | Adapter) -> LoadedAdapter:
        """Read an adapter, if that has not been done, and put it into a free place.

        Raises AdapterError if the name is taken or no place is free, and what `read_adapter` and `check_fit` raise;
        nothing is changed then.
        """
        check_adapter_name(name)
        if self.bank is None or not self.bank.max_adapters:
            raise AdapterError(
                f"the adapter {name!r} cannot be loaded: this engine has room for none; start it with max_adapters=1 "
                "or more"
            )
        if name in self._loaded:
            raise AdapterError(f"an adapter {name!r} is loaded already: unload it first, or choose another name")
        if not self._free:
            raise AdapterError(
                f"max_adapters is {self.bank.max_adapters}, and as many are loaded ({', '.join(self._loaded)}): unload "
                "one first, or raise it"
            )
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter)
        check_fit(adapter, self.bank)
        write_adapter(adapter, self.bank, self._free[-1])
        loaded = LoadedAdapter(name, self._free.pop(), adapter.digest, adapter.rank, adapter.source)
        self._loaded[name] = loaded
        log.info("adapter %s: rank %d, %d linear maps", name, loaded.rank, len(adapter.pairs))
        return loaded

    def unload(self, name: str, unfinished: Iterable[Request]) -> None:
        """Give the place of an adapter back. Raises AdapterError if it is not loaded, or unfinished requests use it."""
        if name not in self._loaded:
            raise AdapterError(f"no adapter {name!r} is loaded; there are: {self._names()}")
        assert self.bank is not None
        slot = self._loaded[name].slot
        users = sorted({request.request_id for request in unfinished if request.adapter == slot})
        if users:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise AdapterError(
                f"the adapter {name!r} is used by unfinished requests ({', '.join(users[:3])}{more}): wait for their "
                "end, or abort them"
            )
        del self._loaded[name]
        self.bank.clear(slot)
        self._free.append(slot)

    def of(self, name: str | None) -> LoadedAdapter | None:
        """The adapter that a request names. Raises RequestError if it is not loaded."""
        if name is None:
            return None
        if not isinstance(name, str) or name not in self._loaded:
            raise RequestError(
                f"adapter={name!r} is not loaded; there are: {self._names()}; load it with load_adapter, or name it in "
                "the engine's adapters"
            )
        return self._loaded[name]

    def name_of(self, digest: str, wished: str | None) -> str:
        """The name of a loaded adapter with this content, the wished one if it has it. Raises RequestError."""
        names = [name for name, loaded in self._loaded.items() if loaded.digest == digest]
        if not names:
            raise RequestError(
                f"the record was made with the adapter {wished!r} of digest {digest}, which is not loaded here "
                f"({self._names()}), so the tokens would differ: load the same adapter first"
            )
        return wished if wished in names else names[0]

    def _names(self) -> str:
        return ", ".join(self._loaded) or "none"
