"""The one home of every engine option.

The command line and `LLM(...)` are both built from these dataclasses: a field's default, help text and
choices stand here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.checks import did_you_mean, names_checked, settle_types, show
from headrace.errors import ConfigError

MOST = 2**30
"""Of anything that is counted: tables on the device hold 32-bit numbers."""
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")


def option(
    default: Any, help: str, *, choices: tuple[str, ...] | None = None, metavar: str | None = None, file: bool = False
) -> Any:
    """A dataclass field that carries its own help text for the command line, where `file` allows @FILE as the value."""
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar, "file": file})


@names_checked("option", ConfigError)
@dataclass(frozen=True)
class EngineConfig:
    """Options fixed when the engine starts. Raises ConfigError for values that can never work."""

    model: str | None = option(None, "directory or hub id of the checkpoint; the bundled model if not given")
    revision: str | None = option(None, "revision of a hub id")
    tokenizer: str | None = option(None, "directory or hub id of the tokenizer, if not the model's")
    skip_tokenizer_init: bool = option(False, "token ids in and out only; no tokenizer is loaded")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "auto: the checkpoint's on a GPU, float32 on the CPU", choices=DTYPES)
    load_format: str = option("auto", "random: random weights of the right shapes", choices=("auto", "random"))
    tensor_parallel_size: int = option(
        1, "processes, on GPUs one a GPU, among which the heads and the feed-forward width of every layer are divided"
    )
    max_model_len: int | None = option(None, "longest prompt plus output in tokens; the model's own limit if not given")
    max_num_seqs: int = option(256, "most requests that hold cache at once")
    max_num_batched_tokens: int | None = option(
        None, "rows (tokens) evaluated a step; if not given, chosen by measured step times"
    )
    adapters: str | Mapping[str, str] | None = option(
        None,
        "adapters (LoRA, saved by PEFT) that requests may name: name=directory or name=hub id, separated by commas; in "
        "Python also a mapping",
    )
    max_adapters: int | None = option(
        None, "adapters that are loaded at once at most, for which memory is taken; if not given, as many as are named"
    )
    max_adapter_rank: int = option(16, "largest rank of an adapter; memory and time grow with it")
    scheduler: str = option("splitfuse", "step composer, a name from docs/systems.md")
    decoder: str = option(
        "autoregressive",
        "decoders to load, names from docs/systems.md separated by commas; the first is the default of requests",
    )
    draft_tokens: int = option(4, "tokens a speculative decoder drafts ahead at most")
    draft_model: str | None = option(None, "directory or hub id of the model that drafts (decoder draft_model)")
    evictor: str = option(
        "full",
        "evictors to load, names from docs/systems.md separated by commas; the first is the default of requests",
    )
    cache_budget: int | None = option(None, "slots (tokens) of each cache cell that a request keeps; needs an evictor")
    cache_interval: int = option(128, "tokens from one eviction to the next")
    codec: str = option("model", "what the cache holds keys and values in, a name from docs/systems.md")
    selector: str = option("all", "what rows read of the cache, a name from docs/systems.md")
    selector_budget: int | None = option(None, "older slots (tokens) that a row reads at most; needs a selector")
    page_size: int = option(16, "slots (tokens) a cache page")
    kv_cache_gib: float | None = option(
        None,
        "GiB for the cache, on each rank; if not given, a share of what is free (GPU: see gpu_memory_utilization; CPU: "
        "a fifth)",
    )
    num_pages: int | None = option(None, "pages of the cache, instead of kv_cache_gib")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory for weights, work space and cache")
    enable_prefix_caching: bool = option(True, "reuse the cache of exact common prefixes")
    cuda_graphs: bool = option(True, "on a GPU, record steps of equal shape once and replay them")
    async_scheduling: bool | None = option(
        None, "plan a step while the one before runs; if not given, on a GPU only (on the CPU there is nothing to gain)"
    )
    preemption: str = option(
        "auto",
        "how a request that gave way gets its cache back: recompute evaluates its tokens again, swap copies the cache "
        "to host memory and back, auto does what takes less time where slots were evicted or states are of a fixed "
        "size, and recomputes elsewhere",
        choices=("auto", "recompute", "swap"),
    )
    swap_space_gib: float | None = option(
        None,
        "GiB of host memory for such copies at most, on all ranks together; when they are full, requests are "
        "recomputed; 0: none are made; if not given, 4 on a GPU and 0.5 on the CPU",
    )
    seed: int = option(0, "engine seed: keys requests that bring no seed of their own")
    progress: bool | None = option(
        None, "say on stderr which stage of the start takes longer than a second; if not given, on a terminal only"
    )
    parity: bool = option(
        False,
        "sum in fixed orders, so that a result is the same bit for bit whatever runs beside it; slower, and not for "
        "every model and option",
    )
    check_invariants: bool = option(False, "audit clocks and pages after every step (slow; for debugging)")

    def __post_init__(self) -> None:
        settle_types(self, ConfigError)
        for name in ("model", "tokenizer", "draft_model", "revision"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is an empty text: give a name, or leave it out")
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ConfigError(
                f"tokenizer is {self.tokenizer!r}, but skip_tokenizer_init loads none: leave out one of the two"
            )
        for name, low, high in (
            ("tensor_parallel_size", 1, MOST),
            ("max_num_seqs", 1, MOST),
            ("page_size", 1, MOST),
            ("draft_tokens", 1, 1024),
            ("cache_interval", 1, MOST),
            ("max_model_len", 1, MOST),
            ("max_num_batched_tokens", 1, MOST),
            ("num_pages", 2, MOST),
            ("cache_budget", 1, MOST),
            ("selector_budget", 1, MOST),
            ("max_adapter_rank", 1, MOST),
            ("max_adapters", 0, MOST),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                automatic = ", or None to choose it automatically" if _default_of(type(self), name) is None else ""
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise ConfigError(f"{name} is {show(value)}; it must be {bound}{automatic}")
        named = len(self.adapter_sources)
        if self.max_adapters is not None and named > self.max_adapters:
            raise ConfigError(f"adapters names {named}, and max_adapters is {self.max_adapters}: raise it")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be in (0, 1]")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < float("inf"):
            raise ConfigError(f"kv_cache_gib is {self.kv_cache_gib}; it must be a positive number of GiB")
        if self.kv_cache_gib is not None and self.num_pages is not None:
            raise ConfigError("kv_cache_gib and num_pages both set the size of the cache: give one of them")
        for spec in dataclasses.fields(self):
            choices = spec.metadata["choices"]
            value = getattr(self, spec.name)
            if choices and value not in choices:
                hint = did_you_mean(value, choices)
                raise ConfigError(f"{spec.name} is {show(value)}{hint or ';'} choose from {', '.join(choices)}")
        if self.swap_space_gib is not None:
            if not 0 <= self.swap_space_gib < float("inf"):
                raise ConfigError(f"swap_space_gib is {self.swap_space_gib}; it must be a number of GiB, at least 0")
            if self.swap_space_gib == 0 and self.preemption == "swap":
                raise ConfigError(
                    'swap_space_gib is 0, but preemption="swap" keeps copies in host memory: give it more, or choose '
                    'preemption="recompute"'
                )
            if self.swap_space_gib and self.preemption == "recompute":
                raise ConfigError(
                    f'swap_space_gib is {self.swap_space_gib}, but preemption="recompute" makes no copies: leave it '
                    'out, or choose preemption="auto"'
                )
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed is {show(self.seed)}; it must fit into 64 bits")

    @property
    def adapter_sources(self) -> dict[str, str]:
        """Directory or hub id of each adapter to load at the start, by name. Raises ConfigError."""
        if self.adapters is not None and not isinstance(self.adapters, (str, Mapping)):
            raise ConfigError(f"adapters is {show(self.adapters)}; it must be names and directories: a dict, or a text")
        if isinstance(self.adapters, Mapping):
            pairs = [(name, str(source)) for name, source in self.adapters.items()]
        else:
            pairs = [(name.strip(), source.strip()) for name, _, source in _split(self.adapters or "")]
        for name, source in pairs:
            check_adapter_name(name)
            if not source:
                raise ConfigError(f"adapters has no directory for {name!r}: write name=directory, separated by commas")
        if len(dict(pairs)) < len(pairs):
            raise ConfigError(f"adapters names one twice: {', '.join(name for name, _ in pairs)}; give each its own")
        return dict(pairs)

    @property
    def adapter_places(self) -> int:
        """Adapters for which there is memory."""
        return len(self.adapter_sources) if self.max_adapters is None else self.max_adapters


def check_adapter_name(name: Any) -> None:
    """Raise ConfigError for what cannot be the name of an adapter."""
    if not isinstance(name, str) or not name.strip() or any(sign in name for sign in ",="):
        raise ConfigError(f"an adapter is named {name!r}; a name is text without commas and equal signs")


def _split(text: str) -> list[tuple[str, str, str]]:
    return [part.partition("=") for part in text.split(",") if part.strip()]


def _default_of(kind: type, name: str) -> Any:
    return next(spec.default for spec in dataclasses.fields(kind) if spec.name == name)
