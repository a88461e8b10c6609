"""The command line, as a person uses it."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cli import main
from headrace.config import EngineConfig
from headrace.params import SamplingParams

ENGINE = ["--device", "cpu", "--kv-cache-gib", "0.1", "--max-num-batched-tokens", "128"]
SCORED = {"prompt_logprobs": 0}


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_completions_go_to_a_file_in_the_order_of_the_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        {"id": "a", "prompt": "def add(a, b):\n", "kind": "kept"},
        {"id": "b", "prompt": "import os\n", "params": {"max_tokens": 3, "n": 2}},
        {
            "id": "c",
            "prompt_token_ids": [5, 6, 7],
            "params": {"detokenize": False, "logprobs": 1, "prompt_logprobs": 0},
        },
    ]
    source, target = write_jsonl(tmp_path / "in.jsonl", *records), tmp_path / "made" / "out.jsonl"
    status = main(
        ["generate", str(source), "-o", str(target), "--max-tokens", "6", "--seed", "1", "--ignore-eos", *ENGINE]
    )
    assert status == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["kind"] == "kept"
    assert lines[0]["seed"] == 1
    assert lines[0]["output_tokens"] == 6
    assert len(lines[1]["samples"]) == 2
    assert len(lines[2]["token_ids"]) == len(lines[2]["logprobs"]) == 6
    assert lines[2]["prompt_logprobs"][0] is None
    assert list(lines[2]["prompt_logprobs"][1]) == ["6"]
    shown = capsys.readouterr().err
    assert "3 completions in" in shown
    assert "TTFT ms" in shown
    assert not list(tmp_path.glob("made/*.partial"))


def test_comparison_with_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.jsonl"
    status = main(
        ["generate", "-p", "a = ", "-p", "b = ", "-o", str(target), "--compare", "--max-tokens", "4", *ENGINE]
    )
    assert status == 0
    shown = capsys.readouterr().err
    assert "one at a time" in shown
    assert "times as fast" in shown


def test_completions_go_to_standard_output_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x = ", "--max-tokens", "2", *ENGINE]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "x = "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1: not JSON"),
        ('{"text": "x"}', 'line 1: needs "prompt"'),
        ('{"prompt": "x", "params": {"temp": 1}}', "line 1: params"),
        ('{"prompt": "x", "params": {"top_p": 0}}', "top_p is 0"),
        ('{"prompt_token_ids": [99999]}', "token id 99999"),
        ("", "there is nothing to complete"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n")
    assert main(["generate", str(source), "-o", str(tmp_path / "out"), *ENGINE]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("headrace: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_missing_model_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["generate", "-p", "x", "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_chat_streams_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("print hello\n\nand again\n"))
    assert main(["chat", "--system", "be brief", "--max-tokens", "8", "--temperature", "0", *ENGINE]) == 0
    assert capsys.readouterr().out.strip()


def test_help_names_every_option_without_loading_torch() -> None:
    for command in ("generate", "chat"):
        shown = subprocess.run(
            [sys.executable, "-m", "headrace.cli", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for kind in (EngineConfig, SamplingParams):
            for spec in dataclasses.fields(kind):
                if spec.name in ("logit_bias", "n", "logprobs", "prompt_logprobs", "detokenize", "skip_tokenizer_init"):
                    continue
                assert "--" + spec.name.replace("_", "-") in shown
        probe = f"import sys, headrace.commands.{command}; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", probe], check=True)
