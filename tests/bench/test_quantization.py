"""The benchmark of quantised weights, on a small model and a small text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import reference

from headrace.bench.quantization import windows
from headrace.cli import main
from headrace.llm import BUNDLED_MODEL


@pytest.mark.parametrize(("length", "window"), [(1, 8), (2, 8), (8, 8), (9, 8), (13, 8), (100, 8), (100, 7)])
def test_every_token_is_scored_once(length: int, window: int) -> None:
    scored: list[int] = []
    for start, end, first in windows(length, window):
        assert end - start <= window
        assert start < first
        assert start == 0 or first - start >= window // 2
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    reference(
        "llama",
        model,
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_hidden_layers=1,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, model / name)
    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 10)
    words = ["bench", "quantization", "--model", str(model), "--text", str(text), "--group-sizes", "32", "--steps", "2"]
    words += ["--batch-sizes", "1", "--repeats", "1", "--calibration-tokens", "300"]
    assert main([*words, "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]) == 0
    assert "| awq    | GPTQ " in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["layout"] for row in rows] == ["dense", "fp8", "awq", "gptq", "awq", "gptq", "gptq"]
    assert [row["bits a weight"] for row in rows[:3]] == ["32.00", "8.46", "5.25"]
    assert float(rows[1]["bits per byte"]) == pytest.approx(float(rows[0]["bits per byte"]), rel=0.05)
    assert (tmp_path / "out.md").read_text().startswith("# Quantised weights")
    assert main([*words[:4], "--text", str(tmp_path / "none.py")]) == 2
