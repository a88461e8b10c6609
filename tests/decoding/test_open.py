"""A new method is one file: the engine runs it without having heard of it."""

from __future__ import annotations

import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import test_chains
import test_eviction_law_one
import test_evictors
from tenants import TENANTS, registered

import headrace.engine
from headrace.parts import DECODERS, EVICTORS, REGISTRIES
from headrace.registry import Registry

DECODER = '''
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


EVICTOR = '''
"""Keeps the first tokens, and every other one behind them."""

import torch

from headrace.eviction.base import EVICTORS, Evictor


@EVICTORS.register("every_other", label="lossy", summary="Keeps every other token.")
class EveryOther(Evictor):
    least_budget = 3

    def score(self, cells):
        place_n = torch.arange(cells.n, device=cells.device)
        return (place_n % 2 == 0).float() - place_n / 2**20
'''


@contextmanager
def part_from_a_file(path: Path, source: str, registry: Registry[Any], name: str) -> Iterator[None]:
    """What a user does with a method of their own: write the file, import it, name it."""
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    try:
        yield
    finally:
        registry.remove(name)


def test_a_decoder_from_a_file(tmp_path: Path, drafter: str) -> None:
    """The suites of decoders run on it as they are."""
    with part_from_a_file(tmp_path / "echo.py", DECODER, DECODERS, "echo"), registered(*TENANTS.items()):
        for draft_tokens in (1, 4):
            test_chains.test_tokens_equal_plain_decoding("echo", draft_tokens, drafter)
        events: Counter[str] = Counter()
        test_chains.test_padded_and_replayed_steps_bring_the_same_tokens("echo", drafter, events)
        assert events["runs of decoders that are not captured"] == 3
        for evictor in ("streaming_llm", "key_norm"):
            test_eviction_law_one.test_drafts_across_a_trigger_keep_the_same_slots(evictor, "echo")


def test_an_evictor_from_a_file(tmp_path: Path) -> None:
    """The suites of evictors run on it as they are."""
    with part_from_a_file(tmp_path / "every_other.py", EVICTOR, EVICTORS, "every_other"):
        name = "every_other"
        test_evictors.test_an_unbounded_budget_is_the_whole_cache(name)
        for rows in (1, 4, 4096):
            test_evictors.test_a_compacted_cache_is_dense_attention_under_its_mask(name, rows)
        test_evictors.test_triggers_and_lengths_depend_on_the_request_alone(name)
        for page_size in (1, 4, 16):
            test_evictors.test_pages_return_and_what_is_reported_is_what_is_allocated(name, page_size)
        test_evictors.test_published_pages_survive_for_others(name)
        test_evictors.test_a_hit_changes_no_token_and_what_is_evicted_is_never_published(name)
        test_evictors.test_preempted_anywhere_it_continues_with_the_same_tokens(name)
        test_evictors.test_a_record_continues_under_the_same_eviction_or_not_at_all(name)
        test_evictors.test_samples_share_a_prompt_that_is_not_evicted(name)
        test_eviction_law_one.test_drafts_across_a_trigger_keep_the_same_slots(name, "ngram")


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
