"""GPTQ (Frantar et al., arXiv 2210.17323): 4-bit codes with zeros and scales by groups of inputs, in any order.

    w_en = (code_en - zero_gn) * scale_gn,   g = g_idx[e]

`qweight` int32 [E / 8, N] holds eight inputs a word, `qzeros` int32 [G, N / 8] eight outputs a word, both from bit 0
on; `scales` [G, N]; `g_idx` [E]. With `checkpoint_format` "gptq" the words of zeros have been lowered by 0x11111111,
one subtraction for the whole word with its borrows; with "gptq_v2" they are as they are. With `desc_act` the inputs of
a group are not neighbours: they are sorted by group when they are loaded, and x is sorted at every product. Letters:
E inputs, N outputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError
from headrace.kernels.project_int4.reference import CODES, pack_int4, unpack_int4
from headrace.quantization.base import FORMS, Quantization, Settings, WeightStore, named
from headrace.quantization.int4 import Int4Store, pack_last, unpack_last
from headrace.quantization.round import round_int4

COLUMNS = tuple(range(CODES))
LOWERED = 0x11111111
# How the weights were found, and how another engine should run them. What was done about the order of the inputs is
# in g_idx.
INERT = frozenset(
    "quant_method bits sym desc_act static_groups true_sequential damp_percent damp_auto_increment model_name_or_path "
    "model_file_base_name meta batch_size block_name_to_quantize cache_block_outputs dataset exllama_config "
    "max_input_length module_name_preceding_first_block pad_token_id tokenizer use_cuda_fp16 use_exllama "
    "disable_exllama backend act_group_aware mse model_seqlen offload_to_disk offload_to_disk_path "
    "hyb_act".split()
)


class GPTQStore(Int4Store):
    """Weights as GPTQ packs them, whose words are the engine's where no inputs have to be sorted."""

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int],
        inputs: int,
        group: int,
        device: torch.device,
        where: str,
        lowered: int,
    ) -> None:
        super().__init__(names, widths, inputs, group, where, inputs_by_8=True)
        outputs, self.lowered = sum(widths), lowered
        self.qweight_WN = self._empty(inputs // CODES, outputs, dtype=torch.int32, device=device)
        self.qzeros_GM = self._empty(self.groups, outputs // CODES, dtype=torch.int32, device=device)
        self.raw_scales_GN = self._empty(self.groups, outputs, dtype=torch.float32, device=device)
        self.g_idx_PE = self._empty(len(self.names), inputs, dtype=torch.int32, device=device)

    def tensors(self) -> dict[str, list[Tensor]]:
        """See WeightStore."""
        found = {}
        for p, (name, start, end) in enumerate(self.spans):
            found[f"{name}.qweight"] = [self.qweight_WN.data[:, start:end]]
            found[f"{name}.qzeros"] = [self.qzeros_GM.data[:, start // CODES : end // CODES]]
            found[f"{name}.scales"] = [self.raw_scales_GN.data[:, start:end]]
            found[f"{name}.g_idx"] = [self.g_idx_PE.data[p]]
        return found

    def loaded(self) -> None:
        """See WeightStore."""
        ordinary_E = torch.arange(self.inputs, device=self.g_idx_PE.device) // self.group
        orders = []
        for (name, _, _), g_idx_E in zip(self.spans, self.g_idx_PE, strict=True):
            sorted_E, order_E = g_idx_E.sort(stable=True)
            if not torch.equal(sorted_E, ordinary_E.int()):
                raise CheckpointError(
                    f"{name}.g_idx does not put {self.group} inputs into each of {self.groups} groups: fetch the "
                    "checkpoint again, or correct group_size in config.json"
                )
            orders.append(order_E)
        words_WN = self.qweight_WN.data
        if not torch.equal(self.g_idx_PE, ordinary_E.int().expand_as(self.g_idx_PE)):
            same = all(torch.equal(order, orders[0]) for order in orders)
            kept = torch.stack(orders[:1] if same else orders).int()
            self.orders_PE = nn.Parameter(kept, requires_grad=False)
            for order, (_, start, end) in zip(orders, self.spans, strict=True):
                codes_EB = unpack_int4(words_WN[:, start:end], self.inputs)
                words_WN[:, start:end] = pack_int4(codes_EB[order])
        zeros_GN = unpack_last(self.qzeros_GM.data + self.lowered, COLUMNS)
        self._finish(words_WN, zeros_GN, self.raw_scales_GN.data)
        del self.qweight_WN, self.qzeros_GM, self.raw_scales_GN, self.g_idx_PE


@dataclass(frozen=True)
class GPTQ(Quantization):
    """The settings of a GPTQ checkpoint."""

    group: int = 128
    lowered: int = LOWERED
    """What the words of zeros were lowered by."""
    inside: tuple[str, ...] = ()
    """Names, below a block's, of the modules that are quantised; empty: all linear maps of the blocks."""

    ordered: bool = False
    """Whether inputs are put into groups by their second moments, where weights are written (`desc_act`)."""

    method = "gptq"

    def covers(self, name: str) -> bool:
        """See Quantization."""
        return name != "lm_head" and (not self.inside or named(name, self.inside, whole=False))

    def make(self, names: Sequence[str], widths: Sequence[int], inputs: int, device: torch.device) -> WeightStore:
        """See Quantization."""
        return GPTQStore(names, widths, inputs, self.group, device, self.where, self.lowered)

    def pack(self, weight_NE: Tensor, moments_EE: Tensor | None = None) -> dict[str, Tensor]:
        """See Quantization. Symmetric; inputs are ordered if `ordered` and there are moments to order them by."""
        group = weight_NE.shape[1] if self.group == -1 else self.group
        made = round_int4(weight_NE, group, symmetric=True, moments_EE=moments_EE, ordered=self.ordered)
        return {
            "qweight": pack_int4(made.codes_EN),
            "qzeros": pack_last(made.zeros_GN, COLUMNS) - self.lowered,
            "scales": made.scales_GN,
            "g_idx": made.g_idx_E,
        }

    def describe(self) -> dict[str, Any]:
        """See Quantization."""
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.group,
            "desc_act": self.ordered,
            "sym": True,
            "checkpoint_format": "gptq" if self.lowered else "gptq_v2",
            "lm_head": False,
            "modules_in_block_to_quantize": [list(self.inside)] if self.inside else None,
        }


@FORMS.register(
    "gptq",
    label="lossy",
    summary="4-bit weights with zeros and scales by groups of inputs, in any order; the loss is the checkpoint's",
    source="Frantar et al., arXiv 2210.17323",
    composes="everything but experts; bits 4, checkpoint_format gptq or gptq_v2",
    example={},
)
def read_gptq(settings: Settings) -> GPTQ:
    """The settings in `quantization_config`. Raises UnsupportedModelError."""
    settings.only("bits", 4)
    formats = "'gptq' or 'gptq_v2'"
    for key in ("checkpoint_format", "format"):
        if settings.get(key, "gptq") not in ("gptq", "gptq_v2"):
            raise settings.refuse(key, formats)
    if {settings.get("checkpoint_format", settings.get("format")), settings.get("format")} == {"gptq", "gptq_v2"}:
        raise settings.refuse("format", f"the value of checkpoint_format, {settings.get('checkpoint_format')!r}")
    stored = settings.get("checkpoint_format", settings.get("format", "gptq"))
    settings.only("is_marlin_format", False, default=False)
    settings.only("lm_head", False, default=False)
    settings.only("pack_dtype", "int32", default="int32")
    for key in ("dynamic", "rotation", "adapter"):
        if settings.get(key):
            raise settings.refuse(key, "no such entry")
    group = settings.group_size(default=128)
    inside = settings.get("modules_in_block_to_quantize", [])
    flat: list[Any] = [None]
    if isinstance(inside, list):
        flat = [name for part in inside for name in (part if isinstance(part, list) else [part])]
    if not all(isinstance(name, str) for name in flat):
        raise settings.refuse("modules_in_block_to_quantize", "lists of names")
    settings.finish(INERT)
    return GPTQ(settings.where, group, LOWERED if stored == "gptq" else 0, tuple(flat))
