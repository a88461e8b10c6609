"""Rules of the seam, each broken once: the comparison with plain decoding has to notice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tenants
import torch
from tiny import VOCAB, alone_of, make_engine, run_all

from headrace.cache.manager import CacheManager
from headrace.decoding.base import Segment
from headrace.decoding.chain import ChainDecoder
from headrace.engine import runner
from headrace.engine.commit import apply_commit
from headrace.errors import HeadraceError
from headrace.kernels.advance import Advanced
from headrace.params import SamplingParams
from headrace.step import Commit
from headrace.tables import RequestTable

PROMPTS = [tuple((3 * i * (j + 2) + j) % VOCAB for i in range(6 + 5 * j)) for j in range(3)]


@pytest.fixture(autouse=True)
def _tenants() -> Iterator[None]:
    with tenants.registered(*tenants.TENANTS.items()):
        yield


def equals_plain(name: str) -> bool:
    """Whether a decoder with right and wrong drafts, and a stop token among them, equals plain decoding."""
    for seed, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.8, max_tokens=18, seed=seed, presence_penalty=0.4, ignore_eos=True)
        engine = make_engine()
        (plain,) = engine.add(prompt, params, request_id="plain")
        run_all(engine)
        tenants.teach(prompt, tuple(plain.output_ids))
        for stops in ([], [plain.output_ids[10]]):
            engine = make_engine(decoder=name, draft_tokens=3)
            (request,) = engine.add(prompt, replace(params, stop_token_ids=stops), request_id="r")
            try:
                run_all(engine)
                engine.check_idle()
            except (HeadraceError, IndexError):
                return False
            if (tuple(request.output_ids), request.finish.reason) != alone_of(request):
                return False
    return True


@pytest.mark.parametrize("name", ["test_tree", "test_sometimes_right"])
def test_nothing_broken(name: str) -> None:
    assert equals_plain(name)


def test_accepted_keys_that_do_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheManager, "move", lambda *_: None)
    assert not equals_plain("test_tree")


def test_a_commit_without_the_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclamped(table: RequestTable, reqs_B: torch.Tensor, commit: Commit) -> Advanced:
        stops = table.stop_ids.clone()
        table.stop_ids.fill_(-1)
        done = apply_commit(table, reqs_B, commit)
        table.stop_ids.copy_(stops)
        return done

    monkeypatch.setattr(runner, "apply_commit", unclamped)
    assert not equals_plain("test_sometimes_right")


def test_noise_of_the_wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChainDecoder, "shift", 2)
    assert not equals_plain("test_sometimes_right")


def test_a_walk_that_believes_every_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ChainDecoder.resolve

    def gullible(self: ChainDecoder, seg: Segment, id_M: torch.Tensor, hidden_ME: torch.Tensor) -> Commit:
        commit = right(self, seg, id_M, hidden_ME)
        count_B = self.count_B[seg.reqs_B]
        extra_B = torch.where(commit.n_emit > 0, count_B + 1 - commit.n_emit, 0)
        return replace(commit, n_kv=commit.n_kv + extra_B, n_emit=commit.n_emit + extra_B)

    monkeypatch.setattr(ChainDecoder, "resolve", gullible)
    assert not equals_plain("test_sometimes_right")


def test_penalties_that_forget_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChainDecoder, "paths", lambda *_: None)
    assert not equals_plain("test_always_right")


def test_a_mask_that_shows_the_other_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_visible(self: Segment, where_X: torch.Tensor, sees_Xk: Any) -> None:
        self.rows.bits[where_X] = -1

    monkeypatch.setattr(Segment, "mask_rows", all_visible)
    assert not equals_plain("test_tree")
