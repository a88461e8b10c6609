"""Constraints and tools from the command line."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from headrace.cli import main
from headrace.llm import BUNDLED_MODEL

ENGINE = ["--device", "cpu", "--kv-cache-gib", "0.1", "--max-num-batched-tokens", "128"]
TOOL = {"type": "function", "function": {"name": "halt", "parameters": {"type": "object", "properties": {}}}}


def test_generate_reads_constraints_from_words_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}))
    common = ["generate", "-p", "x = ", "--max-tokens", "90", "--seed", "2", *ENGINE]
    assert main([*common, "--json-schema", f"@{schema}"]) == 0
    values = json.loads(json.loads(capsys.readouterr().out)["text"])
    assert values
    assert all(isinstance(value, bool) for value in values)
    assert main([*common, "--regex", "[a-f]{4}"]) == 0
    assert re.fullmatch("[a-f]{4}", json.loads(capsys.readouterr().out)["text"])
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"prompt": "x", "params": {"choice": ["one", "two"]}}) + "\n")
    assert main(["generate", str(lines), "--seed", "2", *ENGINE]) == 0
    assert json.loads(capsys.readouterr().out)["text"] in ("one", "two")


def test_a_file_that_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "-p", "x", "--grammar", f"@{tmp_path}/none.ebnf", *ENGINE]) != 0
    assert "none.ebnf cannot be read" in capsys.readouterr().err


def test_chat_calls_a_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundled model with a template that reads tools."""
    for source in BUNDLED_MODEL.iterdir():
        if source.name != "tokenizer_config.json":
            (tmp_path / source.name).symlink_to(source)
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ messages[-1].content }}{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("stop it\n"))
    chat = ["chat", "--model", str(tmp_path), "--max-tokens", "120", "--seed", "1", "--tools", json.dumps([TOOL])]
    assert main([*chat, "--tool-choice", "halt", *ENGINE]) == 0
    assert "[call] halt {}" in capsys.readouterr().out
    assert main(["chat", "--tools", "[", *ENGINE]) != 0
    assert "--tools is no JSON" in capsys.readouterr().err
