"""The set-up that all compiled CPU kernels share."""

from __future__ import annotations

import subprocess
import sys

MISSING_LIBGOMP = """
import ctypes, logging
load = ctypes.CDLL
def refuse(name, *rest, **options):
    if name == "libgomp.so.1.0.0":
        raise OSError("not there")
    return load(name, *rest, **options)
ctypes.CDLL = refuse
logging.basicConfig(level=logging.WARNING)
import torch
from headrace.kernels.cpu_runtime import use_torch_threads
from headrace.kernels.draw import DrawParams, draw
m = 16
params = DrawParams(torch.ones(m), torch.zeros(m, dtype=torch.int32), torch.ones(m), torch.zeros(m))
drawn = draw(torch.randn(m, 300), params, torch.zeros(m, 2, dtype=torch.int32), torch.arange(m, dtype=torch.int32))
assert int(drawn.id_M.min()) >= 0
assert use_torch_threads() == 1
"""


def test_without_libgomp_kernels_run_on_one_thread_and_say_so() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING_LIBGOMP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "apt install libgomp1" in done.stderr
