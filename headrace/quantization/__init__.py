"""Forms in which checkpoints store the weights of linear maps other than as floating-point numbers of full width.

A form is one file and one registration in `FORMS`, by the `quant_method` of `quantization_config` in config.json. It
reads that entry, refusing what it does not implement, says which linear maps it covers, and makes their stores
(`WeightStore`): which checkpoint tensors go where, and the product. The weights stay in their form in memory; only the
loss of the checkpoint itself remains.
"""

from __future__ import annotations

import headrace.quantization.awq
import headrace.quantization.fp8
import headrace.quantization.gptq  # noqa: F401
from headrace.quantization.base import FORMS, Quantization, Settings, WeightStore, read_quantization

__all__ = ["FORMS", "Quantization", "Settings", "WeightStore", "read_quantization"]
