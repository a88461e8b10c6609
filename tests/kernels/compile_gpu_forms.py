"""Compile the kernels of GPUs for one, on a machine that may have none: `python compile_gpu_forms.py`.

The interpreter runs what Python accepts; the compiler asks for more: names it knows, one type a variable. So here every
launch of the real wrappers, on tensors that need hold nothing, is compiled and not run. Prints the name of each kernel
and the bytes of its shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import JITFunction

from headrace.kernels import gpu_sizes
from headrace.kernels.adapt import Factors
from headrace.kernels.adapt.gpu import adapt_gpu_
from headrace.kernels.advance import Advanced, Clocks
from headrace.kernels.advance.gpu import advance_gpu
from headrace.kernels.attention import AttentionRows, gpu, gpu_shape
from headrace.kernels.chain_rows import History
from headrace.kernels.chain_rows.gpu import chain_rows_gpu
from headrace.kernels.draw import DrawParams
from headrace.kernels.draw.gpu import draw_gpu
from headrace.kernels.draw_rows import DrawTables
from headrace.kernels.draw_rows.gpu import draw_rows_gpu
from headrace.kernels.experts import gpu as experts
from headrace.kernels.place.gpu import place_gpu
from headrace.kernels.project import gpu as project
from headrace.kernels.project_fixed import gpu as project_fixed
from headrace.kernels.project_fp8 import gpu as project_fp8
from headrace.kernels.project_int4 import gpu as project_int4
from headrace.kernels.report import Priced
from headrace.kernels.report.gpu import report_gpu
from headrace.kernels.rms_norm.gpu import rms_norm_gpu
from headrace.kernels.rotary.gpu import rotate_gpu_
from headrace.kernels.silu_mul.gpu import silu_mul_gpu
from headrace.kernels.turn.gpu import turn_gpu
from headrace.kernels.walk import Drafts, Walks
from headrace.kernels.walk.gpu import walk_gpu
from headrace.step import RowTable, Turn

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
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
            if type(value) is int and value % 16 == 0 and not param.do_not_specialize:
                aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    names = {p.name for p in kernel.params}
    compiled = compile_kernel(source, target=TARGET, options={k: v for k, v in options.items() if k not in names})
    print(kernel.__name__, compiled.metadata.shared, flush=True)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def launch_all() -> None:
    # As on a chip that can: launches overlap.
    gpu_sizes._can_overlap = lambda device: True
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
        longs = torch.zeros(n, dtype=torch.int64)
        place_gpu(ints(n), ints(n), ints(n + 1), ints(n + 1, n), 16)
        place_gpu(longs, longs, ints(n + 1), ints(n + 1, n), 16)
        walks = Walks(ints(n + 1), ints(n + 1), longs, longs, longs, longs)
        walk_gpu(walks, ints(n))
        walk_gpu(walks, ints(n), Drafts(ints(n + 1, n), ints(n + 1)))
        reals = [torch.zeros(n + 1) for _ in range(3)]
        draw_rows_gpu(DrawTables(reals[0], ints(n + 1), *reals[1:], ints(n + 1, 2)), ints(n), ints(n), longs, 1)
        for drafted in (None, ints(n)):
            report_gpu(Advanced(*ints(3, n)), drafted, Priced(ints(n, n), ints(n, n), torch.zeros(n)))

    project_all()
    project_fixed_all()
    project_quantised_all()
    adapt_all()
    turn_all()
    for dtype, pairs, has_bias in ((torch.float32, 6, False), (torch.bfloat16, 6, True), (torch.bfloat16, 900, False)):
        tiles = experts.list_tiles(torch.zeros(pairs, dtype=torch.int64), 3)
        weight = torch.zeros(3, 70, 77, dtype=dtype)
        experts.multiply_tiles(
            tiles, torch.zeros(pairs, 77, dtype=dtype), weight, weight[:, :, 0] if has_bias else None, 1
        )
    attend_once(torch.bfloat16, 64, 64, 32, 8, 128, full=False, splits=True)
    attend_once(torch.bfloat16, 4096, 2, 28, 4, 128, full=True, splits=False)
    attend_once(torch.bfloat16, 40, 4, 8, 2, 16, full=True, splits=True)
    attend_once(torch.float16, 300, 3, 8, 8, 80, full=False, splits=False)
    attend_once(torch.float32, 64, 8, 32, 8, 128, full=True, splits=True)
    attend_once(torch.float32, 33, 1, 6, 2, 5, full=False, splits=False)
    attend_once(torch.bfloat16, 64, 64, 8, 4, 256, full=True, splits=True)
    attend_once(torch.bfloat16, 2048, 2, 16, 8, 256, full=False, splits=False)
    for dtype, heads, kv_heads, size in (
        (torch.bfloat16, 32, 8, 128),
        (torch.float16, 8, 4, 256),
        (torch.float32, 3, 1, 8),
    ):
        attend_once(dtype, 64, 64, heads, kv_heads, size, full=False, splits=False, parity=True)
    for n_rows, n_reqs in ((64, 64), (1, 1), (2048, 2)):
        attend_once(torch.bfloat16, n_rows, n_reqs, 128, 1, 576, full=False, splits=n_rows < 100, v_size=512)
    attend_once(torch.bfloat16, 20, 20, 16, 1, 576, full=False, splits=False, v_size=512)


def project_all() -> None:
    """Products of few rows as on an H200, launches overlapping: each form with and without splits, norm, gate, bias."""
    project.processors = lambda device: 132
    for dtype, rows, outputs, inputs in (
        (torch.bfloat16, 1, 6144, 4096),
        (torch.bfloat16, 1, 1024, 2048),
        (torch.float16, 1, 7, 1001),
        (torch.bfloat16, 1, 1024, 3072),
        (torch.bfloat16, 2, 6144, 4096),
        (torch.bfloat16, 16, 1024, 3072),
        (torch.float16, 64, 4096, 4096),
        (torch.float16, 5, 77, 1000),
    ):
        x, y, weight, bias, norm = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((rows, inputs), (rows, outputs), (2 * outputs, inputs), (2 * outputs,), (inputs,))
        )
        project.project_gpu(x, weight[:outputs], norm=(norm, 1e-5))
        project.project_gpu(x, weight, bias, norm=(norm, 1e-5), gated=True)
        project.project_gpu(x, weight, gated=True)
        project.project_onto_gpu(y, x, weight[:outputs])
        project.project_onto_gpu(y, x, weight[:outputs], bias[:outputs])


def project_fixed_all() -> None:
    """Splits apart, in one program, and none, for one row and for prompts, launches overlapping."""
    project_fixed.overlaps = lambda device: True
    for dtype, rows, outputs, inputs in (
        (torch.bfloat16, 1, 4096, 4096),
        (torch.bfloat16, 2048, 4096, 4096),
        (torch.bfloat16, 64, 128256, 4096),
        (torch.float16, 300, 77, 1001),
        (torch.float32, 3, 77, 1000),
        (torch.float32, 600, 1024, 1024),
    ):
        x, y, weight, bias = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape in ((rows, inputs), (rows, outputs), (outputs, inputs), (outputs,))
        )
        project_fixed.multiply_gpu(x, weight, None, y)
        project_fixed.multiply_gpu(x, weight, bias, None)


def project_quantised_all() -> None:
    """Each form by rows, on the shapes of an 8B model and on odd ones."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows, inputs, outputs, group in (
            (1, 4096, 6144, 128),
            (5, 104, 77, 40),
            (64, 4096, 1024, 64),
            (99, 72, 40, 72),
        ):
            groups = -(-inputs // group)
            x, words, zeros, scales, codes, scales_8 = (
                torch.empty(shape, dtype=kind, device="meta")
                for shape, kind in (
                    ((rows, inputs), dtype),
                    ((-(-inputs // 8), outputs), torch.int32),
                    ((groups, outputs), torch.uint8),
                    ((groups, outputs), torch.float32),
                    ((outputs, inputs), torch.uint8),
                    ((outputs, groups), torch.float32),
                )
            )
            project_int4.project_int4_gpu(x, words, zeros, scales, group)
            project_fp8.project_fp8_gpu(x, codes, scales_8, group)


def adapt_all() -> None:
    for dtype, outputs, inputs, rank in (
        (torch.bfloat16, (4096, 1024, 1024), 4096, 16),
        (torch.float16, (14336, 14336), 4096, 64),
        (torch.float32, (33, 7), 100, 5),
        (torch.float64, (24,), 24, 8),
        (torch.bfloat16, (1,), 1, 1),
    ):
        borders = (0, *torch.tensor(outputs).cumsum(0).tolist())
        a = torch.empty(9, inputs, rank * len(outputs), dtype=dtype, device="meta")
        b = torch.empty(9, rank, borders[-1], dtype=dtype, device="meta")
        factors = Factors(a, b, borders, torch.empty(len(borders), dtype=torch.int32, device="meta"))
        for rows in (1, 64, 2048):
            x, y = (torch.empty(rows, n, dtype=dtype, device="meta") for n in (inputs, borders[-1]))
            adapt_gpu_(y, x, torch.empty(rows, dtype=torch.int32, device="meta"), factors)


def turn_all() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for heads, kv_heads, size, has_norm in ((1, 1, 2, False), (16, 8, 128, True), (32, 8, 80, False)):
            norm = (torch.ones(heads + kv_heads, size, dtype=dtype), 1e-6) if has_norm else None
            for rows in (1, 300):
                qkv = torch.zeros(rows, heads + 2 * kv_heads, size, dtype=dtype)
                table = torch.zeros(9, size // 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                work = Turn(qkv, heads, kv_heads, norm, table, table, ints(rows))
                pools = [torch.zeros(kv_heads, 3, 16, size, dtype=dtype) for _ in "kv"]
                turn_gpu(work, *pools, torch.zeros(rows, dtype=torch.int64))


def attend_once(
    dtype: torch.dtype,
    n_rows: int,
    n_reqs: int,
    heads: int,
    kv_heads: int,
    size: int,
    *,
    full: bool,
    splits: bool,
    v_size: int | None = None,
    parity: bool = False,
) -> None:
    """Launch one step over tensors without contents; `full` asks for masks, a window, softcap, sinks and lse."""
    gpu_shape.PROGRAMS_A_PROCESSOR = 2**12 if splits else 1

    def empty(*shape: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    masks = (empty(n_rows), empty(2 * n_rows)) if full else ()
    rows = AttentionRows(*(empty(n_rows) for _ in range(5)), empty(n_reqs + 1), empty(n_reqs), *masks)
    v_size = v_size or size
    pools = [empty(kv_heads, 9, 16, d, kind=dtype) for d in (size, v_size)]
    options: Any = {"window": 100, "softcap": 30.0, "sinks_H": empty(heads, kind=dtype), "need_lse": True}
    q_RHD = empty(n_rows, heads, size, kind=dtype)
    tables = empty(n_reqs + 1, 2048), empty(n_reqs + 1)
    for seen in (rows, rows._replace(bits_R=None, words_W=None, joined=True, few=n_rows < 16 * n_reqs)):
        plan = gpu.GpuPlan(seen, *tables, 16, parity=parity)
        gpu.attend(q_RHD, seen, *pools, *tables, scale=0.1, plan=plan, **(options if full else {}))
    k_RKD = q_RHD[:, :kv_heads]
    gpu.write_kv(k_RKD, k_RKD[..., :v_size], *pools, empty(n_rows, kind=torch.int64))


if __name__ == "__main__":
    JITFunction.run = compile_launch
    launch_all()
