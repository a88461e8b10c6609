"""The GPU forms of `advance` and `chain_rows` against their definitions."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gpu_forms
import torch
from test_clocks import check_advance, check_chain_rows, commit_case, compare_advance

from headrace.kernels.advance import Advanced, Clocks
from headrace.kernels.advance.gpu import advance_gpu
from headrace.kernels.chain_rows import History
from headrace.kernels.chain_rows.gpu import chain_rows_gpu
from headrace.step import RowTable

pytestmark = gpu_forms.marks
DEVICE = gpu_forms.DEVICE


def advance_there(clocks: Clocks, *arguments: torch.Tensor) -> Advanced:
    """On the device, and back."""
    there = Clocks(*(x.to(DEVICE) for x in clocks))
    done = advance_gpu(there, *(x.to(DEVICE) for x in arguments))
    for x, y in zip(clocks, there, strict=True):
        x.copy_(y)
    return Advanced(*(x.cpu() for x in done))


def chain_rows_there(rows: RowTable, history: History, entry_R: torch.Tensor, k_R: torch.Tensor) -> None:
    columns: dict[str, Any] = {name: x.to(DEVICE) for name, x in vars(rows).items()}
    chain_rows_gpu(
        RowTable(**columns), History(*(x.to(DEVICE) for x in history)), entry_R.to(DEVICE), k_R.to(DEVICE)
    )  # fmt: skip
    for name, x in vars(rows).items():
        x.copy_(columns[name])


def test_advance(events: Counter[str]) -> None:
    check_advance(advance_there, events, 300 if gpu_forms.HAS_GPU else 100)


def test_the_ghost_stays_as_it_is() -> None:
    """Whatever its row holds, and however often it is named."""
    case = commit_case(5, 3, 3)
    clocks = Clocks(*(x.clone() for x in case.clocks))
    clocks.trigger[-1] = 0  # behind the ghost's clock: the reference would take rows back
    kept = [x[..., -1:] if name == "kv_len" else x[-1:] for name, x in clocks._asdict().items()]
    kept = [x.clone() for x in kept]
    advance_there(clocks, *case[1:])
    for x, (name, y) in zip(kept, clocks._asdict().items(), strict=True):
        assert x.equal(y[..., -1:] if name == "kv_len" else y[-1:])


def test_advance_reads_strided_tokens() -> None:
    case = commit_case(9, 4, 1)
    wide_BE = torch.cat((case.emit_BE, case.emit_BE + 1), 1)
    compare_advance(case._replace(emit_BE=wide_BE[:, :4]), advance_there)
    compare_advance(case._replace(emit_BE=case.emit_BE.t().contiguous().t()), advance_there)
    empty = case._replace(**{name: getattr(case, name)[:0] for name in ("reqs_B", "n_kv_B", "n_emit_B", "emit_BE")})
    assert all(x.shape == (0,) for x in advance_there(Clocks(*(x.clone() for x in empty.clocks)), *empty[1:]))


def test_chain_rows(events: Counter[str]) -> None:
    check_chain_rows(chain_rows_there, events, 100 if gpu_forms.HAS_GPU else 25)
