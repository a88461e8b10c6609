"""Compiles what the GPU forms launch, down to machine code for an H100 that need not be here; prints the resources.

The interpreter runs Python, which takes more than Triton does: names from outside a kernel, types that change within a
branch, layouts that the compiler does not manage. Run by `test_compile_gpu.py` in a process of its own, because Triton
either interprets or compiles.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headrace.kernels.attention import AttentionRows, gpu, gpu_kernel, gpu_shape

H100 = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Compiler:
    """Takes the place of a kernel: a launch is compiled with the arguments' types and what Triton makes of values."""

    def __init__(self, name: str, kernel: Any, found: list[dict[str, Any]]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            params = self.kernel.params
            values = dict(zip([p.name for p in params], args, strict=False))
            limits = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
            values |= options
            signature, constants, divisible = {}, {}, {}
            for number, param in enumerate(params):
                x = values[param.name]
                if param.is_constexpr or (type(x) is int and x == 1 and not param.do_not_specialize):
                    signature[param.name], constants[number,] = "constexpr", x
                    continue
                if isinstance(x, Tensor):
                    signature[param.name] = f"*{TYPES[x.dtype]}"
                else:
                    signature[param.name] = "fp32" if isinstance(x, float) else "i32"
                if isinstance(x, Tensor) or (type(x) is int and x % 16 == 0 and not param.do_not_specialize):
                    divisible[number,] = [["tt.divisibility", 16]]
            source = ASTSource(self.kernel, signature=signature, constexprs=constants, attrs=divisible)
            metadata = triton.compile(source, target=H100, options=limits).metadata
            self.found.append({"kernel": self.name, "shared": metadata.shared})

        return launch


def attend(
    dtype: torch.dtype, n_rows: int, n_reqs: int, heads: int, kv_heads: int, size: int, *, full: bool, splits: bool
) -> None:
    """Launch one step over tensors without contents; `full` asks for masks, a window, softcap, sinks and lse."""
    gpu_shape.PROGRAMS_A_PROCESSOR = 2**12 if splits else 1

    def empty(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    masks = (empty(n_rows), empty(2 * n_rows)) if full else ()
    rows = AttentionRows(*(empty(n_rows) for _ in range(5)), empty(n_reqs + 1), empty(n_reqs), *masks)
    pools = [empty(kv_heads, 9, 16, size, kind=dtype) for _ in "kv"]
    options: Any = {"window": 100, "softcap": 30.0, "sinks_H": empty(heads, kind=dtype), "need_lse": True}
    q_RHD = empty(n_rows, heads, size, kind=dtype)
    gpu.attend(q_RHD, rows, *pools, empty(n_reqs + 1, 2048), empty(n_reqs + 1), scale=0.1, **(options if full else {}))
    gpu.write_kv(q_RHD[:, :kv_heads], q_RHD[:, :kv_heads], *pools, empty(n_rows, kind=torch.int64))


def main() -> None:
    found: list[dict[str, Any]] = []
    for name in ("list_tiles", "attend_tiles", "merge_splits", "write_rows"):
        setattr(gpu_kernel, name, Compiler(name, getattr(gpu_kernel, name), found))
    attend(torch.bfloat16, 64, 64, 32, 8, 128, full=False, splits=True)
    attend(torch.bfloat16, 4096, 2, 28, 4, 128, full=True, splits=False)
    attend(torch.float16, 300, 3, 8, 8, 80, full=False, splits=False)
    attend(torch.float32, 64, 8, 32, 8, 128, full=True, splits=True)
    attend(torch.float32, 33, 1, 6, 2, 5, full=False, splits=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
