"""Every error a caller can meet. A message names the thing, the value, the limit and the way out."""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(HeadraceError, ValueError):
    """An option, or a combination of options, that cannot work. Raised at start, before a model is loaded."""


class UnsupportedModelError(ConfigError):
    """The checkpoint asks for an architecture, or a variant of one, that no registered family implements."""


class CheckpointError(HeadraceError):
    """The checkpoint's files are missing, damaged, or contradict its configuration."""


class AdapterError(HeadraceError, ValueError):
    """An adapter that cannot be loaded or unloaded as things stand: its name, its rank, its place, or who uses it."""


class TokenizerError(HeadraceError):
    """The tokenizer's files are missing or cannot do what was asked of them."""


class RequestError(HeadraceError, ValueError):
    """A request that can never be served: bad parameters, bad tokens, too long. Other requests are undisturbed."""


class UnknownModelError(RequestError):
    """A request names a model that is not served here."""


class ToolCallError(HeadraceError):
    """An output holds a tool call that cannot be read, such as one that was cut off."""


class CapacityError(HeadraceError):
    """More memory was asked for than there is."""


class QueueFullError(HeadraceError):
    """As many requests are unfinished as may be; nothing was queued. Come again, or wait for room."""


class EngineDeadError(HeadraceError):
    """The engine behind an interface has stopped: it failed (see `__cause__`) or was shut down."""


class NumericalError(HeadraceError):
    """The model produced logits that no token can be drawn from (NaN, or nothing finite)."""


class OutputError(HeadraceError):
    """What was made could not be written: the disk is full, or the file was taken away."""


class InvariantError(HeadraceError):
    """The engine's books do not balance. Always a bug of the engine, never of the caller."""
