"""AWQ (Lin et al., arXiv 2306.00978), version "gemm": 4-bit codes with zeros and scales by groups of inputs.

    w_en = (code_en - zero_gn) * scale_gn

`qweight` int32 [E, N / 8] and `qzeros` int32 [G, N / 8] hold eight outputs a word, from bit 0 on those of the columns
0, 2, 4, 6, 1, 3, 5, 7; `scales` [G, N]. Modules in `modules_to_not_convert` and the head are dense. Letters: E inputs,
N outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.errors import UnsupportedModelError
from headrace.kernels.project_int4.reference import CODES, pack_int4
from headrace.quantization.base import FORMS, Quantization, Settings, WeightStore, named
from headrace.quantization.int4 import Int4Store, pack_last, unpack_last
from headrace.quantization.round import round_int4

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of each code of a word, from bit 0 on."""
# How the weights were found, and how another engine should run them.
INERT = frozenset(
    "quant_method backend do_fuse fuse_max_seq_len modules_to_fuse exllama_config version pack_dtype meta "
    "calib_data calib_samples duo_scaling apply_clip damp_percent".split()
)


class AWQStore(Int4Store):
    """Weights as AWQ packs them. `loaded` turns the words so that they hold eight inputs."""

    def __init__(
        self, names: Sequence[str], widths: Sequence[int], inputs: int, group: int, device: torch.device, where: str
    ) -> None:
        super().__init__(names, widths, inputs, group, where, inputs_by_8=False)
        if inputs % self.group:
            raise UnsupportedModelError(
                f"{where}.group_size is {group}, which does not divide the {inputs} inputs of {names[0]}: leave the "
                "module out when quantising, or use another group size"
            )
        outputs = sum(widths)
        self.qweight_EM = self._empty(inputs, outputs // CODES, dtype=torch.int32, device=device)
        self.qzeros_GM = self._empty(self.groups, outputs // CODES, dtype=torch.int32, device=device)
        self.raw_scales_GN = self._empty(self.groups, outputs, dtype=torch.float32, device=device)

    def tensors(self) -> dict[str, list[Tensor]]:
        """See WeightStore."""
        found = {}
        for name, start, end in self.spans:
            columns = slice(start // CODES, end // CODES)
            found[f"{name}.qweight"] = [self.qweight_EM.data[:, columns]]
            found[f"{name}.qzeros"] = [self.qzeros_GM.data[:, columns]]
            found[f"{name}.scales"] = [self.raw_scales_GN.data[:, start:end]]
        return found

    def loaded(self) -> None:
        """See WeightStore."""
        words_WN = pack_int4(unpack_last(self.qweight_EM, COLUMNS))
        self._finish(words_WN, unpack_last(self.qzeros_GM, COLUMNS), self.raw_scales_GN.data)
        del self.qweight_EM, self.qzeros_GM, self.raw_scales_GN


@dataclass(frozen=True)
class AWQ(Quantization):
    """The settings of an AWQ checkpoint."""

    group: int = 128
    dense: tuple[str, ...] = ()

    method = "awq"

    def covers(self, name: str) -> bool:
        """See Quantization."""
        return not named(name, (*self.dense, "lm_head"), whole=False)

    def make(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> WeightStore:
        """See Quantization."""
        return AWQStore(names, widths, inputs, self.group, device, self.where)

    def pack(self, weight_NE: Tensor, moments_EE: Tensor | None = None) -> dict[str, Tensor]:
        """See Quantization. Zeros lie where a group's range asks for them; no scales of activations are searched."""
        group = weight_NE.shape[1] if self.group == -1 else self.group
        made = round_int4(weight_NE, group, symmetric=False, moments_EE=moments_EE)
        return {
            "qweight": pack_last(made.codes_EN, COLUMNS),
            "qzeros": pack_last(made.zeros_GN, COLUMNS),
            "scales": made.scales_GN,
        }

    def describe(self) -> dict[str, Any]:
        """See Quantization."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.dense),
        }


@FORMS.register(
    "awq",
    label="lossy",
    summary="4-bit weights with zeros and scales by groups of inputs; the loss is the checkpoint's",
    source="Lin et al., arXiv 2306.00978",
    composes="everything but experts; bits 4, version gemm, zero_point true",
    example={},
)
def read_awq(settings: Settings) -> AWQ:
    """The settings in `quantization_config`. Raises UnsupportedModelError."""
    settings.only("bits", 4, default=4)
    version = settings.get("version", settings.get("format", "gemm"))
    if str(version).lower() != "gemm":
        raise settings.refuse("version" if settings.get("version") is not None else "format", "'gemm'")
    settings.only("zero_point", True, default=True)
    settings.only("sym", False, default=False)
    settings.only("desc_act", False, default=False)
    settings.only("lm_head", False, default=False)
    group = settings.group_size(default=128)
    dense = settings.names("modules_to_not_convert")
    settings.finish(INERT)
    return AWQ(settings.where, group, dense)
