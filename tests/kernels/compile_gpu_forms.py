"""Compile the kernels of GPUs for one, on a machine that may have none: `python compile_gpu_forms.py`.

The interpreter runs what Python accepts; the compiler asks for more: names it knows, one type a variable. So here every
launch of the real wrappers, on tensors of the CPU, is compiled and not run. Prints the name of each kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from headrace.kernels.advance import Clocks
from headrace.kernels.advance.gpu import advance_gpu
from headrace.kernels.attention import AttentionRows
from headrace.kernels.attention import gpu as attention
from headrace.kernels.chain_rows import History
from headrace.kernels.chain_rows.gpu import chain_rows_gpu
from headrace.kernels.draw import DrawParams
from headrace.kernels.draw.gpu import draw_gpu
from headrace.kernels.rms_norm.gpu import rms_norm_gpu
from headrace.kernels.rotary.gpu import rotate_gpu_
from headrace.kernels.silu_mul.gpu import silu_mul_gpu
from headrace.step import RowTable

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands in for the launch. Integers that are 1 become constants, as in a launch."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    named = dict(zip([p.name for p in kernel.params], args, strict=False)) | options
    for i, param in enumerate(kernel.params):
        value = named[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or is_one:
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    names = {p.name for p in kernel.params}
    compile_kernel(source, target=TARGET, options={k: v for k, v in options.items() if k not in names})
    print(kernel.__name__, flush=True)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def launch_all() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for heads, width in ((1, 1), (8, 128), (1, 4096)):
            rms_norm_gpu(torch.ones(3, heads, width, dtype=dtype), torch.ones(heads, width, dtype=dtype), 1e-6)
            twice = torch.ones(3, 1, 2 * width, dtype=dtype)
            rotate_gpu_(torch.ones(3, heads, 2 * width, dtype=dtype), twice, twice)
            silu_mul_gpu(torch.ones(3, 2 * width, dtype=dtype))
    for rows, vocab, dtype, nth in ((1, 1, torch.float32, 1), (3, 5000, torch.bfloat16, ints(3))):
        filters = DrawParams(torch.ones(rows), ints(rows), torch.ones(rows), torch.zeros(rows))
        logits = torch.zeros(rows, vocab, dtype=dtype)
        draw_gpu(logits, filters, ints(rows, 2), ints(rows), raw_MV=logits.float(), nth=nth, purpose=1)
    for n in (1, 5):
        clocks = Clocks(
            ints(n + 1),
            ints(n + 1),
            ints(n + 1),
            ints(n + 1, n),
            ints(n, n + 1),
            *map(ints, [n + 1] * 2),
            ints(n + 1, n),
        )
        advance_gpu(clocks, torch.zeros(n, dtype=torch.int64), ints(n), ints(n), ints(n, n))
        rows_of_step = RowTable.allocate(n, n, n, n, torch.device("cpu"))
        history = History(ints(n + 1, n), ints(n + 1), ints(n + 1))
        chain_rows_gpu(rows_of_step, history, torch.zeros(n, dtype=torch.int64), ints(n))

    for dtype, bits, splits in ((torch.bfloat16, None, 1), (torch.float32, ints(3), 64)):
        launch_attention(dtype, bits, splits)


def launch_attention(dtype: torch.dtype, bits_R: torch.Tensor | None, programs: int) -> None:
    attention.PROGRAMS_A_PROCESSOR = programs
    rows = AttentionRows(*(ints(3) for _ in range(5)), ints(3), ints(2), bits_R, bits_R)
    pool = torch.zeros(2, 9, 16, 64, dtype=dtype)
    plain: dict[str, Any] = {"scale": 0.1}
    wide = {"window": 9, "softcap": 5.0, "sinks_H": torch.zeros(4), "need_lse": True}
    for options in (plain, plain | wide):
        attention.attend(torch.zeros(3, 4, 64, dtype=dtype), rows, pool, pool, ints(5, 60), ints(5), **options)
    attention.write_kv(torch.zeros(3, 2, 64, dtype=dtype), torch.zeros(3, 2, 64), pool, pool, ints(3).long())


if __name__ == "__main__":
    JITFunction.run = compile_launch
    launch_all()
