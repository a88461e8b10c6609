"""One step on the device: build rows, run the model's body, draw from the wanted rows, commit.

The runner owns the model and the row table. It is given grants and returns a report; it decides nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.cache.manager import CacheManager
from headrace.cache.states import StateStore
from headrace.decoding.base import Decoder, OwnModel, Segment, SoftRows, Span
from headrace.engine.commit import apply_commit, join, moves
from headrace.kernels.advance import Advanced
from headrace.kernels.attention import AttentionPlan, AttentionRows, attend, plan_attention, write_kv
from headrace.kernels.draw import Drawn, DrawParams, draw
from headrace.models.base import CausalLM
from headrace.request import Request
from headrace.sampling.logprobs import TopLogprobs, gather_logprobs
from headrace.sampling.processors import LogitProcessor
from headrace.step import Commit, OutTable, RowTable, Scan
from headrace.tables import RequestTable

SCORE_CHUNK = 512
"""Scored rows whose logits are held at once: a long prompt over a large vocabulary would not fit."""


class Granted(NamedTuple):
    """A request and its rows in this step."""

    request: Request
    rows: int


ProcessorRequests = Sequence[tuple[LogitProcessor, Sequence[int]]]
"""Processors, and the requests of the step whose logits each changes."""


@dataclass
class StepReport:
    """What one step brought, in host memory; entry i belongs to request i of the step."""

    n_kv: list[int]
    n_emit: list[int]
    emit: list[list[int]]
    finish: list[int]
    logprob: list[list[float]]
    """Log-probability of each emitted token under the model's own distribution."""
    drafted: list[int]
    """What the decoder drafted for the next step."""
    top: dict[int, TopLogprobs]
    """Top log-probs of the requests that asked for them, one row an emitted token."""
    given: dict[int, TopLogprobs]
    """Log-probs of scored prompt tokens, one row a token, in the order of the prompt."""


@dataclass
class StepTimes:
    """Seconds spent by stage since the start."""

    steps: int = 0
    rows: int = 0
    build_s: float = 0.0
    body_s: float = 0.0
    head_s: float = 0.0
    draw_s: float = 0.0
    commit_s: float = 0.0

    def shares(self) -> dict[str, float]:
        """Share of each stage in the time of a step."""
        stages = {k: v for k, v in vars(self).items() if k.endswith("_s")}
        total = sum(stages.values()) or 1.0
        return {name.removesuffix("_s"): value / total for name, value in stages.items()}


@dataclass(frozen=True)
class Stream:
    """A model and the place of its layers in the cache: the target, or a decoder's own."""

    model: CausalLM
    first_layer: int
    groups: range


class _Context:
    """What the layers see of a step: positions, attention over the rows, and recurrences."""

    def __init__(self, runner: Runner, stream: Stream, rows: RowTable, spans: Sequence[Span]) -> None:
        self._cache = runner.cache
        self._table = runner.table
        self._first_layer = stream.first_layer
        self.states = runner.states.step(rows.reqs, rows.row_ptr)
        self.pos_AR = rows.pos
        self.soft_SE = runner.soft_SE if stream is runner.target else None
        masks = (rows.bits, rows.words.flatten()) if runner.has_trees else (None, None)
        self._rows = AttentionRows(rows.req, rows.t, rows.a, rows.b, rows.c, rows.row_ptr, rows.reqs, *masks)
        req_R = rows.req.long()
        self._plans: dict[int, AttentionPlan] = {}
        self._place_R: dict[int, Tensor] = {}
        page_size = runner.cache.page_size
        for g in stream.groups:
            page_table_BP = runner.cache.page_table_GBP[g]
            kv_len_B = runner.table.kv_len[g]
            self._place_R[g] = runner.cache.place(g, req_R, kv_len_B[req_R] + rows.dst)
            self._plans[g] = plan_attention(self._rows, page_table_BP, kv_len_B, page_size, spans)

    def attend(
        self,
        layer: int,
        q_RHD: Tensor,
        k_RKD: Tensor,
        v_RKD: Tensor,
        *,
        scale: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the rows' keys and values, then attend."""
        layer += self._first_layer
        g = self._cache.group_of(layer)
        k_KPSD, v_KPSD = self._cache.layer_pools(layer)
        write_kv(k_RKD, v_RKD, k_KPSD, v_KPSD, self._place_R[g])
        out_RHD, _ = attend(
            q_RHD,
            self._rows,
            k_KPSD,
            v_KPSD,
            self._cache.page_table_GBP[g],
            self._table.kv_len[g],
            scale=scale,
            window=self._cache.groups[g].state.window,
            softcap=softcap,
            sinks_H=sinks_H,
            plan=self._plans[g],
        )
        return out_RHD

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Scan the rows from the layer's states."""
        return self.states.recur(self._first_layer + layer, inputs, scan)


class Runner:
    """Executes steps over the target's stream, and passes of the decoders' own models.

    Args:
        streams: the target, then the models of the decoders in their order.
        decoders: by name; requests of a step are in the order of this dict.
        max_rows: bounds the rows of a step.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        cache: CacheManager,
        table: RequestTable,
        decoders: Mapping[str, Decoder],
        max_rows: int,
        states: StateStore,
    ) -> None:
        self.target = streams[0]
        self.model = self.target.model
        self.cache, self.table, self.decoders = cache, table, decoders
        self.states = states
        self.max_rows, self.device = max_rows, table.device
        self.times = StepTimes()
        self.step_s = 0.0  # seconds of the last step
        self.rows = RowTable.allocate(max_rows, table.ghost, table.ghost, 1, self.device)
        own = [
            OwnModel(partial(self._evaluate, stream), list(table.kv_len_of(number)))
            for number, stream in enumerate(streams[1:], 1)
        ]
        weight = next(self.model.parameters())
        soft_SE = weight.new_zeros(sum(d.n_soft for d in decoders.values()), self.model.config.hidden_size)
        self.soft_SE = soft_SE if len(soft_SE) else None
        self.has_trees = any(d.tree for d in decoders.values())
        first = 0
        for decoder in decoders.values():
            mine, own = own[: len(decoder.models)], own[len(decoder.models) :]
            decoder.bind(mine, SoftRows(soft_SE[first : first + decoder.n_soft], first))
            first += decoder.n_soft

    @torch.inference_mode()
    def execute(self, granted: Sequence[Granted], processors: ProcessorRequests = ()) -> StepReport:
        """Run one step over the granted rows and commit what came of it.

        The requests are grouped by decoder. `processors` change the logits of their requests before the draw.
        """
        clock = [time.perf_counter()]
        rows, spans = self._build(granted)
        segments = self._segments(granted, rows)
        for decoder, seg in segments:
            decoder.plan(seg)
        outs = self._outs(granted, rows, segments)
        context = _Context(self, self.target, rows, spans)
        self._tick(clock)
        # In a step of plain decoding every row is wanted, and in this order.
        wanted_M = None if rows.tok.shape[0] == outs.n_draw == outs.row.shape[0] else outs.row
        hidden_ME = self.model(rows.tok, context, wanted_M)
        self._tick(clock)
        raw_MV = self.model.logits(hidden_ME[: outs.n_draw]).float()
        given = self._score(granted, outs, hidden_ME[outs.n_draw :])
        self._tick(clock)
        drawn = self._draw(rows, outs, raw_MV, processors, segments)
        self._tick(clock)
        commit = self._resolve(segments, drawn.id_M, hidden_ME)
        reqs_B = rows.reqs.long()
        committed = apply_commit(self.table, reqs_B, commit)
        if commit.path is not None:
            self.cache.move(self.target.groups, self.table.kv_len, *moves(self.table, rows, commit, committed.n_kv_B))
        context.states.commit(commit, committed.n_kv_B)
        drafted = self._draft(segments)
        report = self._report(granted, commit, committed, drawn.logp_raw_M, drafted, raw_MV, given)
        self._tick(clock)
        self._count(clock, sum(g.rows for g in granted))
        return report

    def _build(self, granted: Sequence[Granted]) -> tuple[RowTable, list[Span]]:
        """The rows of the step, of which only requests and borders are known."""
        sizes = [g.rows for g in granted]
        rows = self.rows.first(sum(sizes), len(sizes))
        borders = list(itertools.accumulate(sizes, initial=0))
        rows.reqs.copy_(torch.tensor([g.request.index for g in granted], dtype=torch.int32))
        rows.row_ptr.copy_(torch.tensor(borders, dtype=torch.int32))
        spans = [
            (first, size, max((request.slots(g) for g in self.target.groups), default=0) + size)
            for first, (request, size) in zip(borders, granted, strict=False)
        ]
        return rows, spans

    def _segments(self, granted: Sequence[Granted], rows: RowTable) -> list[tuple[Decoder, Segment]]:
        """Neighbours with the same decoder, in the order of the step."""
        segments: list[tuple[Decoder, Segment]] = []
        first_row = first = 0
        for name, members in itertools.groupby(granted, key=lambda g: g.request.decoder):
            decoder, mine = self.decoders[name], list(members)
            grants = [g.rows for g in mine]
            part = rows
            if len(mine) < len(granted):
                part = rows.part(range(first_row, first_row + sum(grants)), range(first, first + len(mine)))
            prompts = [g.request.pending > 1 for g in mine]
            outputs = [decoder.n_outputs(n) for n in grants]
            segments.append((decoder, Segment(self.table, part, grants, outputs, prompts)))
            first_row, first = first_row + sum(grants), first + len(mine)
        return segments

    def _outs(
        self, granted: Sequence[Granted], rows: RowTable, segments: Sequence[tuple[Decoder, Segment]]
    ) -> OutTable:
        """The draws, then the prompt tokens to score."""
        scored_rows: list[int] = []
        targets: list[int] = []
        first = 0
        for request, size in granted:
            if request.params.prompt_logprobs is not None:
                for index in _scored_range(request, size):
                    scored_rows.append(first + index - 1 - request.n_done)
                    targets.append(request.tokens[index])
            first += size
        row_parts, t_parts, entry_parts = [], [], []
        first_row = first = 0
        for decoder, seg in segments:
            row_parts.append(seg.out_row_M + first_row)
            t_parts.append(seg.rows.t[seg.out_row_M] + decoder.shift)
            entry_parts.append(seg.out_entry_M + first)
            first_row, first = first_row + sum(seg.grants), first + len(seg.grants)
        n_draw = sum(sum(seg.outputs) for _, seg in segments)
        if scored_rows:
            row_parts.append(torch.tensor(scored_rows, dtype=torch.int64, device=self.device))
        target = torch.tensor(targets, dtype=torch.int64, device=self.device)
        return OutTable(_joined(row_parts), _joined(t_parts), _joined(entry_parts), n_draw, target)

    def _draw(
        self,
        rows: RowTable,
        outs: OutTable,
        raw_MV: Tensor,
        processors: ProcessorRequests,
        segments: Sequence[tuple[Decoder, Segment]],
    ) -> Drawn:
        logits_MV = raw_MV
        if processors:
            logits_MV = raw_MV.clone()
            counts = [n for _, seg in segments for n in seg.outputs]
            firsts = list(itertools.accumulate(counts, initial=0))
            reqs = rows.reqs.tolist()
            path_ML = _paths(segments)
            for processor, members in processors:
                picked = [m for i in members for m in range(firsts[i], firsts[i + 1])]
                indices = [reqs[i] for i in members for _ in range(counts[i])]
                processor.apply(logits_MV, picked, indices, path_ML)
        reqs_M = rows.reqs.long()[outs.entry]
        table = self.table
        params = DrawParams(table.temperature[reqs_M], table.top_k[reqs_M], table.top_p[reqs_M], table.min_p[reqs_M])
        return draw(logits_MV, params, table.stream[reqs_M], outs.t_out, raw_MV=raw_MV)

    def _resolve(self, segments: Sequence[tuple[Decoder, Segment]], id_M: Tensor, hidden_ME: Tensor) -> Commit:
        firsts = list(itertools.accumulate((sum(seg.outputs) for _, seg in segments), initial=0))
        commits = [
            decoder.resolve(seg, id_M[low:high], hidden_ME[low:high])
            for (decoder, seg), (low, high) in zip(segments, itertools.pairwise(firsts), strict=True)
        ]
        return join(commits, firsts[:-1])

    def _draft(self, segments: Sequence[tuple[Decoder, Segment]]) -> list[int]:
        drafted: list[int] = []
        for decoder, seg in segments:
            count_B = decoder.draft(seg)
            drafted += [0] * len(seg.grants) if count_B is None else count_B.tolist()
        return drafted

    def _evaluate(self, stream: Stream, rows: RowTable, spans: Sequence[Span], wanted_M: Tensor) -> Tensor:
        hidden_ME: Tensor = stream.model(rows.tok, _Context(self, stream, rows, spans), wanted_M)
        return hidden_ME

    def _score(self, granted: Sequence[Granted], outs: OutTable, hidden_SE: Tensor) -> dict[int, TopLogprobs]:
        """Log-probs of given tokens, by request of the step; hidden states of the scored rows only."""
        given: dict[int, TopLogprobs] = {}
        start = 0
        for i, (request, size) in enumerate(granted):
            if request.params.prompt_logprobs is None:
                continue
            count = len(_scored_range(request, size))
            if not count:
                continue
            parts = []
            for low in range(start, start + count, SCORE_CHUNK):
                high = min(low + SCORE_CHUNK, start + count)
                logits_mV = self.model.logits(hidden_SE[low:high]).float()
                parts.append(gather_logprobs(logits_mV, outs.target[low:high], request.params.prompt_logprobs))
            given[i] = TopLogprobs(*(torch.cat(column) for column in zip(*parts, strict=True)))
            start += count
        return given

    def _report(
        self,
        granted: Sequence[Granted],
        commit: Commit,
        committed: Advanced,
        logprob_M: Tensor,
        drafted: list[int],
        raw_MV: Tensor,
        given: dict[int, TopLogprobs],
    ) -> StepReport:
        n_emit = committed.n_emit_B.tolist()
        top: dict[int, TopLogprobs] = {}
        for i, (request, _) in enumerate(granted):
            if request.params.logprobs is not None and n_emit[i]:
                rows_MV = raw_MV[commit.priced_by[i, : n_emit[i]].long()]
                top[i] = gather_logprobs(rows_MV, commit.emit[i, : n_emit[i]], request.params.logprobs)
        logprob = logprob_M[commit.priced_by.long()].tolist()
        emit = commit.emit.tolist()
        return StepReport(
            n_kv=committed.n_kv_B.tolist(),
            n_emit=n_emit,
            emit=[tokens[:n] for tokens, n in zip(emit, n_emit, strict=True)],
            finish=committed.finish_B.tolist(),
            logprob=[values[:n] for values, n in zip(logprob, n_emit, strict=True)],
            drafted=drafted,
            top=top,
            given=given,
        )

    def _tick(self, clock: list[float]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        clock.append(time.perf_counter())

    def _count(self, clock: Sequence[float], n_rows: int) -> None:
        times = self.times
        times.steps += 1
        times.rows += n_rows
        self.step_s = clock[-1] - clock[0]
        stages = ("build_s", "body_s", "head_s", "draw_s", "commit_s")
        for name, (start, end) in zip(stages, itertools.pairwise(clock), strict=True):
            setattr(times, name, getattr(times, name) + end - start)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kernel once over ghost rows: the first request must not wait for compilers."""
        for n_rows in {1, min(16, self.max_rows)}:
            self.time_step(n_rows, repeats=0)
        index = torch.full((1,), self.table.ghost, dtype=torch.int64, device=self.device)
        logits_MV = torch.zeros(1, self.model.config.vocab_size, device=self.device)
        neutral = torch.ones(1, device=self.device)
        params = DrawParams(neutral, self.table.top_k[index], neutral, self.table.min_p[index])
        draw(logits_MV, params, self.table.stream[index], self.table.n_tok[index])

    @torch.inference_mode()
    def time_step(self, n_rows: int, repeats: int = 2) -> float:
        """Seconds of one pass over `n_rows` ghost rows and one output row: the best of 1 + `repeats` tries."""
        rows = self.rows.first(n_rows, 1)
        rows.clear(self.table.ghost)
        rows.reqs.fill_(self.table.ghost)
        rows.row_ptr.copy_(torch.tensor([0, n_rows], dtype=torch.int32))
        best = float("inf")
        for _ in range(1 + repeats):
            clock = [time.perf_counter()]
            hidden_RE = self.model(rows.tok, _Context(self, self.target, rows, [(0, n_rows, 1)]))
            self.model.logits(hidden_RE[:1])
            self._tick(clock)
            best = min(best, clock[1] - clock[0])
        return best


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _paths(segments: Sequence[tuple[Decoder, Segment]]) -> Tensor:
    """Tokens between the history and each draw, int64 [M, L], unused entries -1."""
    found = [(decoder.paths(seg), sum(seg.outputs)) for decoder, seg in segments]
    width = max((path.shape[1] for path, _ in found if path is not None), default=0)
    device = segments[0][1].table.device
    return torch.cat(
        [
            torch.full((count, width), -1, device=device)
            if path is None
            else F.pad(path, (0, width - path.shape[1]), value=-1)
            for path, count in found
        ]
    )


def _scored_range(request: Request, size: int) -> range:
    """Indices of the prompt tokens that the next `size` rows predict and that have no log-prob yet."""
    first = max(request.n_done + 1, len(request.prompt_logprobs))
    return range(first, min(request.n_done + size + 1, request.prompt_len))
