"""The start: what is loaded for it, how long its stages take, and what it shows of them."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import llama_tensors, write_single

from headrace.llm import LLM
from headrace.models import streaming
from headrace.models.streaming import Entry, stream_tensors
from headrace.progress import Stages

HEAVY = """
    transformers pyarrow pandas scipy sklearn matplotlib sympy xgrammar pydantic hypothesis huggingface_hub requests
    httpx aiohttp torch._dynamo torch._inductor torchvision triton
""".split()
"""What no start needs that loads a directory on the CPU. Each costs up to a second, and tests could load it too."""

IMPORTED = "import headrace.llm"
OUTLINED = """
import torch
from headrace.llm import BUNDLED_MODEL
from headrace.layers.placement import Placement
from headrace.models.registry import build_model, read_config
place = Placement(torch.device("meta"), torch.bfloat16)
build_model(read_config(BUNDLED_MODEL), max_model_len=None, place=place).tensors()
"""
STAGES = ["device", "tokenizer", "outline", "weights", "parts", "cache", "warm-up", "row budget", "trial copy"]
RUN = """
from headrace import LLM, SamplingParams
LLM(num_pages=64, max_num_batched_tokens=16).generate("a", SamplingParams(max_tokens=1))
"""


@pytest.mark.parametrize(
    ("code", "heavy"),
    [(IMPORTED, [*HEAVY, "numba"]), (IMPORTED + OUTLINED, [*HEAVY, "numba"]), (RUN, HEAVY)],
    ids=["imported", "outlined", "run"],
)
def test_nothing_heavy_is_imported_that_is_not_needed(code: str, heavy: list[str]) -> None:
    """With numba left to where a kernel of the CPU runs: a process on a GPU needs none."""
    probe = f"{code}\nimport json, sys; print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == []


def test_an_engine_says_how_long_its_start_took(capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(num_pages=64)
    assert list(llm.engine.start_times_s) == STAGES
    assert all(seconds > 0 for seconds in llm.engine.start_times_s.values())
    assert "headrace:" not in capsys.readouterr().err  # it is no terminal


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "shown"),
    [
        (_Terminal(), None, "\r\x1b[Kheadrace: weights ... 1.0 of 2.0 GiB, 0 s|\r\x1b[Kheadrace: weights: 0."),
        (_Terminal(), False, ""),
        (io.StringIO(), None, ""),
        (io.StringIO(), True, "headrace: weights ...\n|headrace: weights: 0."),
    ],
)
def test_a_stage_is_shown_once_it_takes_long(
    stream: Any, show: bool | None, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.progress.PATIENCE_S", 0.1)
    monkeypatch.setattr("headrace.progress.REFRESH_S", 0.01)
    stages = Stages(show, stream)
    with stages.stage("outline"):
        pass
    with stages.stage("weights", 2**31) as advance:
        advance(2**30)
        time.sleep(0.3)
    with pytest.raises(ZeroDivisionError), stages.stage("weights"):
        raise ZeroDivisionError
    assert list(stages.seconds) == ["outline", "weights"]
    assert stages.seconds["outline"] < 0.1 < 0.3 < stages.seconds["weights"]
    assert str(stages).startswith("outline 0.0")
    for part in shown.split("|"):
        assert part in stream.getvalue()
    assert bool(shown) == bool(stream.getvalue())
    assert "outline" not in stream.getvalue()


def test_readers_bring_what_a_plain_copy_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads, with tensors larger than their buffers, transposed views, other types, and parts of tensors."""
    monkeypatch.setattr(streaming, "STAGING_BYTES", 100)
    torch.manual_seed(0)
    stored = {
        "small": torch.randn(7),
        "large": torch.randn(40, 9),
        "wide": torch.randn(3, 90),
        "codes": torch.randint(-9, 9, (4, 30), dtype=torch.int32),
        "half": torch.randn(5, 6).bfloat16(),
        "one": torch.randn(()),
        "tiny": torch.tensor([1.0, 1e30, 3.0]),
        "none": torch.randn(0, 4),
        **{f"more.{i}": torch.randn(11, 5) for i in range(20)},
    }
    entries: dict[str, Entry] = {}
    for number, names in enumerate((list(stored)[:9], list(stored)[9:])):
        path = tmp_path / f"{number}.safetensors"
        save_file({name: stored[name] for name in names}, path)
        entries |= {name: Entry(path, tuple(stored[name].shape), "", name) for name in names}
    loaded = []
    for readers in (0, 3):
        places = {name: [torch.empty_like(x)] for name, x in stored.items()}
        places["large"] = [torch.empty(9, 40).t()]
        places["half"] = [torch.empty(5, 6)]
        places["tiny"] = [torch.empty(3, dtype=torch.float16)]
        whole = stored["wide"].shape
        places["wide"] = streaming.Pieces([torch.empty(3, 50)], whole, [(slice(None), slice(20, 70))])
        counts: list[int] = []
        overflow = stream_tensors(
            places, entries, lambda to, of: to is torch.float16 and of is torch.float32, counts.append, readers
        )
        assert overflow == ["tiny"]
        assert sum(counts) == sum(v.numel() * v.itemsize for views in places.values() for v in views)
        loaded.append({name: views[0] for name, views in places.items()})
    plain, threaded = loaded
    for name, tensor in plain.items():
        assert torch.equal(tensor, threaded[name]), name
    assert torch.equal(threaded["wide"], stored["wide"][:, 20:70])
    assert torch.equal(threaded["large"], stored["large"])
    assert torch.equal(threaded["half"], stored["half"].float())


def test_an_error_in_a_reader_is_the_callers(tmp_path: Path) -> None:
    path = tmp_path / "0.safetensors"
    save_file({str(i): torch.randn(3) for i in range(50)}, path)
    entries = {str(i): Entry(path, (3,), "F32", str(i)) for i in range(50)}
    places = {name: [torch.empty(4 if name == "9" else 3)] for name in entries}
    with pytest.raises(RuntimeError, match="shape"):
        stream_tensors(places, entries, lambda to, of: False, lambda n: None, 2)


@pytest.mark.gpu
def test_a_gpu_gets_the_same_weights_as_the_cpu(tmp_path: Path) -> None:
    from headrace.models.checkpoint import load_model

    write_single(tmp_path, llama_tensors())
    on_cpu = load_model(tmp_path, device="cpu", dtype="float32")
    on_gpu = load_model(tmp_path, device="cuda", dtype="float32")
    for (name, a), (_, b) in zip(on_cpu.named_parameters(), on_gpu.named_parameters(), strict=True):
        assert torch.equal(a, b.cpu()), name


def test_the_collector_leaves_out_what_was_there_before_the_engine() -> None:
    """A full collection in the middle of a run would go over all that was imported; afterwards all is as it was."""
    gc.unfreeze()
    llm = LLM(device="cpu", num_pages=64)
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    engine = weakref.ref(llm.engine)
    del llm
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert engine() is None
