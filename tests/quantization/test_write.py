"""What `headrace quantize` writes: read again by the definition of the layouts, loaded, and rounded well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import AWQ_COLUMNS
from test_layouts import ODD, SMALL, worst
from tiny_models import reference
from torch import Tensor

from headrace.cli import main
from headrace.engine.feed import feed
from headrace.errors import ConfigError, UnsupportedModelError
from headrace.layers.linear import Linear
from headrace.models.checkpoint import load_model
from headrace.models.convert import quantise_checkpoint
from headrace.quantization.round import BLOCK, round_int4
from headrace.quantization.watch import Watched, watched_stores
from headrace.quantization.write import form_of


def again(method: str, tensors: dict[str, Tensor], group: int) -> Tensor:
    """The weight [outputs, inputs] that the tensors of a layout stand for, number by number."""
    if method == "fp8":
        return tensors["weight"].float() * tensors["weight_scale"]
    scales = tensors["scales"].float()
    groups, outputs = scales.shape
    words, zero_words = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    columns = AWQ_COLUMNS if method == "awq" else list(range(8))
    if method == "gptq":
        zero_words = [[word + 0x11111111 for word in row] for row in zero_words]
    zeros = [
        [(zero_words[g][n // 8] >> (4 * columns.index(n % 8))) & 15 for n in range(outputs)] for g in range(groups)
    ]
    inputs = len(words) if method == "awq" else 8 * len(words)
    weight = torch.empty(outputs, inputs)
    for e in range(inputs):
        g = e // group if method == "awq" else int(tensors["g_idx"][e])
        for n in range(outputs):
            if method == "awq":
                code = (words[e][n // 8] >> (4 * columns.index(n % 8))) & 15
            else:
                code = (words[e // 8][n] >> (4 * (e % 8))) & 15
            weight[n, e] = (code - zeros[g][n]) * scales[g, n]
    return weight


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq"])
def test_weights_go_to_the_nearest_code(method: str) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    got = again(method, form_of(method, 32).pack(weight), 32)
    if method == "fp8":
        bound = weight.abs().amax(1, keepdim=True) / 448 * 16.01
    else:
        parts = weight.unflatten(1, (3, 32))
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        if method == "gptq":
            high = torch.maximum(high, -low)
            low = -high
        # Half a step, and a whole one where symmetric codes end at 7 or where a zero is cut at its range.
        bound = ((high - low) / 15 * 1.01 + 2.0**-14).repeat_interleave(32, 1)
    assert ((got - weight).abs() <= bound).all()
    assert (got[3] == 0).all()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("group", [32, 96, BLOCK + 40, 300])
def test_gptq_costs_less(group: int, ordered: bool) -> None:
    """On inputs that go together, the products' error falls well below that of the nearest codes."""
    generator = torch.Generator().manual_seed(group)
    mixed = torch.randn(40, 300, generator=generator) * torch.logspace(-1, 1, 300)
    x = torch.randn(600, 40, generator=generator) @ mixed + 0.1 * torch.randn(600, 300, generator=generator)
    x[:, 7] = 0.0  # an input that is never there
    weight = torch.randn(64, 300, generator=generator)

    def cost(**options: Any) -> float:
        made = round_int4(weight, group, symmetric=True, **options)
        g = made.g_idx_E.long()
        numbers = (made.codes_EN.float() - made.zeros_GN.float()[g]) * made.scales_GN.float()[g]
        assert made.g_idx_E.bincount().tolist()[:-1] == [group] * (300 // group - (300 % group == 0))
        return float((x @ (numbers - weight.t())).square().mean())

    assert cost(moments_EE=x.t() @ x, ordered=ordered) < 0.5 * cost()


@pytest.mark.parametrize(
    ("method", "options", "texts"),
    [("fp8", {}, False), ("awq", {}, False), ("awq", {}, True), ("gptq", {"desc_act": True}, True)],
)
def test_checkpoints(method: str, options: Any, texts: bool, tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "dense", **SMALL, max_shard_size="40KB")
    sequences = [[(5 * i + j) % 120 for i in range(40)] for j in range(3)]
    form = form_of(method, 32, **options)
    written = quantise_checkpoint(
        tmp_path / "dense", tmp_path / "out", form, feed=(lambda model: feed(model, sequences)) if texts else None
    )
    model, dense = (load_model(tmp_path / name, device="cpu") for name in ("out", "dense"))
    maps = [m for m in model.modules() if isinstance(m, Linear)]
    assert all(m.store is not None for m in maps)
    assert written.modules == 14
    assert written.weights == sum(m.inputs * sum(m.outputs) for m in maps)
    assert written.after_bytes < written.before_bytes
    assert worst(model, dense, 9) < (0.2 if method == "fp8" else 1.0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="full holds something already"):
        quantise_checkpoint(tmp_path / "dense", tmp_path / "full", form)
    with pytest.raises(ConfigError, match=r"says that the weights are .* already"):
        quantise_checkpoint(tmp_path / "out", tmp_path / "twice", form)


def test_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    reference("llama", tmp_path, **SMALL)
    model = load_model(tmp_path, device="cpu", quantization=Watched("test"))
    feed(model, [[1, 2, 3, 4, 5], [6, 7]])
    stores = watched_stores(model)
    assert {store.rows for store in stores} == {7}
    for store in stores:
        assert store.moments_EE is not None
        assert torch.equal(store.moments_EE, store.moments_EE.t())
        assert (store.moments_EE.diagonal() > 0).any()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference("llama", tmp_path / "dense", **ODD)
    words = ["quantize", str(tmp_path / "dense")]
    assert main([*words, str(tmp_path / "out"), "--method", "gptq", "--group-size", "32"]) == 0
    assert "14 linear maps" in capsys.readouterr().err
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (4, 32, False)
    for options, sentence in (
        (["--desc-act"], "desc_act orders inputs by calibration text"),
        (["--group-size", "12"], "group_size is 12; it must be -1 or a multiple of 8"),
        (["--method", "fp8", "--calibrate", "x"], "calibrate was given, but method fp8"),
        (["--method", "awq"], "group_size is 128, which does not divide the 72 inputs"),
    ):
        assert main([*words, str(tmp_path / "no"), *options]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "no").exists()


def test_forms_that_are_only_read() -> None:
    form = type(form_of("fp8"))("here", "block", (128, 128))
    with pytest.raises(UnsupportedModelError, match="are read, and not written"):
        form.pack(torch.ones(2, 2))
    with pytest.raises(UnsupportedModelError, match="are read, and not written"):
        form.describe()
    with pytest.raises(ConfigError, match="method is 'int3'; choose from"):
        form_of("int3")
