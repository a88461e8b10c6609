"""Forwards in recorded pieces: what is recorded when, and that tokens are those of steps that run as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB, alone_of, cut, examples, make_engine, pad, run_all
from torch import Tensor

from headrace.config import EngineConfig
from headrace.engine import graphs, pieces
from headrace.engine.engine import Engine
from headrace.engine.graphs import BUCKETS, sizes
from headrace.engine.pieces import Call, PieceContext, StepPieces
from headrace.engine.sizing import choose_pages
from headrace.errors import CapacityError, InvariantError
from headrace.params import SamplingParams
from headrace.request import Finish, PositionLogprobs, Request
from headrace.step import RowTable

CPU = torch.device("cpu")


@given(most=st.integers(1, 20_000))
@settings(deadline=None)
def test_a_full_step_is_a_size_and_a_wide_one_is_padded_by_an_eighth_at_most(most: int) -> None:
    found = sizes(most)
    assert found[-1] == most
    assert found == sorted(set(found))
    for size, after in pairwise(found):
        if size >= BUCKETS[-1]:
            assert after - size <= size // 8
    assert sizes(8192)[-9:-1] == [4096, 4608, 5120, 5632, 6144, 6656, 7168, 7680]


def test_a_step_has_the_smallest_shape_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = StepPieces(CPU, 4096, 1)
    assert mine.shape(600, 3) == (640, 64)
    assert mine.shape(600, 64) == (640, 64)
    assert mine.shape(600, 65) == (640, 512)
    assert mine.shape(600, 513) == (640, 0)
    assert mine.shape(600, None) == (640, 0)
    assert mine.shape(500, 65) == (512, 0), "512 of 512 rows could not be told from all of them"
    assert mine.shape(4096, 1) == (4096, 64)
    assert mine.shape(4097, 1) is None
    monkeypatch.setattr(pieces, "WIDEST", 1000)
    assert StepPieces(CPU, 4096, 1).shape(1001, 1) is None


def wave(engine: Engine, number: int, **params: Any) -> list[Request]:
    """Eight prompts that make one step of more rows than are recorded whole, and what follows."""
    requests: list[Request] = []
    for i in range(8):
        prompt = [(7 * i + 3 * j * (number + 1) + j * j) % VOCAB for j in range(70 + 2 * i)]
        chosen = {"temperature": 0.8 * (i % 2), "seed": i, "max_tokens": 6, **params}
        requests += engine.add(prompt, SamplingParams(**chosen), request_id=f"{number}-{i}")
    return requests


def wide_engine(**options: Any) -> Engine:
    engine = make_engine(**{"enable_prefix_caching": False, **options})
    cut(engine)
    return engine


def test_the_second_step_of_a_size_is_recorded_and_the_third_replayed() -> None:
    engine = wide_engine()
    mine = engine.runner.pieces
    assert mine is not None
    mine.recent.meetings = graphs.MEETINGS
    for number, replays in enumerate([0, 1, 2]):
        requests = wave(engine, number)
        engine.step()
        assert mine.replays == replays, "616 rows are a step, and it was run in pieces when it had been met"
        assert mine.recent.keys == ([(640, 64, None)] if replays else [])
        for request in requests:
            engine.abort(request.request_id)
        engine.check_idle()


@pytest.mark.parametrize("most_kept", [40, 2])
def test_wide_steps_bring_the_tokens_of_narrow_ones(
    most_kept: int, monkeypatch: pytest.MonkeyPatch, events: Counter[str]
) -> None:
    """`most_kept`: with room for two recordings they push each other out."""
    monkeypatch.setattr(graphs, "MOST", most_kept)
    engine = wide_engine()
    mine = engine.runner.pieces
    assert mine is not None
    for number in range(3):
        requests = wave(engine, number)
        engine.step()
        events["wide steps in pieces"] += mine.replays > 0
        run_all(engine)
        for request in requests:
            assert (tuple(request.output_ids), request.finish.reason) == alone_of(request)
        assert len(mine.recent.keys) <= most_kept
    engine.check_idle()


def test_a_step_that_is_too_wide_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "WIDEST", 600)
    engine = wide_engine()
    requests = wave(engine, 0)
    engine.step()
    assert engine.runner.pieces is not None
    assert not engine.runner.pieces.replays
    run_all(engine)
    assert engine.runner.pieces.replays
    for request in requests:
        assert tuple(request.output_ids) == alone_of(request)[0]


def told(positions: Sequence[PositionLogprobs | None]) -> dict[str, float]:
    """Log-probs by place and token."""
    return {f"{i} {token}": p.logprob for i, one in enumerate(positions) if one for token, p in one.items()}


def test_log_probs_of_prompts_and_tokens_are_the_same() -> None:
    """More wanted rows than the last layer is cut to."""
    found = []
    for in_pieces in (False, True):
        engine = make_engine(enable_prefix_caching=False)
        if in_pieces:
            cut(engine)
        requests = wave(engine, 0, prompt_logprobs=2, logprobs=2)
        run_all(engine)
        found.append([(r.output_ids, *map(told, (r.prompt_logprobs, r.top_logprobs))) for r in requests])
        if in_pieces:
            assert engine.runner.pieces is not None
            assert any(key[:2] == (640, 0) for key in engine.runner.pieces.recent.keys)
    for (ids, *plain), (same_ids, *replayed) in zip(*found, strict=True):
        assert ids == same_ids
        for numbers, others in zip(plain, replayed, strict=True):
            assert len(numbers) > 10
            assert numbers == pytest.approx(others)


def test_wide_steps_are_recorded_whole_where_nothing_reads_faster() -> None:
    """The first wave of a shape goes in pieces, the second is recorded, the third replayed."""
    engine = make_engine(enable_prefix_caching=False)
    pad(engine)
    whole, mine = engine.runner.graphs, engine.runner.pieces
    assert whole is not None
    assert mine is not None
    whole.recent.meetings = graphs.MEETINGS
    for number in range(4):
        replays = mine.replays, whole.wide_replays
        requests = wave(engine, number)
        engine.step()
        assert mine.replays - replays[0] == (number == 0)
        assert whole.wide_replays - replays[1] == (number > 1)
        run_all(engine)
        for request in requests:
            assert (tuple(request.output_ids), request.finish.reason) == alone_of(request)
    assert [key[1:3] for key in whole.recent.keys] == [(9, 640)]
    engine.check_idle()


def test_a_wide_step_with_a_long_prompt_is_not_recorded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(enable_prefix_caching=False)
    pad(engine)
    monkeypatch.setattr(engine.runner.target.form, "uncaptured_rows", 84)
    for number in range(2):
        requests = wave(engine, number)  # one of them has 84 tokens
        engine.step()
        run_all(engine)
        for request in requests:
            assert tuple(request.output_ids) == alone_of(request)[0]
    assert engine.runner.graphs is not None
    assert not engine.runner.graphs.recent.keys
    assert engine.runner.graphs.replays
    assert engine.runner.pieces is not None
    assert engine.runner.pieces.replays >= 2


@given(grants=st.lists(st.integers(1, 300), min_size=1, max_size=600))
@settings(deadline=None)
def test_ghosts_of_wide_steps(grants: list[int]) -> None:
    wide = [size for size in sizes(2048) if size > BUCKETS[-1]]
    ghosts = graphs.ghost_grants(grants, wide)
    if ghosts is None:
        assert sum(grants) + 1 > 2048 - len(grants) or len(grants) > BUCKETS[-1]
        return
    assert all(rows >= 1 for rows in ghosts)
    rows, requests = sum(grants) + sum(ghosts), len(grants) + len(ghosts)
    if rows > BUCKETS[-1]:
        assert rows in wide
        assert requests - 1 in BUCKETS
        assert ghosts


def test_preempted_and_aborted_requests_between_replays(events: Counter[str]) -> None:
    """Random waves over one engine: steps of any width, mixed with decoding, in famine, with aborts in between."""
    events.update(dict.fromkeys(["replayed", "wide", "mixed", "famine", "abort", "whole"], 0))

    @settings(max_examples=examples(24), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), spare=st.sampled_from([0, 140, 400]), ahead=st.booleans(), whole=st.booleans())
    def run(data: st.DataObject, spare: int, ahead: bool, whole: bool) -> None:
        engine = wide_engine(num_pages=1 + 24 + spare, max_num_seqs=12, async_scheduling=ahead)
        if whole:
            pad(engine)
        mine = engine.runner.pieces
        assert mine is not None
        requests: list[Request] = []
        for number in range(4):
            mixed = engine.has_work
            requests += wave(engine, number, max_tokens=8)
            for _ in range(data.draw(st.integers(1, 6))):
                rows, replays = engine.runner.times.rows, mine.replays
                engine.step()
                wide = engine.runner.times.rows - rows > BUCKETS[-1] and mine.replays > replays
                events["wide"] += wide
                events["mixed"] += wide and mixed
            if data.draw(st.booleans()):
                engine.abort(f"{number}-{data.draw(st.integers(0, 7))}")
        run_all(engine)
        engine.check_idle()
        for request in requests:
            tokens, reason = alone_of(request)
            if request.finish is Finish.ABORT:
                events["abort"] += 1
                assert tuple(request.output_ids) == tokens[: len(request.output_ids)]
                continue
            assert (tuple(request.output_ids), request.finish.reason) == (tokens, reason)
        events["replayed"] += mine.replays
        events["whole"] += engine.runner.graphs.wide_replays if engine.runner.graphs else 0
        events["famine"] += engine.stats.preemptions

    run()


class Fake:
    """A cache of one layer and a form that writes nothing."""

    turns = False

    def group_of(self, layer: int) -> int:
        return 0

    def layer_planes(self, layer: int) -> tuple[tuple[Tensor, ...], ...]:
        return ()

    def write(self, *_: Any) -> None:
        return


def test_a_replay_on_the_cpu_has_the_tensors_of_the_first_time() -> None:
    """What is forgotten when a step is recorded must not reach a later one by chance."""
    mine = StepPieces(CPU, 8, 1)
    mine.recent.meetings = 1
    rows = RowTable.allocate(8, 8, 0, 1, CPU)
    fake: Any = Fake()
    seen: list[tuple[int, ...]] = []
    scales = iter([1.0, 1.0, 0.5])

    def make(number: int) -> Any:
        def body(context: PieceContext) -> Tensor:
            q_RHD = torch.full((4, 2, 3), float(number + len(seen)))
            return context.attend(0, q_RHD, q_RHD[:, :1], q_RHD[:, 1:], scale=next(scales)).sum((1, 2))

        return body, PieceContext(mine, fake, fake, rows, None)

    def read(call: Call) -> None:
        seen.append(tuple(x.data_ptr() for x in call[1:5]))
        call.out_RHD.copy_(call.q_RHD)

    results = []
    for number in (10, 20):
        recording = mine.find("key", lambda number=number: make(number))
        assert recording is not None
        results.append(mine.play(recording, read).tolist())
    assert results == [[60.0] * 4, [66.0] * 4], "the second play calls what the first step brought"
    assert seen[0] == seen[1]
    assert recording is not None
    with pytest.raises(InvariantError, match="layer 0 attends in another way"):
        mine.play(recording, read)


def test_places_behind_the_rows_are_trash_and_wanted_rows_exist() -> None:
    """A narrower step after a wide one must not write, or ask, where the wide one did."""
    mine = StepPieces(CPU, 2048, 2)
    wide, narrow = mine.shape(2048, 500), mine.shape(600, 3)
    assert wide is not None
    assert narrow is not None
    mine.fill(wide, [torch.arange(2048) + 7] * 2, torch.arange(500) + 1500)
    mine.fill(narrow, [torch.arange(600) + 9] * 2, torch.tensor([5, 6, 599]))
    for place_R in mine.place:
        assert place_R[:600].tolist() == [9 + i for i in range(600)]
        assert not place_R[600 : narrow.rows].any()
    assert mine.wanted[:3].tolist() == [5, 6, 599]
    assert not mine.wanted[3 : narrow.wanted].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_pages": 40}, "num_pages is 40; with .* GiB for recorded steps the engine takes .*cuda_graphs=False"),
        ({"kv_cache_gib": 0.001}, "kv_cache_gib is 0.001, and recorded steps take .* GiB beside it"),
    ],
)
def test_a_cache_that_leaves_no_room_for_recordings_is_refused(options: dict[str, Any], message: str) -> None:
    groups = make_engine().cache.groups
    config = EngineConfig(**{"page_size": 4, "max_num_seqs": 8, **options})
    pages = choose_pages(config, groups, CPU, 96)
    assert pages == choose_pages(config, groups, CPU, 96, kept_bytes=1)
    with pytest.raises(CapacityError, match=message):
        choose_pages(config, groups, CPU, 96, kept_bytes=2**60)
