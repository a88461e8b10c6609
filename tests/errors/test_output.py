"""Output files when the disk is full, the reader goes away, or the text has no place in the encoding."""

from __future__ import annotations

import io
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import IO, Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_interrupt import write_prompts

from headrace.cli import main
from headrace.commands.output import Lines
from headrace.errors import OutputError
from tools.bad_input import Bench, FullDisk


def run_cli(*words: str, stdout: Any) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with output that is buffered until its end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "headrace.cli", *words]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, check=False, timeout=60
    )


def test_a_full_disk_keeps_whole_lines_in_order(tmp_path: Path, events: Counter[str]) -> None:
    """Room for any number of bytes, lines that come in any order, refusals at any write or at the end."""
    events.update({"all kept": 0, "some kept": 0, "none kept": 0, "refused at the end": 0, "out of order": 0})

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        order=st.permutations(range(5)),
        room=st.integers(0, 140),
        at_close=st.booleans(),
        older=st.booleans(),
    )
    def run(order: list[int], room: int, at_close: bool, older: bool) -> None:
        path = tmp_path / "out.jsonl"
        path.unlink(missing_ok=True)
        if older:
            path.write_text("older\n")
        lines = Lines(path, 5, opener=lambda p: cast("IO[bytes]", FullDisk(p, room, at_close)))
        error = None
        try:
            for place in order:
                lines.put(place, {"id": place, "text": "ü" * place})
            lines.close()
        except OutputError as caught:
            error = str(caught)
            lines.abandon()
        assert [p.name for p in tmp_path.iterdir()] == (["out.jsonl"] if path.exists() else [])
        text = path.read_text() if path.exists() else ""
        events["out of order"] += order != sorted(order)
        if error is None:
            assert [json.loads(line)["id"] for line in text.splitlines()] == list(range(5))
            events["all kept"] += 1
            return
        assert error.startswith(f"{path}: No space left on device; ")
        kept = [] if text in ("", "older\n") else [json.loads(line)["id"] for line in text.splitlines()]
        assert kept == list(range(len(kept)))
        assert text == "" or text.endswith("\n")
        if kept:
            assert f"{len(kept)} of 5 completions are in {path}" in error
            events["some kept"] += 1
        else:
            assert "none was kept" in error
            assert text == ("older\n" if older else "")
            events["refused at the end" if room >= 140 or "run again" in error else "none kept"] += 1

    run()


def test_a_limit_of_the_system_keeps_whole_lines(tmp_path: Path) -> None:
    """A real refusal in the middle of a line, by the limit on the size of files."""
    path = tmp_path / "out.jsonl"
    lines = Lines(path, 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        for place in range(20):
            lines.put(place, {"id": place, "text": "x" * 100})

    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = f"8 of 20 completions are in {path}"
    assert str(caught.value) == f"{path}: File too large; {kept}: make room and run the others"
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(8))
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def small(bench: Bench) -> list[str]:
    """Arguments for the tiny model."""
    words = "--device cpu --num-pages 96 --page-size 4 --max-num-seqs 2 --max-num-batched-tokens 16".split()
    return ["--model", str(bench.model), *words]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_standard_output_that_is_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["generate", "-p", "ab", "--max-tokens", "2", *small(bench)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "headrace: standard output: No space left on device; 0 of 1 completions were written: make room and run again"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_the_last_flush_of_a_process_is_quiet() -> None:
    """What could not be written is not tried again, with a traceback, when the interpreter ends."""
    with open("/dev/full", "w") as full:
        ended = run_cli("--help", stdout=full)
    assert (ended.returncode, ended.stderr) == (1, "headrace: standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    ended = run_cli("--help", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_reader_that_goes_away_is_no_error(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`| head -1`: status 141, nothing is said, and the other prompts are not run."""
    source = write_prompts(tmp_path / "in.jsonl", 3000)
    reader, writer = os.pipe()
    first: list[bytes] = []

    def head() -> None:
        with os.fdopen(reader, "rb") as lines:
            first.append(lines.readline())

    thread = threading.Thread(target=head)
    thread.start()
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["generate", str(source), "--max-tokens", "4", *small(bench)]) == 141
    thread.join()
    assert json.loads(first[0])["id"] == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith(("loading", "model ready"))] == []


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    """Standard output by its name; a device must never be replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    lines = Lines(pipe, 1)
    lines.put(0, {"text": "a"})
    lines.close()
    assert os.read(reader, 100) == b'{"text": "a"}\n'
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lines = Lines(tmp_path / "link", 1)
    lines.put(0, {})
    lines.close()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "{}\n"


def test_halves_of_surrogate_pairs_are_escaped(tmp_path: Path) -> None:
    """JSON may bring them in, and UTF-8 cannot hold them."""
    lines = Lines(tmp_path / "out.jsonl", 2)
    lines.put(0, {"id": "\ud800", "text": "ü"})
    lines.put(1, {"text": "ü"})
    lines.close()
    data = (tmp_path / "out.jsonl").read_bytes()
    assert data == b'{"id": "\\ud800", "text": "\\u00fc"}\n' + '{"text": "ü"}\n'.encode()


def test_separators_of_unicode_do_not_cut_a_line(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """U+2028 and U+0085 may stand in JSON as they are."""
    prompts = ["a\u2028b", "a\u0085b", "c\r"]
    source = tmp_path / "in.jsonl"
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\r\n" for prompt in prompts)
    source.write_bytes("\ufeff".encode() + text.encode())
    assert main(["generate", str(source), "--max-tokens", "2", *small(bench)]) == 0
    shown = capsys.readouterr().out.split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in shown] == prompts


def test_token_ids_are_keys_in_json(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """logit_bias: JSON has no other keys than texts."""
    source = tmp_path / "in.jsonl"
    params = {"logit_bias": {"9": 1000.0}, "max_tokens": 3, "detokenize": False, "ignore_eos": True}
    source.write_text(json.dumps({"prompt_token_ids": [5], "params": params}))
    assert main(["generate", str(source), *small(bench)]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == [9, 9, 9]


def test_chat_goes_on_after_a_line_that_is_no_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nhello\n"), encoding="utf-8"))
    assert main(["chat", "--max-tokens", "2", *small(bench)]) == 0
    assert "[the line is not utf-8 (byte 0): type it again]" in capsys.readouterr().err
