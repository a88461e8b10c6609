"""What is not implemented is refused by name; damaged tensors are errors of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import awq, compressed, fp8, gptq, quantise
from safetensors.torch import load_file, save_file
from test_layouts import AWQ, FP8, GPTQ, SMALL
from tiny_models import reference

from headrace.errors import CheckpointError, ConfigError, HeadraceError, UnsupportedModelError
from headrace.models.checkpoint import load_model
from headrace.quantization import read_quantization
from headrace.quantization.base import named

SCHEME: dict[str, Any] = compressed("channel")["config_groups"]["group_0"]


def grouped(**changes: Any) -> dict[str, Any]:
    return compressed("channel") | {"config_groups": {"group_0": SCHEME | changes}}


REFUSED: list[tuple[Any, str]] = [
    ({"quant_method": "exl2"}, "names method 'exl2'; implemented: awq, compressed-tensors, fp8, gptq"),
    ("int8", "names method 'int8'"),
    (AWQ | {"bits": 8}, "quantization_config.bits is 8; implemented: 4"),
    (AWQ | {"bits": 3}, "quantization_config.bits is 3; implemented: 4"),
    (AWQ | {"version": "gemv"}, "version is 'gemv'; implemented: 'gemm'"),
    (AWQ | {"version": None, "format": "marlin"}, "format is 'marlin'; implemented: 'gemm'"),
    (AWQ | {"zero_point": False}, "zero_point is False; implemented: True"),
    (AWQ | {"lm_head": True}, "lm_head is True; implemented: False"),
    (AWQ | {"group_size": 12}, "group_size is 12; implemented: -1 and multiples of 8"),
    (AWQ | {"group_size": 0}, "group_size is 0"),
    (AWQ | {"modules_to_not_convert": "mlp"}, "modules_to_not_convert is 'mlp'; implemented: a list of names"),
    (AWQ | {"smoothing": 3}, "smoothing = 3: not implemented for this form"),
    (GPTQ | {"bits": 3}, "bits is 3; implemented: 4"),
    (GPTQ | {"bits": 8}, "bits is 8; implemented: 4"),
    (GPTQ | {"bits": None}, "bits is None; implemented: 4"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; implemented: 'gptq' or 'gptq_v2'"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
    (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "format is 'gptq_v2'; implemented: the value of"),
    (GPTQ | {"lm_head": True}, "lm_head is True"),
    (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic is"),
    (GPTQ | {"modules_in_block_to_quantize": 3}, "modules_in_block_to_quantize is 3; implemented: lists of names"),
    (GPTQ | {"modules_in_block_to_quantize": [[3]]}, "modules_in_block_to_quantize is"),
    (compressed("channel", ignore=["re:("]), "ignore is .*; implemented: regular expressions"),
    (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
    (
        compressed("channel") | {"format": "pack-quantized"},
        "format is 'pack-quantized'; implemented: 'float-quantized'",
    ),
    (compressed("channel") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is .*; implemented: null"),
    (compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format is 'sparse-24-bitmask'"),
    (compressed("channel") | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is"),
    (compressed("channel") | {"quantization_status": "calibration"}, "quantization_status is 'calibration'"),
    (compressed("channel") | {"config_groups": {"a": SCHEME, "b": SCHEME}}, "one scheme for all linear maps, not 2"),
    (compressed("group", group_size=32), "strategy is 'group'; implemented: 'tensor' or 'channel' or 'block'"),
    (compressed("channel", actorder="group"), "actorder is 'group'"),
    (compressed("channel", num_bits=4), "num_bits is 4; implemented: 8"),
    (compressed("channel", type="int"), "type is 'int'; implemented: 'float'"),
    (compressed("channel", symmetric=False), "symmetric is False"),
    (compressed("block"), "block_structure is None; implemented: two positive numbers"),
    (grouped(output_activations={"num_bits": 8}), "output_activations is"),
    (grouped(input_activations={"num_bits": 8, "type": "int"}), "input_activations.type is 'int'"),
    (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; implemented: 'e4m3'"),
    (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'; implemented: 'float'"),
    (FP8 | {"weight_block_size": [128]}, "weight_block_size is"),
    (FP8 | {"activation_scheme": "none"}, "activation_scheme is 'none'"),
]


@pytest.mark.parametrize(("config", "sentence"), REFUSED)
def test_options(config: Any, sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence) as caught:
        read_quantization(config, "config.json")
    assert str(caught.value).startswith("config.json: quantization_config")


def test_no_entry_is_dense() -> None:
    assert read_quantization(None, "config.json") is None
    assert read_quantization({}, "config.json") is None


def test_names() -> None:
    assert named("model.layers.0.mlp.gate", ["mlp.gate"], whole=False)
    assert not named("model.layers.0.mlp.gate_proj", ["mlp.gate", "gate", "layers.0.mlp.gate"], whole=False)
    assert not named("model.layers.10.mlp", ["layers.1"], whole=False)
    assert not named("model.lm_head", ["lm_head"], whole=True)
    assert named("model.layers.3.x", [r"re:.*\.3\..*"], whole=True)


def written(directory: Path, maker: Any, config: dict[str, Any], **options: Any) -> Path:
    reference("llama", directory / "source", **(SMALL | options))
    return quantise(directory / "source", directory / "out", maker, config)


def refused(path: Path, kind: type[HeadraceError], sentence: str, **options: Any) -> None:
    with pytest.raises(kind, match=sentence):
        load_model(path, device="cpu", **options)


def test_shapes(tmp_path: Path) -> None:
    reference("llama", tmp_path / "a", hidden_size=60)
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "a" / "config.json").read_text()) | {"quantization_config": GPTQ})
    )
    refused(
        tmp_path / "a", UnsupportedModelError, "q_proj maps 60 inputs to 60 outputs; this form packs both in eights"
    )
    path = written(tmp_path / "b", awq(32), AWQ)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["group_size"] = 40
    (path / "config.json").write_text(json.dumps(config))
    refused(path, UnsupportedModelError, "group_size is 40, which does not divide the 64 inputs of model.layers.0")


def test_one_product_has_one_form(tmp_path: Path) -> None:
    path = written(tmp_path, awq(32), AWQ | {"modules_to_not_convert": ["k_proj"]})
    refused(path, UnsupportedModelError, r"q_proj, model.*v_proj quantised and .*k_proj not; projections that are comp")


def test_random_weights(tmp_path: Path) -> None:
    path = written(tmp_path, awq(32), AWQ)
    refused(
        path, ConfigError, "load_format is 'random', but .* asks for weights in the form 'awq'", load_format="random"
    )


def test_transposed_floats(tmp_path: Path) -> None:
    reference("gpt2", tmp_path, num_key_value_heads=..., intermediate_size=...)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": compressed("tensor")}))
    refused(tmp_path, UnsupportedModelError, r"c_attn is stored as \[inputs, outputs\], and weights of")


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


Q = "model.layers.1.self_attn.q_proj"


def test_quantised_head(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(64, 16, dtype=torch.int32)

    path = change(written(tmp_path, awq(32), AWQ), edit)
    refused(path, UnsupportedModelError, r"has lm_head quantised \(awq\), but")


DAMAGE: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("gptq", lambda t: t.pop(f"{Q}.scales"), "missing .*q_proj.scales"),
    ("gptq", lambda t: t.update({f"{Q}.extra": t[f"{Q}.scales"].clone()}), "unexpected .*q_proj.extra"),
    ("gptq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:-1]}), r"q_proj.qweight is \[7, 64\], must be \[8"),
    ("gptq", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), "q_proj.qweight is F32"),
    ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].int()}), "q_proj.scales is I32"),
    ("gptq", lambda t: t[f"{Q}.scales"][1].fill_(float("nan")), "q_proj.scales holds values that are not finite"),
    ("gptq", lambda t: t[f"{Q}.g_idx"][3:].fill_(1), "q_proj.g_idx does not put 32 inputs into each of 2 groups"),
    ("gptq", lambda t: t[f"{Q}.g_idx"][0].fill_(-5), "q_proj.g_idx does not put 32 inputs into each of 2 groups"),
    ("gptq", lambda t: t.update({f"{Q}.bias": torch.ones(64)}), "unexpected .*q_proj.bias"),
    ("awq", lambda t: t[f"{Q}.scales"][0].fill_(float("inf")), "q_proj.scales holds values that are not finite"),
    ("awq", lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"].t().contiguous()}), r"q_proj.qzeros is \[8, 2\]"),
    ("fp8", lambda t: t[f"{Q}.weight_scale"][3].fill_(float("nan")), "q_proj.weight_scale holds values that are not"),
    (
        "fp8",
        lambda t: t[f"{Q}.weight"].view(torch.uint8)[5, 5].fill_(0xFF),
        "q_proj.weight holds codes that are no num",
    ),
    ("fp8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}), "q_proj.weight is F32"),
    ("fp8", lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].flatten()}), r"must be \[64, 1\]"),
]


@pytest.mark.parametrize(("form", "edit", "sentence"), DAMAGE)
def test_damage(form: str, edit: Any, sentence: str, tmp_path: Path) -> None:
    maker, config = {
        "awq": (awq(32), AWQ),
        "gptq": (gptq(32), GPTQ),
        "fp8": (fp8("channel"), compressed("channel")),
    }[form]
    refused(change(written(tmp_path, maker, config), edit), CheckpointError, sentence)


def test_one_number_in_two_shapes(tmp_path: Path) -> None:
    path = written(tmp_path, fp8("tensor"), compressed("tensor"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"][0].clone()

    load_model(change(path, edit), device="cpu")
