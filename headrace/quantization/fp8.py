"""8-bit floating-point weights (E4M3, arXiv 2209.05433) with scales, in two spellings of `quantization_config`.

    w_ne = float(code_ne) * scale

"compressed-tensors" with format "float-quantized": `weight` and `weight_scale`, one a tensor [1], one an output [N, 1],
or one a block. "fp8": `weight_scale_inv` [ceil(N / 128), ceil(E / 128)], by blocks of `weight_block_size` (DeepSeek-V3,
arXiv 2412.19437), or without blocks `weight_scale`, one a tensor.

Activations keep the model's type: where the checkpoint asks for 8-bit ones, results are those of its weights without
the second rounding, and the static scales of activations (`input_scale`) are not needed. Letters: E inputs, N outputs,
G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError
from headrace.kernels.project_fp8 import FP8, project_fp8
from headrace.kernels.project_fp8.reference import dequantise_fp8
from headrace.quantization.base import FORMS, Quantization, Settings, WeightStore, named

Strategy = Literal["tensor", "channel", "block"]


class FP8Store(WeightStore):
    """Codes, and once they are loaded one scale for each output and group of inputs.

    Args:
        names, widths, inputs: see WeightStore.
        strategy: what has a scale.
        block: outputs and inputs of a block.
        suffix: of the checkpoint's scales.
        device: of the parameters.
    """

    scales_NG: nn.Parameter

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int],
        inputs: int,
        *,
        strategy: Strategy,
        block: tuple[int, int],
        suffix: str,
        device: torch.device,
    ) -> None:
        super().__init__(names, widths, inputs)
        self.strategy, self.block, self.suffix = strategy, block, suffix
        self.group = block[1] if strategy == "block" else inputs
        self.codes_NE = self._empty(sum(widths), inputs, dtype=FP8, device=device)
        # One tensor a projection: blocks of outputs begin anew with each.
        self.raw_scales = nn.ParameterList(
            self._empty(*self._scale_shape(width), dtype=torch.float32, device=device) for width in self.widths
        )

    def _scale_shape(self, width: int) -> tuple[int, ...]:
        if self.strategy == "tensor":
            return (1,)
        if self.strategy == "channel":
            return (width, 1)
        return (-(-width // self.block[0]), -(-self.inputs // self.block[1]))

    def tensors(self) -> dict[str, list[Tensor]]:
        """See WeightStore."""
        found = {}
        for (name, start, end), scales in zip(self.spans, self.raw_scales, strict=True):
            found[f"{name}.weight"] = [self.codes_NE.data[start:end]]
            found[f"{name}.{self.suffix}"] = [scales.data]
        return found

    def loaded(self) -> None:
        """See WeightStore."""
        whole = []
        for (name, start, end), scales in zip(self.spans, self.raw_scales, strict=True):
            if not scales.isfinite().all():
                raise CheckpointError(
                    f"{name}.{self.suffix} holds values that are not finite: fetch the checkpoint again"
                )
            if ((self.codes_NE[start:end].view(torch.uint8) & 0x7F) == 0x7F).any():
                raise CheckpointError(f"{name}.weight holds codes that are no numbers: fetch the checkpoint again")
            width = end - start
            if self.strategy == "block":
                whole.append(scales.repeat_interleave(self.block[0], 0)[:width])
            else:
                whole.append(scales.reshape(-1, 1).expand(width, 1))
        self.scales_NG = nn.Parameter(torch.cat(whole), requires_grad=False)
        del self.raw_scales

    def multiply(self, x_RE: Tensor) -> Tensor:
        """See WeightStore."""
        return project_fp8(x_RE, self.codes_NE, self.scales_NG, group=self.group)

    def dense(self) -> Tensor:
        """See WeightStore."""
        return dequantise_fp8(self.codes_NE, self.scales_NG, self.group)


@dataclass(frozen=True)
class FP8Weights(Quantization):
    """The settings of a checkpoint of 8-bit floats."""

    strategy: Strategy = "tensor"
    block: tuple[int, int] = (0, 0)
    suffix: str = "weight_scale"
    targets: tuple[str, ...] = ()
    """Names of modules; empty: all linear maps."""
    dense: tuple[str, ...] = ()
    whole: bool = False
    """Whether names in `dense` are whole names."""

    method = "fp8"

    def covers(self, name: str) -> bool:
        """See Quantization."""
        return not named(name, self.dense, whole=self.whole) and (
            not self.targets or named(name, self.targets, whole=True)
        )

    def make(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> WeightStore:
        """See Quantization."""
        return FP8Store(
            names, widths, inputs, strategy=self.strategy, block=self.block, suffix=self.suffix, device=device
        )

    def pack(self, weight_NE: Tensor, moments_EE: Tensor | None = None) -> dict[str, Tensor]:
        """See Quantization. To the nearest code, one scale for each output; moments are not used."""
        if self.strategy != "channel":
            return super().pack(weight_NE)
        weight_NE = weight_NE.float()
        scale_N1 = (weight_NE.abs().amax(1, keepdim=True) / torch.finfo(FP8).max).clamp(min=2.0**-100)
        return {"weight": (weight_NE / scale_N1).to(FP8), self.suffix: scale_N1}

    def describe(self) -> dict[str, Any]:
        """See Quantization."""
        if self.strategy != "channel":
            return super().describe()
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": ["lm_head", *self.dense],
        }

    def unused(self, name: str) -> bool:
        """The scales of activations."""
        return name.endswith(".input_scale")


def _read_block(settings: Settings, key: str) -> tuple[int, int]:
    value = settings.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise settings.refuse(key, "two positive numbers, of outputs and of inputs")
    return value[0], value[1]


@FORMS.register(
    "compressed-tensors",
    label="lossy",
    summary="8-bit floating-point weights, a scale a tensor, output or block; activations keep the model's type; the "
    "loss is the checkpoint's",
    source="Micikevicius et al., arXiv 2209.05433",
    composes="everything but experts; format float-quantized with 8-bit E4M3 weights",
    example={},
)
def read_compressed(settings: Settings) -> FP8Weights:
    """The settings in `quantization_config`. Raises UnsupportedModelError."""
    settings.only("format", "float-quantized", "naive-quantized", default="float-quantized")
    settings.only("quantization_status", "compressed", "frozen", default="compressed")
    if settings.get("kv_cache_scheme"):
        raise settings.refuse("kv_cache_scheme", "null (what the cache holds is the option codec)")
    sparsity = settings.part("sparsity_config")
    sparsity.only("format", "dense", default="dense")
    for key in ("transform_config", "moe_sparsity_config"):
        if settings.get(key):
            raise settings.refuse(key, "no such entry")
    groups = settings.part("config_groups")
    if len(groups.raw) != 1:
        raise settings.refuse("config_groups", f"one scheme for all linear maps, not {len(groups.raw)}")
    group = groups.part(next(iter(groups.raw)))
    group.only("format", "float-quantized", "naive-quantized", default="float-quantized")
    if group.get("output_activations"):
        raise group.refuse("output_activations", "null")
    if group.raw.get("input_activations"):
        inner = group.part("input_activations")
        inner.only("num_bits", 8)
        inner.only("type", "float")
    weights = group.part("weights")
    weights.only("num_bits", 8)
    weights.only("type", "float")
    weights.only("symmetric", True, default=True)
    weights.only("dynamic", False, default=False)
    weights.only("actorder", None)
    weights.only("scale_dtype", None, "torch.float32", "torch.bfloat16", "torch.float16")
    strategy = weights.only("strategy", "tensor", "channel", "block", default="tensor")
    block = _read_block(weights, "block_structure") if strategy == "block" else (0, 0)
    weights.finish(("observer", "observer_kwargs", "zp_dtype", "group_size", "block_structure"))
    targets = group.names("targets")
    group.finish(("input_activations",))
    dense = settings.names("ignore")
    settings.finish(("quant_method", "version", "global_compression_ratio", "run_compressed", "sparsity_config"))
    linear = not targets or "Linear" in targets
    return FP8Weights(settings.where, strategy, block, "weight_scale", () if linear else targets, dense, True)


@FORMS.register(
    "fp8",
    label="lossy",
    summary="8-bit floating-point weights, a scale a block or tensor; activations keep the model's type; the loss is "
    "the checkpoint's",
    source="DeepSeek-AI, arXiv 2412.19437",
    composes="everything but experts; fmt e4m3, scales in floating point",
    example={},
)
def read_fp8(settings: Settings) -> FP8Weights:
    """The settings in `quantization_config`. Raises UnsupportedModelError."""
    settings.only("fmt", "e4m3", default="e4m3")
    settings.only("scale_fmt", "float", default="float")
    settings.only("activation_scheme", "dynamic", "static", default="dynamic")
    if settings.get("kv_cache_scheme"):
        raise settings.refuse("kv_cache_scheme", "null (what the cache holds is the option codec)")
    settings.only("expert_dtype", "fp8", default="fp8")
    if settings.get("modules_to_convert"):
        raise settings.refuse("modules_to_convert", "no such entry")
    dense = (*settings.names("modules_to_not_convert"), *settings.names("ignored_layers"), "lm_head")
    has_blocks = settings.get("weight_block_size") is not None
    block = _read_block(settings, "weight_block_size") if has_blocks else (0, 0)
    settings.finish(("quant_method", "dequantize"))
    strategy: Strategy = "block" if has_blocks else "tensor"
    return FP8Weights(settings.where, strategy, block, "weight_scale_inv" if has_blocks else "weight_scale", (), dense)
