"""The GPU forms of `place`, `walk`, `draw_rows` and `report` against their definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import gpu_forms
import pytest
import torch
from test_step_ops import check_draw_rows, check_equal, check_place, check_walk, report_case

from headrace.kernels.draw_rows.gpu import draw_rows_gpu
from headrace.kernels.place.gpu import place_gpu
from headrace.kernels.report.gpu import report_gpu
from headrace.kernels.report.reference import report_reference
from headrace.kernels.walk.gpu import walk_gpu

pytestmark = gpu_forms.marks


def moved(value: Any, device: torch.device) -> Any:
    """The same with all tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def there(form: Callable[..., Any]) -> Callable[..., Any]:
    """The form, run on the device over tensors of the host."""

    def run(*arguments: Any) -> Any:
        return moved(form(*moved(arguments, gpu_forms.DEVICE)), torch.device("cpu"))

    return run


@pytest.mark.parametrize("n_rows", [0, 1, 5, 300])
def test_place(n_rows: int) -> None:
    check_place(there(place_gpu), n_rows)


def test_walk(events: Counter[str]) -> None:
    check_walk(there(walk_gpu), events, 300 if gpu_forms.HAS_GPU else 100)


def test_draw_rows() -> None:
    check_draw_rows(there(draw_rows_gpu))


@pytest.mark.parametrize(("n_reqs", "e_max"), [(1, 1), (3, 4), (70, 2)])
def test_report(n_reqs: int, e_max: int) -> None:
    advanced, drafted_B, priced = report_case(n_reqs, e_max)
    wide_BE = torch.cat((priced.emit_BE, priced.emit_BE), 1)
    strided = priced._replace(emit_BE=wide_BE[:, :e_max], priced_by_BE=priced.priced_by_BE.t().contiguous().t())
    for drafted in (drafted_B, None):
        for form in (priced, strided):
            check_equal(there(report_gpu)(advanced, drafted, form), report_reference(advanced, drafted, priced))
