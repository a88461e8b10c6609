"""Models against transformers: logits in float32, greedy tokens, every family, option and rope scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_context import DenseCache, dense_greedy, dense_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import reference

from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.step import LayerState

BOUND = 1e-5

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 97}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 5}),
    "llama-head-dim": ("llama", {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_attention_heads": 3, "hidden_size": 72}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen2-head-dim": ("qwen2", {"head_dim": 16, "hidden_size": 35}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "num_attention_heads": 3}),
    "qwen3-bias": ("qwen3", {"head_dim": 10, "attention_bias": True, "num_key_value_heads": 5}),
    "qwen3-tied-windows": (
        "qwen3",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
        },
    ),
}

OPTIONS |= {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-windows": ("mistral", {"sliding_window": 6, "head_dim": 8, "num_key_value_heads": 5}),
    "phi3": ("phi3", {}),
    "phi3-partial-windows": (
        "phi3",
        {"partial_rotary_factor": 0.75, "hidden_size": 80, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "phi3-partial-longrope": (
        "phi3",
        {
            "hidden_size": 80,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [2.0 + 0.5 * i for i in range(6)],
            },
        },
    ),
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-no-caps": (
        "gemma2",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 4, "query_pre_attn_scalar": 12}),
    "gemma3-linear-rope": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "olmo2": ("olmo2", {"num_key_value_heads": 5}),
    "olmo2-groups-bias": ("olmo2", {"attention_bias": True}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3-biases-windows": (
        "smollm3",
        {
            "num_hidden_layers": 3,
            "no_rope_layers": [0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
        },
    ),
    "granite-tied-biases": ("granite", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "gpt2": ("gpt2", {"num_key_value_heads": ..., "intermediate_size": ...}),
    "gpt2-inner-untied": (
        "gpt2",
        {
            "num_key_value_heads": ...,
            "intermediate_size": ...,
            "n_inner": 70,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral-windows": ("mixtral", {"sliding_window": 6, "num_experts_per_tok": 3, "num_key_value_heads": 5}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-moe-mixed-layers": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "gpt-oss": ("gpt_oss", {"num_hidden_layers": 3, "swiglu_limit": 0.5}),
    "gpt-oss-no-window": (
        "gpt_oss",
        {"layer_types": ["full_attention"] * 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "deepseek-v2": ("deepseek_v2", {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1}),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {"q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.5, "mlp_bias": False},
    ),
    "deepseek-v3": ("deepseek_v3", {"num_hidden_layers": 3}),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        {
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    ),
    "deepseek-v3-halves": ("deepseek_v3", {"rope_interleave": False, "tie_word_embeddings": True}),
}

HALF = 6  # pairs of a head in the base configuration: 60 / 5 / 2
SCALINGS: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn-attention": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
    "longrope-short": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.5 * i for i in range(HALF)],
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


@torch.inference_mode()
def reference_logits(model: Any, tokens: list[int], first: int = 0) -> torch.Tensor:
    positions = torch.arange(first, first + len(tokens))[None]
    return model(torch.tensor([tokens]), position_ids=positions).logits[0]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check_logits(ours: CausalLM, theirs: Any, sequences: list[list[int]], first: int = 0) -> None:
    for tokens, logits in zip(sequences, dense_logits(ours, sequences, first), strict=True):
        assert logits.dtype == torch.float32
        assert distance(logits, reference_logits(theirs, tokens, first)) < BOUND


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    family, options = OPTIONS[name]
    theirs = reference(family, tmp_path, **options)
    ours = load_model(tmp_path, device="cpu")
    sequences = prompts(theirs.config.vocab_size, 29, 1, 8)
    check_logits(ours, theirs, sequences)
    prompt = sequences[-1]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    assert dense_greedy(ours, prompt, 64) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_scalings(family: str, scaling: str, tmp_path: Path) -> None:
    theirs = reference(family, tmp_path, head_dim=12, rope_parameters=SCALINGS[scaling])
    short = scaling == "longrope-short"  # transformers takes short factors for short sequences: a shorter model here
    ours = load_model(tmp_path, device="cpu", max_model_len=64 if short else None)
    check_logits(ours, theirs, prompts(131, 40, 3))
    if not short:
        check_logits(ours, theirs, prompts(131, 20), first=230)


def test_longrope_takes_long_factors_for_a_long_model(tmp_path: Path) -> None:
    theirs = reference("llama", tmp_path, rope_parameters=SCALINGS["longrope-short"])
    check_logits(load_model(tmp_path, device="cpu", max_model_len=65), theirs, prompts(131, 65))
    check_logits(load_model(tmp_path, device="cpu"), theirs, prompts(131, 90))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    heads = data.draw(st.sampled_from([1, 3, 5, 6, 7]), "heads")
    family = data.draw(st.sampled_from(["llama", "qwen2", "qwen3"]), "family")
    options: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": data.draw(
            st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0]), "kv heads"
        ),
        "head_dim": data.draw(st.sampled_from([2, 10, 16, 24]), "head size"),
        "hidden_size": heads * data.draw(st.integers(3, 13), "width a head"),
        "intermediate_size": data.draw(st.integers(1, 100), "feed-forward"),
        "vocab_size": data.draw(st.sampled_from([97, 131, 193]), "vocabulary"),
        "num_hidden_layers": data.draw(st.integers(1, 3), "layers"),
        "tie_word_embeddings": data.draw(st.booleans(), "tied"),
        "rms_norm_eps": data.draw(st.sampled_from([1e-6, 1e-5, 1e-2]), "eps"),
    }
    if family != "qwen2":
        options["attention_bias"] = data.draw(st.booleans(), "bias")
    directory = tmp_path_factory.mktemp("random")
    theirs = reference(family, directory, seed=data.draw(st.integers(0, 99), "seed"), **options)
    check_logits(load_model(directory, device="cpu"), theirs, prompts(options["vocab_size"], 11, 2))


def test_how_a_sequence_is_cut_does_not_matter(tmp_path: Path) -> None:
    """One step, or chunks with the rows of two sequences mixed: the same logits."""
    reference("qwen3", tmp_path, head_dim=16)
    model = load_model(tmp_path, device="cpu", dtype="float64")
    first, second = prompts(131, 12, 9)
    whole = dense_logits(model, [first, second])
    cache = DenseCache(model.layer_states())
    rows = [(0, t) for t in range(5)], [(1, 0), (0, 5), (1, 1), (0, 6)], [(0, t) for t in range(7, 12)]
    rest = [(1, t) for t in range(2, 9)]
    got: dict[tuple[int, int], torch.Tensor] = {}
    with torch.inference_mode():
        for step in (*rows, rest):
            tok_R = torch.tensor([(first, second)[s][t] for s, t in step])
            ctx = cache.step([s for s, _ in step], [t for _, t in step])
            got |= dict(zip(step, model.logits(model(tok_R, ctx)), strict=True))
            assert ctx.layers == [0, 1]
    for s, logits in enumerate(whole):
        for t, row in enumerate(logits):
            assert distance(got[s, t], row) < 1e-12


def test_types(tmp_path: Path) -> None:
    """float64 gives float64 logits; half types give float32 logits, no further off than those of transformers.

    The error of one set of weights is mostly chance, so the mean over several is compared.
    """
    sequences = prompts(131, 10)
    errors: dict[torch.dtype, list[tuple[float, float]]] = {}
    for seed in range(4):
        directory = tmp_path / str(seed)
        theirs = reference("llama", directory, seed=seed)
        exact = dense_logits(load_model(directory, device="cpu", dtype="float64"), sequences)[0]
        assert exact.dtype == torch.float64
        assert distance(exact, reference_logits(theirs, sequences[0]).double()) < BOUND
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = load_model(directory, device="cpu", dtype=dtype)
            assert model.embed_VE.dtype == dtype
            logits = dense_logits(model, sequences)[0]
            assert logits.dtype == dtype
            peer = distance(reference_logits(theirs.to(dtype), sequences[0]).double(), exact)
            errors.setdefault(dtype, []).append((distance(logits.double(), exact), peer))
    for pairs in errors.values():
        ours, peers = zip(*pairs, strict=True)
        assert sum(ours) < 1.5 * sum(peers)


def test_layer_states(tmp_path: Path) -> None:
    family, options = OPTIONS["qwen2-windows"]
    reference(family, tmp_path, **options)
    states = load_model(tmp_path, device="cpu").layer_states()
    assert states == [LayerState("paged", 1, 12, 12)] + [LayerState("window", 1, 12, 12, window=5)] * 2


def test_input_is_left_alone(tmp_path: Path) -> None:
    """The residual stream is updated in place; embedding and tokens must not be."""
    reference("llama", tmp_path)
    model = load_model(tmp_path, device="cpu")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert torch.equal(dense_logits(model, [[1, 2, 3]])[0], dense_logits(model, [[1, 2, 3]])[0])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
