"""The forms that Headrace writes, by the names of `headrace quantize`."""

from __future__ import annotations

from headrace.errors import ConfigError
from headrace.quantization.awq import AWQ
from headrace.quantization.base import Quantization
from headrace.quantization.fp8 import FP8Weights
from headrace.quantization.gptq import GPTQ

WHERE = "quantize"


def form_of(method: str, group_size: int = 128, *, desc_act: bool = False) -> Quantization:
    """What will be written.

    Args:
        method: "fp8" (compressed-tensors, a scale an output), "awq" (version gemm) or "gptq".
        group_size: inputs of a group, a multiple of 8, or -1 for all.
        desc_act: gptq: inputs are put into groups by their second moments.

    Raises:
        ConfigError: an argument is impossible.
    """
    if group_size != -1 and (group_size < 8 or group_size % 8):
        raise ConfigError(f"group_size is {group_size}; it must be -1 or a multiple of 8")
    if method == "fp8":
        return FP8Weights(WHERE, "channel", whole=True)
    if method == "awq":
        return AWQ(WHERE, group_size)
    if method == "gptq":
        return GPTQ(WHERE, group_size, ordered=desc_act)
    raise ConfigError(f"method is {method!r}; choose from fp8, awq, gptq")
