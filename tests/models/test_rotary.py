"""Rotation tables against transformers, to the last bit and at positions far beyond the models of other tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

from headrace.errors import ConfigError
from headrace.layers.placement import Placement
from headrace.layers.rotary import Rotary, rotate_
from headrace.models.config import Entries
from headrace.models.llama import read

POSITIONS = 131072
D = 48
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-fraction": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
    "yarn-ramp": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 48.0,
        "beta_slow": 0.5,
        "truncate": False,
        "mscale": 0.707,
        "mscale_all_dim": 1.1,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.01 * i for i in range(D // 2)],
        "long_factor": [1.5 + 0.3 * i for i in range(D // 2)],
        "original_max_position_embeddings": 4096,
    },
    "longrope-attention": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (D // 2),
        "long_factor": [4.0] * (D // 2),
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.19,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 2.0},
}


def raw_config(rope: dict[str, Any], **extra: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 7, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "head_dim": D, "max_position_embeddings": POSITIONS}
    return {"model_type": "llama", "rope_parameters": rope} | sizes | heads | extra


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_tables_equal_transformers(name: str, theta: float) -> None:
    raw = raw_config(CASES[name] | {"rope_theta": theta})
    ours = read(Entries(raw, "config.json"))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**raw_config(dict(raw["rope_parameters"]))))
    pos_R = torch.cat((torch.arange(64), torch.arange(4090, 4102), torch.arange(POSITIONS - 64, POSITIONS)))
    cos_RD, sin_RD = theirs(torch.empty(1), pos_R[None])
    rotary = Rotary(ours.rope, ours.head_dim, POSITIONS, Placement(torch.device("cpu"), torch.float32))
    cos_R1D, sin_R1D = rotary(pos_R.to(torch.int32))
    assert torch.equal(cos_R1D[:, 0], cos_RD[0])
    assert torch.equal(sin_R1D[:, 0, D // 2 :], sin_RD[0, :, D // 2 :])
    assert torch.equal(-sin_R1D[:, 0, : D // 2], sin_RD[0, :, : D // 2])


def test_old_and_new_style_are_the_same() -> None:
    new = CASES["yarn"] | {"rope_theta": 5000.0}
    old = {("type" if key == "rope_type" else key): value for key, value in CASES["yarn"].items()}
    config = read(Entries(raw_config(new), "config.json"))
    for raw in (
        raw_config({}, rope_scaling=old, rope_theta=5000.0),
        raw_config(CASES["yarn"], rope_theta=5000.0),
        raw_config(new, rope_scaling=new, rope_theta=5000.0),
    ):
        assert read(Entries(raw, "config.json")) == config


def test_original_positions_outside_the_rope_parameters_win() -> None:
    raw = raw_config(CASES["longrope"], original_max_position_embeddings=1024)
    assert read(Entries(raw, "config.json")).rope.original_positions == 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotation_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    config = read(Entries(raw_config(CASES["default"]), "config.json"))
    rotary = Rotary(config.rope, D, 512, Placement(torch.device("cpu"), dtype))
    cos, sin = rotary(torch.tensor([0, 5, 511], dtype=torch.int32))
    assert cos.dtype == sin.dtype == dtype
    wide = torch.randn(3, 7, D, generator=generator).to(dtype)
    kept = wide.clone()
    rotate_(wide[:, :5], cos, sin)
    plain_sin = torch.cat((-sin[..., : D // 2], sin[..., D // 2 :]), -1)
    expected = kept[:, :5] * cos + rotate_half(kept[:, :5]) * plain_sin
    bound = 0.02 if dtype == torch.bfloat16 else 1e-6  # the sum is rounded once here, three times there
    torch.testing.assert_close(wide[:, :5], expected, atol=bound, rtol=0.0)
    assert torch.equal(wide[:, 5:], kept[:, 5:])
    assert torch.equal(wide[0, :5], kept[0, :5])


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("default", POSITIONS),
        ("linear", 3 * POSITIONS),
        ("dynamic", POSITIONS),
        ("yarn-ramp", 40 * 4096),
        ("llama3", POSITIONS),
        ("longrope", POSITIONS),
    ],
)
def test_reach(name: str, reach: int) -> None:
    config = read(Entries(raw_config(CASES[name]), "config.json"))
    assert config.rope.reach(config.max_position_embeddings) == reach


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope'; implemented: default, linear"),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, "'linear' and 'yarn'"),
        ({"rope_type": "linear"}, "factor is None; it must be a positive number"),
        ({"rope_type": "linear", "factor": -1}, "factor is -1; it must be a positive number"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, r"mrope_section = \[1, 2\]: not implemented"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "one set of parameters for all layers"),
        (CASES["longrope"] | {"long_factor": [1.0]}, r"long_factor is \[1.0\]; it must be a list of 24 positive"),
        (CASES["llama3"] | {"low_freq_factor": 4.0}, "low_freq_factor is 4.0; it must be below high_freq_factor = 4.0"),
        (CASES["yarn"] | {"truncate": "no"}, "truncate is 'no'; it must be true or false"),
    ],
)
def test_refusals(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(Entries(raw_config(rope), "config.json"))


def test_contradictions() -> None:
    with pytest.raises(ConfigError, match=r"rope_theta is 7.0 and 10000.0 in rope_parameters"):
        read(Entries(raw_config(CASES["default"] | {"rope_theta": 10000.0}, rope_theta=7.0), "config.json"))
    with pytest.raises(ConfigError, match="both given and differ"):
        read(Entries(raw_config(CASES["default"], rope_scaling={"type": "linear", "factor": 2.0}), "config.json"))
