"""Products of few rows on a GPU against the references: exact sums, poisoned outputs, splits, rows apart, a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_forms
import pytest
import torch
from dense_context import dense_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_elementwise import EPS, LAYOUTS, numbers, strided
from test_elementwise_gpu import same_bits, there
from tiny_models import reference
from torch import Tensor

from headrace.kernels.project import gpu, gpu_shape
from headrace.kernels.project import project as composed
from headrace.kernels.project import project_onto as composed_onto
from headrace.kernels.project.gpu_shape import MAX_ROWS, Shape
from headrace.kernels.project.reference import project_onto_reference, project_reference
from headrace.layers import linear
from headrace.models.checkpoint import load_model

# `device` teaches the interpreter products of bfloat16.
pytestmark = [*gpu_forms.marks, pytest.mark.usefixtures("device")]
DEVICE, HAS_GPU = gpu_forms.DEVICE, gpu_forms.HAS_GPU
# Relative to the largest result. A last bit of float32 may decide how norm, gate and result are rounded, and the
# interpreter cuts float32 off where compiled code rounds it to bfloat16.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
PROFILE = settings(
    max_examples=200 if HAS_GPU else 60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors that nobody filled hold NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def whole_numbers(seed: int, *shape: int, dtype: torch.dtype, most: int) -> Tensor:
    """Small integers: their sums of products are exact in every type and order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def draw_sizes(data: st.DataObject, gated: bool) -> tuple[int, int, int, Shape | None]:
    """Rows, outputs, inputs, and the cut: the chosen or any other."""
    rows = data.draw(st.sampled_from([1, 1, 1, 2, 3, 9, MAX_ROWS, MAX_ROWS + 1]), "rows")
    results = data.draw(st.one_of(st.integers(1, 50), st.sampled_from([64, 130, 300])), "results")
    inputs = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([128, 600, 1024, 2500])), "inputs")
    shape = None
    if data.draw(st.booleans(), "own cut"):
        is_row = rows == 1 and data.draw(st.sampled_from([False, False, True]), "multiply and sum")
        shape = Shape(
            is_row,
            block_n=data.draw(st.sampled_from([1, 2, 8] if is_row else [16, 32, 64]), "block_n"),
            block_e=data.draw(st.sampled_from([16, 64, 256]), "block_e"),
            splits=data.draw(st.sampled_from([1, 2, 3, 4, 7]), "splits"),
            n_warps=4,
            n_stages=3,
            ahead_e=64,
        )
    return rows, results * (2 if gated else 1), inputs, shape


def count(events: Counter[str], rows: int, shape: Shape) -> None:
    events["one row multiplied and summed"] += shape.is_row
    events["one row in a tile"] += rows == 1 and not shape.is_row
    events["several rows"] += rows > 1
    events["more than sixteen rows"] += rows > 16
    events["split"] += shape.splits > 1


@PROFILE
@given(data=st.data())
def check_exact_sums(events: Counter[str], data: st.DataObject) -> None:
    """Nothing is left out, read twice or read from beyond the ends: equal bits."""
    dtype = data.draw(st.sampled_from(gpu.TYPES), "dtype")
    rows, outputs, inputs, shape = draw_sizes(data, gated=False)
    layouts = data.draw(st.sampled_from(LAYOUTS), "layout of x"), data.draw(st.sampled_from(["plain", "wide", "tall"]))
    # Sums stay below 256, which bfloat16 still holds.
    x_RE = strided(whole_numbers(1, rows, inputs, dtype=dtype, most=2 if inputs < 60 else 1), layouts[0])
    weight_NE = strided(whole_numbers(2, outputs, inputs, dtype=dtype, most=1), layouts[1])
    bias_N = whole_numbers(3, outputs, dtype=dtype, most=9) if data.draw(st.booleans(), "bias") else None
    y_RN = strided(whole_numbers(4, rows, outputs, dtype=dtype, most=9), layouts[1])
    args = (there(x_RE), there(weight_NE), None if bias_N is None else there(bias_N))
    with poisoned():
        got_RN = gpu.project_gpu(*args, shape=shape)
        sum_RN = there(y_RN)
        gpu.project_onto_gpu(sum_RN, *args, shape=shape)
    expected_RN = project_reference(x_RE.double(), weight_NE.double(), None if bias_N is None else bias_N.double())
    assert expected_RN.abs().max() < 256
    assert torch.equal(got_RN.cpu().double(), expected_RN)
    # torch 2.13 multiplies an odd number of bfloat16 with what lies behind them, which is NaN here, and zero.
    project_onto_reference(y_RN, x_RE.contiguous(), weight_NE.contiguous(), bias_N)
    assert torch.equal(sum_RN.cpu(), y_RN)
    if sum_RN._base is not None and layouts[1] != "plain":
        assert int(sum_RN._base.isnan().sum()) == 2 * y_RN.numel(), "wrote beside the view"
        events["y in a wider tensor"] += 1
    assert not any(bool(counts.any()) for counts in gpu._counters.values()), "the next launch would start with counts"
    count(events, rows, shape or gpu.shape_of(x_RE, weight_NE, gated=False))
    events["x strided"] += not x_RE.is_contiguous()
    events["bias"] += bias_N is not None
    events[str(dtype)] += 1


def test_exact_sums(events: Counter[str]) -> None:
    check_exact_sums(events)


@PROFILE
@given(data=st.data())
def check_norm_and_gate(events: Counter[str], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(gpu.TYPES), "dtype")
    gated, normed = data.draw(st.booleans(), "gated"), data.draw(st.booleans(), "norm")
    rows, outputs, inputs, shape = draw_sizes(data, gated)
    x_RE = strided(numbers(5, rows, inputs, dtype=dtype, spread=3.0), data.draw(st.sampled_from(LAYOUTS), "layout"))
    if not normed:
        x_RE = x_RE / 3
    weight_NE = numbers(6, outputs, inputs, dtype=dtype, spread=inputs**-0.5)
    bias_N = numbers(7, outputs, dtype=dtype) if data.draw(st.booleans(), "bias") else None
    norm = (numbers(8, inputs, dtype=dtype), EPS) if normed else None
    args = (there(x_RE), there(weight_NE), None if bias_N is None else there(bias_N))
    with poisoned():
        got_RN = gpu.project_gpu(*args, norm=norm and (there(norm[0]), EPS), gated=gated, shape=shape)
    assert got_RN.shape == (rows, outputs // (2 if gated else 1))
    assert got_RN.dtype == dtype
    exact_RN = project_reference(
        x_RE.double(),
        weight_NE.double(),
        None if bias_N is None else bias_N.double(),
        norm=norm and (norm[0].double(), EPS),
        gated=gated,
    )
    bound = TOLERANCE[dtype] * (1 + exact_RN.abs().max())
    torch.testing.assert_close(got_RN.cpu().double(), exact_RN, rtol=TOLERANCE[dtype], atol=float(bound))
    count(events, rows, shape or gpu.shape_of(x_RE, weight_NE, gated=gated))
    is_row = (shape or gpu.shape_of(x_RE, weight_NE, gated=gated)).is_row
    events["norm in the kernel"] += normed and is_row
    events["norm in front"] += normed and not is_row
    events["gated with norm"] += normed and gated
    events["gated with bias"] += gated and bias_N is not None
    events[str(dtype)] += 1


def test_norm_and_gate(events: Counter[str]) -> None:
    check_norm_and_gate(events)


SHAPES = {
    "row": Shape(True, 4, 256, 3, 4, 1, 64),
    "tile": Shape(False, 32, 64, 4, 4, 3, 64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_splits_are_added_in_order(name: str) -> None:
    """The same bits every time, and those of the parts added one after the other."""
    x, weight = numbers(0, 1, 768, dtype=torch.float16), numbers(1, 70, 768, dtype=torch.float16, spread=0.03)
    x, weight = there(x), there(weight)
    y = gpu.project_gpu(x, weight, shape=SHAPES[name])
    for _ in range(50 if HAS_GPU else 2):
        assert same_bits(gpu.project_gpu(x, weight, shape=SHAPES[name]), y)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("rows", [2, 9, MAX_ROWS])
def test_rows_do_not_know_of_each_other(rows: int) -> None:
    x, weight, norm = (
        there(numbers(i, *shape, dtype=torch.bfloat16)) for i, shape in enumerate(((rows, 300), (80, 300), (300,)))
    )
    clean = gpu.project_gpu(x, weight, norm=(norm, EPS), gated=True)
    others = torch.arange(rows, device=DEVICE) != 1
    for bad in (torch.nan, torch.inf):
        x[1, 200] = bad
        broken = gpu.project_gpu(x, weight, norm=(norm, EPS), gated=True)
        assert same_bits(broken[others], clean[others])
        assert not broken[1].isfinite().all()


def test_what_the_kernels_take() -> None:
    def at(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    def takes(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Tensor | None = None, gated: bool = False
    ) -> bool:
        return gpu.takes(x, weight, bias, None if norm is None else (norm, EPS), gated=gated)

    assert takes(at(3, 4), at(6, 4), at(6), at(4), gated=True)
    assert takes(at(MAX_ROWS, 4), at(5, 4))
    assert not takes(at(MAX_ROWS + 1, 4), at(5, 4))
    assert not takes(at(0, 4), at(5, 4))
    assert not takes(at(3, 0), at(5, 0))
    assert not takes(at(3, 4), at(5, 4), gated=True)
    assert not takes(at(3, 4), at(5, 3))
    assert not takes(at(3, 4), at(4, 5).t())
    assert not takes(at(3, 4), at(5, 4), at(4))
    assert not takes(at(3, 4), at(5, 4), None, at(5))
    assert not takes(at(3, 4), at(5, 4, dtype=torch.bfloat16))
    assert not takes(at(3, 4, dtype=torch.float32), at(5, 4, dtype=torch.float32))
    assert gpu.takes_onto(at(3, 5), at(3, 4), at(5, 4), at(5))
    assert not gpu.takes_onto(at(3, 6), at(3, 4), at(5, 4), None)
    assert not gpu.takes_onto(at(5, 3).t(), at(3, 4), at(5, 4), None)
    assert not gpu.takes_onto(at(3, 5, dtype=torch.float32), at(3, 4), at(5, 4), None)


@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, MAX_ROWS])
def test_a_graph_gives_the_same(rows: int) -> None:
    """A chain of products whose launches overlap, each of which reads what the one before it wrote."""
    x = there(numbers(0, rows, 1024, dtype=torch.bfloat16))
    norm = (there(numbers(1, 1024, dtype=torch.bfloat16)), EPS)
    up, down = (
        there(numbers(i, *shape, dtype=torch.bfloat16, spread=0.03))
        for i, shape in ((2, (6144, 1024)), (3, (1024, 3072)))
    )

    def chain() -> Tensor:
        y = x.clone()
        for _ in range(20):
            gpu.project_onto_gpu(y, gpu.project_gpu(y, up, norm=norm, gated=True), down)
        return y

    chain()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        y = x.clone()
        for _ in range(20):
            gpu.project_onto_gpu(y, gpu.project_gpu(y, up, norm=norm, gated=True), down)
            torch.cuda.synchronize()  # nothing overlaps
        assert same_bits(captured, y)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, MAX_ROWS])
def test_the_operation_takes_the_kernel_where_it_is_chosen(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = gpu._launch

    def counted(y_RN: torch.Tensor, *rest: Any, **options: Any) -> None:
        calls.append(len(y_RN))
        original(y_RN, *rest, **options)

    monkeypatch.setattr(gpu, "_launch", counted)
    x_RE, weight_NE = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((rows, 256), (512, 256)))
    for chosen in (0, MAX_ROWS):
        monkeypatch.setattr(gpu_shape, "CHOSEN_ROWS", chosen)
        y_RN = composed(x_RE, weight_NE, gated=True)
        composed_onto(torch.zeros_like(y_RN), x_RE, weight_NE[:256])
        assert calls == [rows, rows] * (chosen > 0)


if not HAS_GPU:

    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_a_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Counter[str]) -> None:
        """Every projection of a model by the kernels; float16, which the interpreter rounds as compiled code does."""
        reference(family, tmp_path)
        model = load_model(tmp_path, device="cpu", dtype=torch.float16)
        ids = [[5, 99, 3, 42], [77, 8, 130]]
        exact = torch.cat(dense_logits(load_model(tmp_path, device="cpu", dtype=torch.float64), ids))
        plain = torch.cat(dense_logits(model, ids))

        def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
            options = {"norm": None, "gated": False} | options
            events["gated" if options["gated"] else "normed" if options["norm"] else "plain"] += 1
            taken = gpu.takes(x, weight, bias, options["norm"], gated=options["gated"])
            return (gpu.project_gpu if taken else composed)(x, weight, bias, **options)

        def project_onto(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
            events["onto"] += 1
            (gpu.project_onto_gpu if gpu.takes_onto(y, x, weight, bias) else composed_onto)(y, x, weight, bias)

        monkeypatch.setattr(linear, "project", project)
        monkeypatch.setattr(linear, "project_onto", project_onto)
        got = torch.cat(dense_logits(model, ids))
        assert not torch.equal(got, plain), "the kernels did not run"
        error, usual = (got - exact).norm(), (plain - exact).norm()
        assert error < 2 * usual, (error, usual, exact.norm())
