"""silu(gate) * up on a GPU: what `reference.py` defines, in one pass.

With e = exp(-|x|), silu(x) = x / (1 + e) for x > 0 and x e / (1 + e) otherwise: no overflow, and NaN where x is NaN or
-inf, as in torch. Letters: R rows, F feed-forward width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.kernels.gpu_runtime import begin, tl, triton
from headrace.kernels.gpu_sizes import next_power, overlaps

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernel knows."""
_BLOCK = 1024
"""Results of a program."""


@triton.jit
def _silu_mul(gate_up_R2F, out_RF, width, row_stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i_F = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = i_F < width
    gate_at = gate_up_R2F + row * row_stride + i_F
    x_F = tl.load(gate_at, mask=here, other=0.0).to(tl.float32)
    up_F = tl.load(gate_at + width, mask=here, other=0.0).to(tl.float32)
    e_F = tl.exp(-tl.abs(x_F))
    element = out_RF.dtype.element_ty
    silu_F = (x_F * tl.where(x_F > 0.0, 1.0, e_F) / (1.0 + e_F)).to(element).to(tl.float32)
    tl.store(out_RF + row * width + i_F, (silu_F * up_F).to(element), mask=here)


def silu_mul_gpu(gate_up_R2F: Tensor) -> Tensor:
    """See `headrace.kernels.silu_mul.silu_mul`, which has checked the shape. A type of `TYPES`."""
    if gate_up_R2F.stride(1) != 1:
        gate_up_R2F = gate_up_R2F.contiguous()
    rows, columns = gate_up_R2F.shape
    width = columns // 2
    out_RF = gate_up_R2F.new_empty((rows, width))
    if out_RF.numel():
        block = min(next_power(width), _BLOCK)
        _silu_mul[(rows, -(-width // block))](
            gate_up_R2F,
            out_RF,
            width,
            gate_up_R2F.stride(0),
            BLOCK=block,
            OVERLAP=overlaps(out_RF.device),
            launch_pdl=overlaps(out_RF.device),
            num_warps=min(max(block // 256, 1), 4),
        )
    return out_RF
