"""What every stored form of weights is: a reader of `quantization_config`, and stores of linear maps.

Letters: R rows, E inputs, N outputs, P projections of a linear map.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.errors import UnsupportedModelError
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from headrace.registry import Registry

KEY = "quantization_config"


class Settings:
    """Typed access to `quantization_config` (or a part of it) that remembers what was read."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The raw entry; the default where it is missing or null."""
        self._read.add(key)
        value = self.raw.get(key)
        return default if value is None else value

    def refuse(self, key: str, must: str) -> UnsupportedModelError:
        """The error for an entry whose value cannot be used."""
        return UnsupportedModelError(
            f"{self.where}.{key} is {self.raw.get(key)!r}; implemented: {must}: use a checkpoint that is quantised so, "
            "or one with float32, bfloat16 or float16 weights"
        )

    def only(self, key: str, *known: Any, default: Any = None) -> Any:
        """An entry for which few values are implemented; missing counts as the default."""
        value = self.get(key, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known):
            raise self.refuse(key, " or ".join(map(repr, known)))
        return value

    def group_size(self, *, default: int) -> int:
        """Inputs of a group, a multiple of 8; -1: all inputs."""
        size = self.get("group_size", default)
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and (size < 8 or size % 8)):
            raise self.refuse("group_size", "-1 and multiples of 8")
        return size

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names of modules."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refuse(key, "a list of names")
        try:
            for name in value:
                re.compile(name.removeprefix("re:") if name.startswith("re:") else "")
        except re.error as error:
            raise self.refuse(key, f"regular expressions behind 're:' ({error})") from error
        return tuple(value)

    def part(self, key: str) -> Settings:
        """An entry that is an object."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return Settings(value, f"{self.where}.{key}")

    def finish(self, inert: Iterable[str]) -> None:
        """Refuse entries that nobody read, that are not known to change nothing, and that are not switched off."""
        left = {key: value for key, value in self.raw.items() if key not in self._read and key not in inert and value}
        if left:
            listed = ", ".join(f"{key} = {value!r}"[:80] for key, value in left.items())
            raise UnsupportedModelError(
                f"{self.where}: {listed}: not implemented for this form; if the weights do not depend on it, remove it "
                "from the file"
            )


def named(name: str, patterns: Iterable[str], *, whole: bool) -> bool:
    """Whether a list of modules in a configuration names this one.

    A pattern "re:..." matches from the beginning of the name; any other is the whole name, or, unless `whole`, some of
    the parts between its dots: "mlp.gate" is in "layers.0.mlp.gate", and not in "layers.0.mlp.gate_proj".
    """
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern.removeprefix("re:"), name):
                return True
        elif pattern == name or (not whole and f".{pattern.strip('.')}." in f".{name}."):
            return True
    return False


class WeightStore(nn.Module, ABC):
    """The weights of one linear map of several projections, in a form.

    Args:
        names: checkpoint names of the projections.
        widths: outputs of each.
        inputs: E.
    """

    def __init__(self, names: Sequence[str], widths: Sequence[int], inputs: int) -> None:
        super().__init__()
        self.names, self.widths, self.inputs = tuple(names), tuple(widths), inputs

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """Each projection's name, first output, and the output behind its last."""
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths))]
        return [(name, end - width, end) for name, width, end in zip(self.names, self.widths, ends, strict=True)]

    @abstractmethod
    def tensors(self) -> dict[str, list[Tensor]]:
        """Where the checkpoint's tensors go; see `CausalLM.tensors`. Valid until `loaded` is called."""

    @abstractmethod
    def loaded(self) -> None:
        """All tensors are in their places: check them, and rearrange them for the kernels.

        Raises CheckpointError, naming the projection, for values that no weights can have.
        """

    @abstractmethod
    def multiply(self, x_RE: Tensor) -> Tensor:
        """x W^T, a new tensor [R, N] of the type of x."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All weights as numbers, float32 [N, E]: what the store stands for, for tests and tools."""

    def project(
        self, x_RE: Tensor, bias_N: Tensor | None, *, norm: tuple[Tensor, float] | None = None, gated: bool = False
    ) -> Tensor:
        """As `headrace.kernels.project.project`."""
        if norm is not None:
            x_RE = rms_norm(x_RE, *norm)
        y_RN = self.multiply(x_RE)
        if bias_N is not None:
            y_RN += bias_N
        return silu_mul(y_RN) if gated else y_RN

    def project_onto(self, y_RN: Tensor, x_RE: Tensor, bias_N: Tensor | None) -> None:
        """As `headrace.kernels.project.project_onto`."""
        y_RN += self.multiply(x_RE)
        if bias_N is not None:
            y_RN += bias_N

    def _empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


@dataclass(frozen=True)
class Quantization(ABC):
    """What `quantization_config` says, for one form."""

    where: str
    """The file and the entry, for messages."""

    method = ""
    """The value of `quant_method`."""

    @abstractmethod
    def covers(self, name: str) -> bool:
        """Whether the weights of this linear map, by its checkpoint name, are in the form."""

    @abstractmethod
    def make(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> WeightStore:
        """The store of a linear map. Raises UnsupportedModelError for shapes that the form cannot have."""

    def unused(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is rightly there and not needed."""
        return False

    def pack(self, weight_NE: Tensor, moments_EE: Tensor | None = None) -> dict[str, Tensor]:
        """The checkpoint's tensors for a dense weight, by their names behind the module's.

        Args:
            weight_NE: float [N, E].
            moments_EE: second moments of its inputs, for forms that round by them; see `round_int4`.

        Raises:
            UnsupportedModelError: this form is read only, or cannot have such a shape.
        """
        raise UnsupportedModelError(f"{self.where}: weights in the form {self.method!r} are read, and not written")

    def describe(self) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint that `pack` has written."""
        raise UnsupportedModelError(f"{self.where}: weights in the form {self.method!r} are read, and not written")

    def store(
        self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device
    ) -> WeightStore | None:
        """The store of a linear map, or None where its weights are dense.

        Raises:
            UnsupportedModelError: only some of its projections are in the form.
        """
        covered = [name for name in names if self.covers(name)]
        if not covered:
            return None
        if len(covered) < len(names):
            dense = ", ".join(name for name in names if name not in covered)
            raise UnsupportedModelError(
                f"{self.where} has {', '.join(covered)} quantised and {dense} not; projections that are computed as "
                "one product need one form: quantise all of them, or none"
            )
        return self.make(names, widths, inputs, device)


FORMS: Registry[Quantization] = Registry("weight form", "quantization_config.quant_method")


def read_quantization(raw: Any, where: str) -> Quantization | None:
    """What config.json's `quantization_config` says; None: nothing.

    Raises:
        UnsupportedModelError: the method, or an option of it, is not implemented.
    """
    if not raw:
        return None
    settings = Settings(raw if isinstance(raw, dict) else {"quant_method": raw}, f"{where}: {KEY}")
    method = settings.get("quant_method", "unknown")
    if method not in FORMS.names():
        raise UnsupportedModelError(
            f"{settings.where} names method {method!r}; implemented: {', '.join(FORMS.names())}: use a checkpoint "
            "of one of these, or one with float32, bfloat16 or float16 weights"
        )
    return FORMS[method].make(settings)
