"""Every family divided among ranks: the logits of the whole model, from shares that are slices of its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from dense_context import dense_logits
from test_model_parity import OPTIONS
from threads import ThreadRanks, on_ranks
from tiny_models import CLASSES, reference

from headrace.errors import ConfigError
from headrace.layers.placement import Pieces, Placement, check_divisible
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.models.registry import build_model, read_config
from headrace.ranks import ONE, Ranks

NAMES = [next(name for name, (family, _) in OPTIONS.items() if family == wanted) for wanted in CLASSES]
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96}
"""What 2 and 4 ranks can divide; 4 have each key/value head twice."""
SEQUENCES = [[(7 * i + 3 * j) % 131 for i in range(9 + j)] for j in range(3)]


def make(name: str, directory: Path) -> None:
    family, options = OPTIONS[name]
    even = {key: value for key, value in EVEN.items() if options.get(key) is not ...}
    if family.startswith("deepseek"):
        even["num_key_value_heads"] = 4
    reference(family, directory, **(options | even))


def share(directory: Path, ranks: Ranks) -> tuple[CausalLM, list[torch.Tensor]]:
    model = load_model(directory, device="cpu", dtype="float64", ranks=ranks)
    return model, dense_logits(model, SEQUENCES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_two_and_four_ranks(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    whole, expected = share(tmp_path, Ranks())
    for size in (2, 4):
        parts = on_ranks(size, lambda ranks: share(tmp_path, ranks))
        for model, logits in parts:
            torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)
            assert all(map(torch.equal, logits, parts[0][1])), "all ranks have the same bits"
            # Norms and what stands outside the layers are whole on each; of the rest a rank has its share.
            assert heavy(model) < heavy(whole) / size * 1.5
        slices(parts[1][0], whole)


def heavy(model: CausalLM) -> int:
    """Numbers of the matrices in the layers."""
    return sum(w.numel() for name, w in model.named_parameters() if name.startswith("blocks") and w.dim() > 1)


def slices(model: CausalLM, whole: CausalLM) -> None:
    """Every tensor of a share is the slice of the whole one that it says it is."""
    tensors = whole.tensors()
    cut = 0
    for name, views in model.tensors().items():
        where = views.where if isinstance(views, Pieces) else [()] * len(views)
        if isinstance(views, Pieces) and len(tensors[name]) == 1:
            assert views.shape == tensors[name][0].shape
            cut += 1
        for view, place, source in zip(views, where, tensors[name] * len(views), strict=False):
            assert torch.equal(view, source[place])
    assert cut >= 5


def test_reductions_of_a_layer(tmp_path: Path) -> None:
    """Two for each layer: behind the attention and behind the feed-forward layer."""
    make("llama", tmp_path)

    def count(ranks: Ranks) -> int:
        share(tmp_path, ranks)
        assert isinstance(ranks, ThreadRanks)
        return ranks.reduced

    assert on_ranks(2, count) == [4, 4]


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt-oss"])
def test_random_weights_are_those_of_one_rank(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    whole = load_model(tmp_path, device="cpu", dtype="float64", load_format="random", seed=5)
    for rank in range(2):
        slices(
            load_model(tmp_path, device="cpu", dtype="float64", load_format="random", seed=5, ranks=Ranks(rank, 2)),
            whole,
        )


@pytest.mark.parametrize(
    ("name", "changes", "size", "words"),
    [
        ("llama", {}, 3, "num_attention_heads = 4, which cannot be divided"),
        ("llama", {"intermediate_size": 97}, 2, "feed-forward width = 97"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}, 2, "num_key_value_heads = 3"),
        ("mixtral", {"intermediate_size": 99}, 2, "feed-forward width of experts = 99"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], size: int, words: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    place = Placement(torch.device("meta"), torch.float32, ranks=Ranks(0, size))
    with pytest.raises(ConfigError, match=words) as refusal:
        build_model(read_config(tmp_path), max_model_len=None, place=place)
    assert f"tensor_parallel_size is {size}" in str(refusal.value)


def test_what_layers_cannot_divide_is_refused(tmp_path: Path) -> None:
    """A deployment adds a field to the placement: beside ranks it is refused until somebody lists it as divided."""

    class Wider(NamedTuple):
        device: torch.device
        dtype: torch.dtype
        ranks: Ranks = ONE
        storage: str | None = None

    check_divisible(Wider(torch.device("meta"), torch.float32, ONE, "int4"))  # type: ignore[arg-type]
    check_divisible(Wider(torch.device("meta"), torch.float32, Ranks(0, 2)))  # type: ignore[arg-type]
    make("llama", tmp_path)
    place: Any = Wider(torch.device("meta"), torch.float32, Ranks(0, 2), "int4")
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, and the model is loaded with storage"):
        build_model(read_config(tmp_path), max_model_len=None, place=place)


def test_one_rank_reads_no_more_than_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.models import streaming

    make("llama", tmp_path)
    read = 0
    honest = streaming.safe_open

    class Counting:
        def __init__(self, file: Any, **options: Any) -> None:
            self.file = honest(file, **options).__enter__()

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None: ...

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return Slice(self.file.get_slice(name))

        def get_tensor(self, name: str) -> torch.Tensor:
            return counted(self.file.get_tensor(name))

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.get_shape, self.get_dtype, self.inner = inner.get_shape, inner.get_dtype, inner

        def __getitem__(self, where: Any) -> torch.Tensor:
            return counted(self.inner[where])

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read += x.numel()
        return x

    monkeypatch.setattr(streaming, "safe_open", Counting)
    counts = []
    for ranks in (Ranks(), Ranks(0, 2), Ranks(1, 2)):
        read = 0
        model = load_model(tmp_path, device="cpu", dtype="float64", ranks=ranks)
        assert read == sum(p.numel() for p in model.parameters())
        counts.append(read)
    assert counts[1] == counts[2] < counts[0]
