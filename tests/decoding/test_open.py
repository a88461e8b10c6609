"""A new method is one file: the engine runs it without having heard of it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from tiny import VOCAB, alone_of, make_engine, run_all

import headrace.engine
from headrace.params import SamplingParams
from headrace.parts import DECODERS, REGISTRIES

SOURCE = '''
"""Drafts the token before last, again and again."""

import torch

from headrace.decoding.base import DECODERS
from headrace.decoding.chain import ChainDecoder


@DECODERS.register("echo", label="exact", summary="Drafts an echo.")
class Echo(ChainDecoder):
    def propose(self, seg, room_B):
        n_B = seg.table.n_tok[seg.reqs_B].long()
        echo_B = seg.table.hist[seg.reqs_B, (n_B - 2).clamp(min=0)]
        return echo_B[:, None].repeat(1, self.most), room_B.int()
'''


def test_a_decoder_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "echo.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("echo", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        engine = make_engine(decoder="echo")
        requests = [
            engine.add([(i * k) % VOCAB for k in range(9)], SamplingParams(max_tokens=12, seed=i), request_id=str(i))[0]
            for i in range(5)
        ]
        run_all(engine)
        engine.check_idle()
        for request in requests:
            assert (tuple(request.output_ids), request.finish.reason) == alone_of(request)
    finally:
        DECODERS.remove("echo")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda r: r.seam)
def test_the_engine_knows_no_part_by_name(registry: object) -> None:
    names = {part.name for part in registry}  # type: ignore[attr-defined]
    found = []
    for path in Path(headrace.engine.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            said: list[str] = []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said = [node.value]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                said = [word for alias in node.names for word in alias.name.split(".")]
                said += (getattr(node, "module", None) or "").split(".")
            found += [f"{path.name}:{node.lineno} names {word}" for word in said if word in names]
    assert not found
