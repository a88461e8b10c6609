"""`headrace bench parity` over a tiny geometry on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_gpu_bench import SMALL, TINY

from headrace.bench import gpu
from headrace.bench.geometry import GEOMETRIES
from headrace.cli import main


def test_both_sides_and_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SIZES", SMALL)
    monkeypatch.setitem(GEOMETRIES, "qwen3-0.6b", TINY)
    out = tmp_path / "out.json"
    sizes = ["--batches", "1", "4", "--context", "30", "--outputs", "40", "--prefill", "2", "50"]
    where = ["--geometry", "qwen3-0.6b", "--device", "cpu", "--json", str(out)]
    assert main(["bench", "parity", *sizes, *where]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["work"] for row in rows] == [
        "decode 1 x 30, ms a token",
        "decode 4 x 30, ms a token",
        "prefill 2 x 50, ms",
        "requests of 2 that differ alone",
    ]
    for row in rows[:3]:
        assert row["off"] > 0
        assert row["on"] > 0
        assert row["cost_percent"] == pytest.approx((row["on"] / row["off"] - 1) * 100, abs=0.1)
    assert rows[3]["on"] == 0


def test_refuses_sizes_that_mean_nothing() -> None:
    assert main(["bench", "parity", "--device", "cpu", "--outputs", "1"]) != 0
    assert main(["bench", "parity", "--device", "cpu", "--batches", "0"]) != 0
