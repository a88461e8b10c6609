"""One step on the device: build rows, run the model's body, draw from the wanted rows, commit.

The runner owns the model and the row table. It is given grants and returns a report; it decides nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.cache.manager import CacheManager
from headrace.decoding.base import Decoder
from headrace.engine.commit import Committed, apply_commit
from headrace.kernels.attention import AttentionPlan, AttentionRows, attend, plan_attention, write_kv
from headrace.kernels.draw import Drawn, DrawParams, draw
from headrace.models.base import CausalLM
from headrace.request import Request
from headrace.sampling.logprobs import TopLogprobs, gather_logprobs
from headrace.sampling.processors import LogitProcessor
from headrace.step import NONE, OutTable, RowTable
from headrace.tables import RequestTable

SCORE_CHUNK = 512
"""Scored rows whose logits are held at once: a long prompt over a large vocabulary would not fit."""


class Granted(NamedTuple):
    """A request and its rows in this step."""

    request: Request
    rows: int


@dataclass
class StepReport:
    """What one step brought, in host memory; entry i belongs to request i of the step."""

    n_kv: list[int]
    n_emit: list[int]
    emit: list[list[int]]
    finish: list[int]
    logprob: list[float]
    """Log-probability of the drawn token under the model's own distribution."""
    top: dict[int, TopLogprobs]
    """Top log-probs of the draws that asked for them; each has one row."""
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


class _Context:
    """What the layers see of a step: positions, and attention over the rows."""

    def __init__(self, runner: Runner, rows: RowTable, lens: Sequence[tuple[int, int, int]]) -> None:
        self._cache = runner.cache
        self._table = runner.table
        self.pos_AR = rows.pos
        self._rows = AttentionRows(rows.req, rows.t, rows.a, rows.b, rows.c, rows.row_ptr, rows.reqs)
        req_R = rows.req.long()
        self._plans: list[AttentionPlan] = []
        self._place_R: list[Tensor] = []
        page_size = runner.cache.page_size
        for g, _ in enumerate(runner.cache.groups):
            page_table_BP = runner.cache.page_table_GBP[g]
            kv_len_B = runner.table.kv_len[g]
            slot_R = kv_len_B[req_R] + rows.dst
            page_R = page_table_BP[req_R, (slot_R // page_size).long()].long()
            self._place_R.append(page_R * page_size + slot_R % page_size)
            self._plans.append(plan_attention(self._rows, page_table_BP, kv_len_B, page_size, lens))

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


@dataclass
class Runner:
    """Executes steps. `max_rows` bounds the rows of a step, `max_reqs` the requests."""

    model: CausalLM
    cache: CacheManager
    table: RequestTable
    decoder: Decoder
    max_rows: int
    device: torch.device
    times: StepTimes = field(default_factory=StepTimes)

    def __post_init__(self) -> None:
        self.rows = RowTable.allocate(self.max_rows, self.table.ghost, self.table.ghost, 1, self.device)

    @torch.inference_mode()
    def execute(
        self, granted: Sequence[Granted], processors: Sequence[tuple[LogitProcessor, list[int]]] = ()
    ) -> StepReport:
        """Run one step over the granted rows and commit what came of it.

        `processors` change the logits of the given requests of the step before the draw.
        """
        clock = [time.perf_counter()]
        rows, grant_B, lens = self._build(granted)
        outs = self._outs(granted, rows)
        context = _Context(self, rows, lens)
        self._tick(clock)
        # In a step of plain decoding every row is wanted, and in this order.
        wanted_M = None if rows.tok.shape[0] == outs.n_draw == outs.row.shape[0] else outs.row
        hidden_ME = self.model(rows.tok, context, wanted_M)
        self._tick(clock)
        raw_BV = self.model.logits(hidden_ME[: outs.n_draw]).float()
        given = self._score(granted, outs, hidden_ME[outs.n_draw :])
        self._tick(clock)
        drawn = self._draw(granted, rows, outs, raw_BV, processors)
        self._tick(clock)
        commit = self.decoder.resolve(self.table, rows, outs, drawn.id_M, grant_B)
        committed = apply_commit(self.table, rows, commit)
        report = self._report(granted, committed, drawn.logp_raw_M, raw_BV, given)
        self._tick(clock)
        self._count(clock, sum(g.rows for g in granted))
        return report

    def _build(self, granted: Sequence[Granted]) -> tuple[RowTable, Tensor, list[tuple[int, int, int]]]:
        sizes = [g.rows for g in granted]
        rows = self.rows.first(sum(sizes), len(sizes))
        grant_B = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        rows.reqs.copy_(torch.tensor([g.request.index for g in granted], dtype=torch.int32))
        rows.row_ptr[0] = 0
        torch.cumsum(grant_B, 0, dtype=torch.int32, out=rows.row_ptr[1:])
        self.decoder.plan(self.table, rows, grant_B)
        lens, first = [], 0
        for request, size in granted:
            lens.append((first, size, request.n_done + size))
            first += size
        return rows, grant_B, lens

    def _outs(self, granted: Sequence[Granted], rows: RowTable) -> OutTable:
        """One draw a request, on its last row; after them the prompt tokens to score."""
        scored_rows: list[int] = []
        targets: list[int] = []
        first = 0
        for request, size in granted:
            if request.params.prompt_logprobs is not None:
                for index in _scored_range(request, size):
                    scored_rows.append(first + index - 1 - request.n_done)
                    targets.append(request.tokens[index])
            first += size
        last_B = (rows.row_ptr[1:] - 1).long()
        row_M = last_B
        if scored_rows:
            row_M = torch.cat([last_B, torch.tensor(scored_rows, dtype=torch.int64, device=self.device)])
        target = torch.tensor(targets, dtype=torch.int64, device=self.device)
        return OutTable(row=row_M, t_out=rows.t[row_M] + 1, n_draw=len(granted), target=target)

    def _draw(
        self,
        granted: Sequence[Granted],
        rows: RowTable,
        outs: OutTable,
        raw_BV: Tensor,
        processors: Sequence[tuple[LogitProcessor, list[int]]],
    ) -> Drawn:
        reqs_B = rows.reqs.long()
        logits_BV = raw_BV.clone() if processors else raw_BV
        for processor, picked in processors:
            processor.apply(logits_BV, picked, [granted[i].request.index for i in picked])
        table = self.table
        params = DrawParams(table.temperature[reqs_B], table.top_k[reqs_B], table.top_p[reqs_B], table.min_p[reqs_B])
        t_out_B = outs.t_out[: outs.n_draw]
        return draw(logits_BV, params, table.stream[reqs_B], t_out_B, raw_MV=raw_BV)

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
        committed: Committed,
        logprob_B: Tensor,
        raw_BV: Tensor,
        given: dict[int, TopLogprobs],
    ) -> StepReport:
        n_emit = committed.n_emit_B.tolist()
        top: dict[int, TopLogprobs] = {}
        for i, (request, _) in enumerate(granted):
            if request.params.logprobs is not None and n_emit[i]:
                one = slice(i, i + 1)
                top[i] = gather_logprobs(raw_BV[one], committed.emit_BE[one, 0], request.params.logprobs)
        return StepReport(
            n_kv=committed.n_kv_B.tolist(),
            n_emit=n_emit,
            emit=committed.emit_BE.tolist(),
            finish=committed.finish_B.tolist(),
            logprob=logprob_B.tolist(),
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
        ghost = self.table.ghost
        for column, value in ((rows.tok, 0), (rows.req, ghost), (rows.t, 0), (rows.pos, 0), (rows.dst, 0)):
            column.fill_(value)
        for column, value in ((rows.a, NONE), (rows.b, 0), (rows.c, 1), (rows.reqs, ghost)):
            column.fill_(value)
        rows.row_ptr.copy_(torch.tensor([0, n_rows], dtype=torch.int32))
        best = float("inf")
        for _ in range(1 + repeats):
            clock = [time.perf_counter()]
            hidden_RE = self.model(rows.tok, _Context(self, rows, [(0, n_rows, 1)]))
            self.model.logits(hidden_RE[:1])
            self._tick(clock)
            best = min(best, clock[1] - clock[0])
        return best


def _scored_range(request: Request, size: int) -> range:
    """Indices of the prompt tokens that the next `size` rows predict and that have no log-prob yet."""
    first = max(request.n_done + 1, len(request.prompt_logprobs))
    return range(first, min(request.n_done + size + 1, request.prompt_len))
