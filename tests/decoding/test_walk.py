"""The walk against its definition, over every draft and every draw of a three-token vocabulary."""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headrace.config import EngineConfig
from headrace.decoding.base import Segment
from headrace.decoding.chain import ChainDecoder
from headrace.decoding.ngram import NGram
from headrace.engine.commit import apply_commit
from headrace.request import Finish
from headrace.step import Commit, RowTable
from headrace.tables import RequestTable

V, K = 3, 3


def decoder() -> ChainDecoder:
    setup: Any = SimpleNamespace(
        config=EngineConfig(draft_tokens=K), max_reqs=4, max_len=32, device=torch.device("cpu")
    )
    return NGram(setup)


def segment(n_tok: int, n_done: int, grant: int, chain: ChainDecoder) -> Segment:
    """One request at index 2, its history all zeros."""
    table = RequestTable(4, 32, [1], torch.device("cpu"))
    table.n_tok[2], table.n_done[2] = n_tok, n_done
    table.kv_len[0, 2] = n_done
    rows = RowTable.allocate(grant, 1, table.ghost, 1, torch.device("cpu"))
    rows.reqs[0], rows.row_ptr[1] = 2, grant
    seg = Segment(table, rows, [grant], [chain.n_outputs(grant)], [n_tok - n_done > 1])
    chain.plan(seg)
    return seg


def drafts(chain: ChainDecoder, tokens: tuple[int, ...]) -> None:
    chain.draft_BK[2, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    chain.count_B[2] = len(tokens)


@pytest.mark.parametrize("pending", [1, 2, 5])
def test_every_walk_follows_the_draws(pending: int) -> None:
    """Emitted: the draws up to the first that its draft does not equal. Committed: the rows before them."""
    for count in range(K + 1):
        for tokens in itertools.product(range(V), repeat=count):
            chain = decoder()
            drafts(chain, tokens)
            seg = segment(7, 7 - pending, pending + count, chain)
            for drawn in itertools.product(range(V), repeat=count + 1):
                lead = seg.outputs[0] - count - 1
                ids = torch.tensor([2] * lead + list(drawn), dtype=torch.int32)
                commit = chain.resolve(seg, ids, torch.zeros(len(ids), 1))
                right = next((i for i in range(count) if tokens[i] != drawn[i]), count)
                assert commit.n_emit.tolist() == [right + 1]
                assert commit.n_kv.tolist() == [pending + right]
                assert commit.emit[0, : right + 1].tolist() == list(drawn[: right + 1])
                assert commit.priced_by[0, : right + 1].tolist() == [lead + i for i in range(right + 1)]


def test_a_chunk_emits_nothing() -> None:
    chain = decoder()
    for grant in range(1, 6):
        seg = segment(9, 3, grant, chain)
        commit = chain.resolve(seg, torch.ones(seg.outputs[0], dtype=torch.int32), torch.zeros(seg.outputs[0], 1))
        assert (commit.n_kv.tolist(), commit.n_emit.tolist()) == ([grant], [0])


def test_the_walk_keeps_the_distribution() -> None:
    """The probability of every emitted beginning equals the product of the target's, to 1e-12, for every draft."""
    generator = torch.Generator().manual_seed(0)
    target = {
        prefix: torch.rand(V, generator=generator, dtype=torch.float64).softmax(0)
        for depth in range(K + 1)
        for prefix in itertools.product(range(V), repeat=depth)
    }
    for tokens in itertools.product(range(V), repeat=K):
        chain = decoder()
        drafts(chain, tokens)
        seg = segment(4, 3, K + 1, chain)
        mass: dict[tuple[int, ...], float] = defaultdict(float)
        for drawn in itertools.product(range(V), repeat=K + 1):
            # Row i sees the drafts before it, so its draw follows the target behind them.
            p = 1.0
            for i, token in enumerate(drawn):
                p *= float(target[tokens[:i]][token])
            commit = chain.resolve(seg, torch.tensor(drawn, dtype=torch.int32), torch.zeros(K + 1, 1))
            mass[tuple(commit.emit[0, : int(commit.n_emit)].tolist())] += p
        assert sum(mass.values()) == pytest.approx(1.0, abs=1e-12)
        for emitted, p in mass.items():
            wanted = 1.0
            for i, token in enumerate(emitted):
                wanted *= float(target[emitted[:i]][token])
            assert p == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("emit", "limit", "stops", "trigger", "expected"),
    [
        # tokens, limit on n_tok (5 known), stop ids, trigger (4 done): committed rows, emitted tokens, finish
        ([1, 2, 0], 100, [], 100, (3, 3, Finish.NONE)),
        ([1, 2, 0], 7, [], 100, (2, 2, Finish.LENGTH)),
        ([1, 2, 0], 8, [], 100, (3, 3, Finish.LENGTH)),
        ([1, 2, 0], 100, [2], 100, (2, 2, Finish.STOP)),
        ([1, 2, 0], 7, [2], 100, (2, 2, Finish.STOP)),
        ([1, 2, 0], 100, [0, 1], 100, (1, 1, Finish.STOP)),
        ([1, 2, 0], 100, [], 6, (2, 2, Finish.NONE)),
        ([1, 2, 0], 100, [2], 5, (1, 1, Finish.NONE)),
        ([1, -1, 0], 100, [], 100, (1, 1, Finish.ERROR)),
        ([-1, 1, 0], 100, [], 100, (0, 0, Finish.ERROR)),
    ],
)
def test_commits_are_clamped(
    emit: list[int], limit: int, stops: list[int], trigger: int, expected: tuple[int, int, Finish]
) -> None:
    table = RequestTable(4, 32, [2, 1], torch.device("cpu"))
    table.n_tok[2], table.n_done[2], table.limit[2], table.trigger[2] = 5, 4, limit, trigger
    table.kv_len[:, 2] = 4
    table.stop_ids[2, : len(stops)] = torch.tensor(stops, dtype=torch.int32)
    three = torch.tensor([3], dtype=torch.int32)
    tokens = torch.tensor([emit], dtype=torch.int32)
    done = apply_commit(table, torch.tensor([2]), Commit(three, three.clone(), tokens, torch.zeros_like(tokens)))
    n_kv, n_emit, finish = expected
    assert (int(done.n_kv_B), int(done.n_emit_B), int(done.finish_B)) == (n_kv, n_emit, finish)
    assert (int(table.n_done[2]), int(table.n_tok[2]), int(table.finish[2])) == (4 + n_kv, 5 + n_emit, finish)
    assert table.hist[2, 5 : 5 + n_emit].tolist() == emit[:n_emit]
    # The clock of a decoder's own model is the decoder's.
    assert table.kv_len[:, 2].tolist() == [4 + n_kv, 4 + n_kv, 4]
