"""The operation `chain_rows`: the rows of requests whose tokens follow one another.

Row k of a request is its token at index n_done + k, writes slot n + k, and sees the committed slots and those of the
rows before it: a = 0, b = 0, c = k + 1. A row of the ghost, the last request index, is padding: whatever its offset, it
becomes what `RowTable.clear` makes, and sees itself alone. Letters: B requests, R rows, A position axes.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.chain_rows.reference import History, chain_rows_reference
from headrace.step import RowTable

__all__ = ["History", "chain_rows"]


def chain_rows(rows: RowTable, history: History, entry_R: Tensor, k_R: Tensor) -> None:
    """Fill the rows from the tables. The CPU and a GPU run compiled forms. No host synchronisation.

    Args:
        rows: exactly the rows to fill; `reqs` is filled already.
        history: tables by request index.
        entry_R: place of each row's request in `rows.reqs`, int64 [R]; of a padding row, that of a ghost.
        k_R: offset of each row within its request, int32 [R].
    """
    if k_R.device.type == "cpu":
        from headrace.kernels.chain_rows.cpu import chain_rows_cpu  # numba is loaded where it is used

        chain_rows_cpu(rows, history, entry_R, k_R)
    elif k_R.device.type == "cuda":
        from headrace.kernels.chain_rows.gpu import chain_rows_gpu  # Triton is loaded where it is used

        chain_rows_gpu(rows, history, entry_R, k_R)
    else:
        chain_rows_reference(rows, history, entry_R, k_R)
