"""One step on the device: build rows, run the model's body, draw from the wanted rows, commit.

The runner owns the model and the row table. It is given grants and returns a report; it decides nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.cache.manager import CacheManager
from headrace.cache.states import StateStore
from headrace.codecs.forms import Form, GroupStep
from headrace.decoding.base import Decoder, OwnModel, Segment, SoftRows, Span
from headrace.engine.commit import apply_commit, join, moves
from headrace.engine.graphs import BUCKETS, StepGraphs, ghost_grants
from headrace.engine.pieces import Call, PieceContext, Shape, StepPieces
from headrace.kernels.advance import Advanced
from headrace.kernels.attention import FEW_ROWS, AttentionRows, Chain
from headrace.kernels.draw import Drawn, DrawParams, draw
from headrace.kernels.draw_rows import DrawTables, draw_rows
from headrace.kernels.report import Priced, report
from headrace.models.base import CausalLM
from headrace.request import Request
from headrace.sampling.logprobs import TopLogprobs, gather_logprobs
from headrace.sampling.processors import LogitProcessor
from headrace.staging import upload
from headrace.step import Commit, OutTable, RowTable, Scan, Turn
from headrace.tables import RequestTable

SCORE_CHUNK = 512
"""Scored rows whose logits are held at once: a long prompt over a large vocabulary would not fit."""


LONG_STEP_S = 0.03
"""A step that takes longer is timed well enough by two tries."""


class Granted(NamedTuple):
    """A request and its rows in this step."""

    request: Request
    rows: int
    ahead: int
    """Tokens that a step which is still running will commit before this one."""
    pending: int
    """Tokens known and not committed before the step, those that the running one brings included."""


class _Read(NamedTuple):
    """What the host reads of a step: [B] or [B, E]."""

    n_kv: np.ndarray
    n_emit: np.ndarray
    finish: np.ndarray
    drafted: np.ndarray | None
    emit: np.ndarray
    logprob: np.ndarray


class _Done(NamedTuple):
    """A step on the device."""

    advanced: Advanced
    drafted_B: Tensor | None
    commit: Commit
    logp_M: Tensor
    raw_MV: Tensor
    given: dict[int, TopLogprobs]

    def read(self) -> _Read:
        """As it stands in the memory of the CPU."""
        n_kv, n_emit, finish, emit, draw = (
            x.numpy() for x in (*self.advanced, self.commit.emit, self.commit.priced_by)
        )
        drafted = None if self.drafted_B is None else self.drafted_B.numpy()
        return _Read(n_kv, n_emit, finish, drafted, emit, self.logp_M.numpy()[draw])

    def packed(self) -> Tensor:
        """In one tensor."""
        return report(self.advanced, self.drafted_B, Priced(self.commit.emit, self.commit.priced_by, self.logp_M))


class _Built(NamedTuple):
    """A step that runs as it is. Its index arrays stay as they are until the next such step is built."""

    granted: Sequence[Granted]
    """The same list again: the same step again, one token further on."""
    rows: RowTable
    segments: list[tuple[Decoder, Segment]]
    adapted: bool
    """Whether a request has an adapter."""


class _Padded(NamedTuple):
    """A step that is recorded or replayed. Its index arrays stay on the device until the next such step is made."""

    granted: Sequence[Granted]
    """The same list again: the same step again."""
    key: Hashable
    step: Callable[[], Tensor]
    e_max: int
    is_wide: bool


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
    form: Form
    """How its attention reads the cache."""


class _Context:
    """What the layers see of a step: positions, attention over the rows, and recurrences."""

    def __init__(
        self,
        runner: Runner,
        stream: Stream,
        rows: RowTable,
        spans: Sequence[Span] | None,
        granted: Sequence[Granted] = (),
        joined: bool = False,
        few: bool = False,
    ) -> None:
        self._cache = runner.cache
        self._first_layer, self._form = stream.first_layer, stream.form
        self.turns = stream.form.turns
        self.states = runner.states.step(rows.reqs, rows.row_ptr)
        self.pos_AR = rows.pos
        self.soft_SE = runner.soft_SE if stream is runner.target else None
        masks: dict[str, Any] = {"joined": joined, "few": few}
        if runner.has_trees and not joined:
            masks |= {"bits_R": rows.bits, "words_W": rows.words.flatten()}
        columns = rows.req, rows.t, rows.a, rows.b, rows.c, rows.row_ptr, rows.reqs
        attention_rows = AttentionRows(*columns, **masks)
        self._plans: dict[int, Any] = {}
        self.place_R: dict[int, Tensor] = {}
        """By group the physical slots that the rows are written to."""
        cache = runner.cache
        for g in stream.groups:
            kv_len_B = runner.table.kv_len[g]
            place_R = self.place_R[g] = cache.place(g, kv_len_B, rows.req, rows.dst)
            window = cache.groups[g].state.window
            self._plans[g] = stream.form.plan(
                GroupStep(
                    attention_rows,
                    place_R,
                    cache.page_tables(g),
                    kv_len_B,
                    cache.page_size,
                    window,
                    spans,
                    runner.table.prompt_len,
                    runner.chains(granted, g) if spans and granted else (),
                    stream.model.parity,
                )
            )

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
        turn: Turn | None = None,
    ) -> Tensor:
        """Write the rows' keys and values, then attend."""
        layer += self._first_layer
        group, planes = self._cache.group_of(layer), self._cache.layer_planes(layer)
        self._form.write(self.place_R[group], planes, k_RKD, v_RKD, turn)
        return self._form.read(
            self._plans[group], planes, q_RHD, k_RKD, v_RKD, scale=scale, softcap=softcap, sinks_H=sinks_H
        )

    def read(self, call: Call) -> None:
        """Attend between two pieces, in which the rows are written."""
        layer, q_RHD, k_RKD, v_RKD, out_RHD, scale, softcap, sinks_H = call.first(self.pos_AR.shape[1])
        found_RHD = self._form.read(
            self._plans[self._cache.group_of(layer)],
            self._cache.layer_planes(layer),
            q_RHD,
            k_RKD,
            v_RKD,
            scale=scale,
            softcap=softcap,
            sinks_H=sinks_H,
            out_RHD=out_RHD,
        )
        if found_RHD is not out_RHD:
            out_RHD.copy_(found_RHD)

    def recur(self, layer: int, inputs: Sequence[Tensor], scan: Scan) -> Tensor:
        """Scan the rows from the layer's states."""
        return self.states.recur(self._first_layer + layer, inputs, scan)


class Runner:
    """Executes steps over the target's stream, and passes of the decoders' own models.

    Args:
        streams: the target, then the models of the decoders in their order.
        decoders: by name; requests of a step are in the order of this dict.
        max_rows: bounds the rows of a step.
        states: the fixed states of the target.
        graphs: where steps are padded, recorded and replayed; None: every step runs as it is.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        cache: CacheManager,
        table: RequestTable,
        decoders: Mapping[str, Decoder],
        max_rows: int,
        states: StateStore,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.target = streams[0]
        self.model = self.target.model
        self.cache, self.table, self.decoders = cache, table, decoders
        self.states = states
        self.max_rows, self.device = max_rows, table.device
        self.times = StepTimes()
        self.graphs = graphs
        self.pieces: StepPieces | None = None
        """Where the target's forward is recorded in pieces, for steps that are not recorded whole; None: nowhere."""
        self.witness: Callable[[Tensor], None] | None = None
        """Where logits are shown for comparison among ranks; None: they are not."""
        self._padded: _Padded | None = None
        self._built: _Built | None = None
        # Room for the widest step and, where steps are padded, for the widest bucket.
        room = 0 if graphs is None else BUCKETS[-1]
        self.rows = RowTable.allocate(max(max_rows, room), max(table.ghost, room + 1), table.ghost, 1, self.device)
        self._draw_tables = DrawTables(table.temperature, table.top_k, table.top_p, table.min_p, table.stream)
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

    def execute(self, granted: Sequence[Granted], processors: ProcessorRequests = ()) -> StepReport:
        """Run one step over the granted rows, commit what came of it, and wait for the report."""
        return self.launch(granted, processors)()

    @torch.inference_mode()
    def launch(self, granted: Sequence[Granted], processors: ProcessorRequests = ()) -> Callable[[], StepReport]:
        """Start one step over the granted rows; the result waits for it and says what was committed.

        The requests are grouped by decoder. `processors` change the logits of their requests before the draw. On a GPU
        nothing here waits for the device.
        """
        self._count(granted)
        if self._padded and self._padded.granted is granted and not processors:
            return self._start(self._padded)
        ghosts = self._padding(granted, processors)
        self._padded = None if ghosts is None else self._pad(granted, ghosts)
        if self._padded:
            self._built = None
            return self._start(self._padded)
        clock = [time.perf_counter()]
        if self._built is None or self._built.granted is not granted:
            self._built = _Built(granted, *self._build(granted), self._adapted(granted))
        _, rows, segments, adapted = self._built
        done = self._run(granted, rows, segments, self._spans(granted), processors, clock, adapted)
        top = self._top(granted, done)
        if self.device.type == "cpu":
            result = self._report(granted, done.read(), top, done.given)
            self._tick(clock)
            self._add_times(clock)
            return lambda: result
        fetch = _fetch(done.packed(), done.commit.emit.shape[1])
        return lambda: self._report(granted, fetch(), top, done.given)

    def _padding(self, granted: Sequence[Granted], processors: ProcessorRequests) -> list[int] | None:
        """Rows of the ghosts that a step is padded with to be recorded or replayed; None: it runs as it is."""
        if self.graphs is None or processors or self.states.groups or not self.target.form.captures:
            return None
        names = {g.request.decoder for g in granted}
        wide = any(g.request.params.logprobs is not None or g.request.scores_prompt for g in granted)
        if len(names) > 1 or wide or not self.decoders[names.pop()].captures(any(g.pending > 1 for g in granted)):
            return None
        grants = [g.rows for g in granted]
        least = self.target.form.uncaptured_rows
        has_faster = least is not None and max(grants) >= least
        return ghost_grants(grants, () if has_faster else self.graphs.wide)

    def _pad(self, granted: Sequence[Granted], ghosts: Sequence[int]) -> _Padded | None:
        """The step over the granted rows and ghosts, its index arrays on the device; None: it is not worth it."""
        assert self.graphs is not None
        grants = [*(g.rows for g in granted), *ghosts]
        decoder = self.decoders[granted[0].request.decoder]
        outputs = [decoder.n_outputs(n) for n in grants]
        prompts = [*(g.pending > 1 for g in granted), *(False for _ in ghosts)]
        sizes = (grants, outputs, prompts, len(ghosts))
        adapted = self._adapted(granted)
        # What is recorded changes the linear maps that some loaded adapter changes.
        changed = self.model.adapters.pattern if adapted and self.model.adapters else None
        host = any(prompts), _has_few_rows(granted), changed
        key = granted[0].request.decoder, len(grants), sum(grants), sum(outputs), *host
        is_wide = sum(grants) > BUCKETS[-1]
        if not self.graphs.wants(key, is_wide):
            return None
        reqs = [*(g.request.index for g in granted), *(self.table.ghost for _ in ghosts)]
        rows = self.rows.first(sum(grants), len(grants))
        arrays = Segment(self.table, rows, *sizes).arrays() | {"reqs_B": np.array(reqs, np.int64)}
        sheet = self.graphs.sheet(key, [*_borders(reqs, grants), *arrays.values()])

        def step() -> Tensor:
            # Made here: a segment keeps tensors, and those of the first run are none of the recording's.
            seg = Segment(self.table, replace(rows, reqs=sheet.views[0], row_ptr=sheet.views[1]), *sizes)
            seg.use(dict(zip(arrays, sheet.views[2:], strict=True)))
            return self._run(granted, seg.rows, [(decoder, seg)], None, (), [], adapted).packed()

        return _Padded(granted, key, step, decoder.e_max, is_wide)

    def _start(self, padded: _Padded) -> Callable[[], StepReport]:
        """Run or replay a step whose index arrays are on the device."""
        assert self.graphs is not None
        fetch = _fetch(self.graphs.run(padded.key, padded.step, padded.is_wide), padded.e_max)
        return lambda: self._report(padded.granted, fetch(), {}, {})

    def _run(
        self,
        granted: Sequence[Granted],
        rows: RowTable,
        segments: Sequence[tuple[Decoder, Segment]],
        spans: Sequence[Span] | None,
        processors: ProcessorRequests,
        clock: list[float],
        adapted: bool,
    ) -> _Done:
        """The step itself, from the plans of the decoders to their drafts. Waits for nothing on a GPU.

        `adapted`: rows may have adapters.
        """
        for decoder, seg in segments:
            decoder.plan(seg)
        outs = self._outs(granted, rows, segments)
        joined = all(_is_causal(decoder) for decoder, _ in segments)
        context = _Context(self, self.target, rows, spans, granted, joined, _has_few_rows(granted))
        self._tick(clock)
        # In a step of plain decoding every row is wanted, and in this order.
        wanted_M = None if rows.tok.shape[0] == outs.n_draw == outs.row.shape[0] else outs.row
        # Without spans the step is recorded as a whole.
        replayed_ME = None if spans is None else self._replay_body(rows, context, wanted_M, adapted)
        hidden_ME = self._body(rows, context, wanted_M, adapted) if replayed_ME is None else replayed_ME
        self._tick(clock)
        raw_MV = self._logits(hidden_ME[: outs.n_draw])
        if self.witness is not None:
            self.witness(raw_MV)
        given = self._score(granted, outs, hidden_ME[outs.n_draw :])
        self._tick(clock)
        drawn = self._draw(rows, raw_MV, processors, segments)
        self._tick(clock)
        commit = self._resolve(segments, drawn.id_M, hidden_ME)
        committed = apply_commit(self.table, _reqs(rows, segments), commit)
        if commit.path is not None:
            self.cache.move(self.target.groups, self.table.kv_len, *moves(self.table, rows, commit, committed.n_kv_B))
        context.states.commit(commit, committed.n_kv_B)
        return _Done(committed, self._draft(segments), commit, drawn.logp_raw_M, raw_MV, given)

    def _build(self, granted: Sequence[Granted]) -> tuple[RowTable, list[tuple[Decoder, Segment]]]:
        """The rows of the step, of which only requests and borders are known, and its segments."""
        sizes = [g.rows for g in granted]
        rows = self.rows.first(sum(sizes), len(sizes))
        segments = self._segments(granted, rows)
        borders = _borders([g.request.index for g in granted], sizes)
        if self.device.type == "cpu":
            rows.reqs.copy_(torch.from_numpy(borders[0]))
            rows.row_ptr.copy_(torch.from_numpy(borders[1]))
            return rows, segments
        arrays = [seg.arrays() for _, seg in segments]
        values = [*borders, *(array for found in arrays for array in found.values())]
        reqs_B, row_ptr_B1, *rest = upload(values, self.device)
        rows.reqs.copy_(reqs_B)
        rows.row_ptr.copy_(row_ptr_B1)
        views = iter(rest)
        for (_, seg), found in zip(segments, arrays, strict=True):
            seg.use({name: next(views) for name in found})
        return rows, segments

    def _spans(self, granted: Sequence[Granted]) -> list[Span]:
        spans: list[Span] = []
        first, groups = 0, self.target.groups
        for request, size, ahead, _ in granted:
            slots = request.n_done if groups else 0
            if groups and request.dropped:
                slots -= min([request.dropped[g] for g in groups])
            spans.append((first, size, slots + ahead + size))
            first += size
        return spans

    def chains(self, granted: Sequence[Granted], group: int) -> list[Chain]:
        """The requests with several rows that each see everything before them in a group of the target."""
        chains: list[Chain] = []
        first = 0
        for request, size, ahead, _ in granted:
            if size > 1 and _is_causal(self.decoders[request.decoder]):
                chains.append(Chain(first, size, request.slots(group) + ahead))
            first += size
        return chains

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
            prompts = [g.pending > 1 for g in mine]
            outputs = [decoder.n_outputs(n) for n in grants]
            segments.append((decoder, Segment(self.table, part, grants, outputs, prompts)))
            first_row, first = first_row + sum(grants), first + len(mine)
        return segments

    def _logits(self, hidden_ME: Tensor) -> Tensor:
        """Logits in a type that draws are made from: on a GPU half a type needs no pass to widen it."""
        logits_MV = self.model.logits(hidden_ME)
        return logits_MV if logits_MV.is_cuda and logits_MV.dtype != torch.float64 else logits_MV.float()

    def _outs(
        self, granted: Sequence[Granted], rows: RowTable, segments: Sequence[tuple[Decoder, Segment]]
    ) -> OutTable:
        """The draws, then the prompt tokens to score."""
        scored_rows: list[int] = []
        targets: list[int] = []
        first = 0
        for request, size, _, _ in granted:
            if request.params.prompt_logprobs is not None:
                for index in _scored_range(request, size):
                    scored_rows.append(first + index - 1 - request.n_done)
                    targets.append(request.tokens[index])
            first += size
        row_parts = []
        first_row = 0
        for _, seg in segments:
            # In a step of one segment nothing has to be added.
            row_parts.append(seg.out_row_M + first_row if first_row else seg.out_row_M)
            first_row += sum(seg.grants)
        n_draw = sum(sum(seg.outputs) for _, seg in segments)
        target = row_parts[0].new_empty(0)
        if scored_rows:
            outs_row, target = (torch.tensor(x, dtype=torch.int64).to(self.device) for x in (scored_rows, targets))
            row_parts.append(outs_row)
        return OutTable(_joined(row_parts), n_draw, target)

    def _draw(
        self,
        rows: RowTable,
        raw_MV: Tensor,
        processors: ProcessorRequests,
        segments: Sequence[tuple[Decoder, Segment]],
    ) -> Drawn:
        logits_MV = raw_MV
        if processors:
            logits_MV = raw_MV.to(torch.float32, copy=True)
            counts = [n for _, seg in segments for n in seg.outputs]
            firsts = list(itertools.accumulate(counts, initial=0))
            reqs = rows.reqs.tolist()
            path_ML = _paths(segments)
            for processor, members in processors:
                picked = [m for i in members for m in range(firsts[i], firsts[i + 1])]
                indices = [reqs[i] for i in members for _ in range(counts[i])]
                processor.apply(logits_MV, picked, indices, path_ML)
        made = [
            draw_rows(self._draw_tables, seg.rows.req, seg.rows.t, seg.out_row_M, decoder.shift)
            for decoder, seg in segments
        ]
        params, stream_M2, t_out_M = made[0]
        if len(made) > 1:
            params = DrawParams(*map(torch.cat, zip(*(m.params for m in made), strict=True)))
            stream_M2, t_out_M = torch.cat([m.stream_M2 for m in made]), torch.cat([m.t_out_M for m in made])
        return draw(logits_MV, params, stream_M2, t_out_M, raw_MV=raw_MV)

    def _resolve(self, segments: Sequence[tuple[Decoder, Segment]], id_M: Tensor, hidden_ME: Tensor) -> Commit:
        firsts = list(itertools.accumulate((sum(seg.outputs) for _, seg in segments), initial=0))
        commits = [
            decoder.resolve(seg, id_M[low:high], hidden_ME[low:high])
            for (decoder, seg), (low, high) in zip(segments, itertools.pairwise(firsts), strict=True)
        ]
        return join(commits, firsts[:-1])

    def _draft(self, segments: Sequence[tuple[Decoder, Segment]]) -> Tensor | None:
        """What each decoder drafted for the next step, int32 [B]; None: nothing, for no request."""
        counts = [(decoder.draft(seg), seg) for decoder, seg in segments]
        if all(count_B is None for count_B, _ in counts):
            return None
        return _joined([torch.zeros_like(seg.rows.reqs) if n_B is None else n_B for n_B, seg in counts])

    def _evaluate(self, stream: Stream, rows: RowTable, spans: Sequence[Span], wanted_M: Tensor) -> Tensor:
        hidden_ME: Tensor = stream.model(rows.tok, _Context(self, stream, rows, spans), wanted_M)
        return hidden_ME

    def _body(self, rows: RowTable, context: _Context | PieceContext, wanted_M: Tensor | None, adapted: bool) -> Tensor:
        """The target's hidden states, [R, E] or those of the wanted rows."""
        if adapted:
            return self._evaluate_adapted(rows, context, wanted_M)
        hidden_ME: Tensor = self.model(rows.tok, context, wanted_M)
        return hidden_ME

    def _replay_body(self, rows: RowTable, context: _Context, wanted_M: Tensor | None, adapted: bool) -> Tensor | None:
        """The same by pieces recorded before; None: there are none for such a step, which runs as it is."""
        shape = self._pieces_shape(rows, wanted_M)
        if shape is None or self.pieces is None:
            return None
        pieces, n_rows = self.pieces, rows.tok.shape[0]
        changed = self.model.adapters.pattern if adapted and self.model.adapters else None

        def make() -> tuple[Callable[[PieceContext], Tensor], PieceContext]:
            wide = self.rows.first(shape.rows, 1)
            mine_M = pieces.wanted[: shape.wanted] if shape.wanted else None
            fixed = PieceContext(pieces, self.target.form, self.cache, wide, self.soft_SE)
            return lambda context: self._body(wide, context, mine_M, adapted), fixed

        recording = pieces.find((*shape, changed), make)
        if recording is None:
            return None
        pieces.fill(shape, list(context.place_R.values()), wanted_M)
        hidden_ME = pieces.play(recording, context.read)
        # A copy in any case: the next step's hidden states come to the same place.
        if wanted_M is None:
            return hidden_ME[:n_rows].clone()
        return hidden_ME[: wanted_M.shape[0]].clone() if shape.wanted else hidden_ME.index_select(0, wanted_M)

    def _pieces_shape(self, rows: RowTable, wanted_M: Tensor | None) -> Shape | None:
        """What a step is padded to whose forward is recorded in pieces; None: it runs as it is."""
        if self.pieces is None or self.states.groups or not self.target.form.captures_writes:
            return None
        return self.pieces.shape(rows.tok.shape[0], None if wanted_M is None else wanted_M.shape[0])

    def _adapted(self, granted: Sequence[Granted]) -> bool:
        """Whether a request has an adapter."""
        return self.model.adapters is not None and any(g.request.adapter for g in granted)

    def _evaluate_adapted(self, rows: RowTable, context: _Context | PieceContext, wanted_M: Tensor | None) -> Tensor:
        """The target's hidden states, [R, E] or those of the wanted rows, each row under its request's adapter."""
        bank = self.model.adapters
        assert bank is not None
        # As many wanted rows as there are: the maps could not tell whether they are cut, so they are cut behind them.
        behind = wanted_M is not None and wanted_M.shape[0] == rows.tok.shape[0]
        cut_M = None if behind else wanted_M
        with bank.step(self.table.adapter.index_select(0, rows.req), cut_M):
            hidden_ME: Tensor = self.model(rows.tok, context, cut_M)
        return hidden_ME.index_select(0, wanted_M) if behind and wanted_M is not None else hidden_ME

    def _score(self, granted: Sequence[Granted], outs: OutTable, hidden_SE: Tensor) -> dict[int, TopLogprobs]:
        """Log-probs of given tokens, by request of the step; hidden states of the scored rows only."""
        given: dict[int, TopLogprobs] = {}
        start = 0
        for i, (request, size, _, _) in enumerate(granted):
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

    def _top(self, granted: Sequence[Granted], done: _Done) -> dict[int, TopLogprobs]:
        """Top log-probs of the requests that asked for them, one row for each token that may be emitted."""
        top: dict[int, TopLogprobs] = {}
        for i, (request, _, _, _) in enumerate(granted):
            if request.params.logprobs is not None:
                rows_MV = done.raw_MV[done.commit.priced_by[i].long()].float()
                top[i] = gather_logprobs(rows_MV, done.commit.emit[i].clamp(min=0), request.params.logprobs)
        return top

    def _report(
        self, granted: Sequence[Granted], read: _Read, top: dict[int, TopLogprobs], given: dict[int, TopLogprobs]
    ) -> StepReport:
        count = len(granted)
        n_emit = read.n_emit[:count].tolist()
        emit, logprob = read.emit[:count].tolist(), read.logprob[:count].tolist()
        return StepReport(
            n_kv=read.n_kv[:count].tolist(),
            n_emit=n_emit,
            emit=[tokens[:n] for tokens, n in zip(emit, n_emit, strict=True)],
            finish=read.finish[:count].tolist(),
            logprob=[values[:n] for values, n in zip(logprob, n_emit, strict=True)],
            drafted=[0] * count if read.drafted is None else read.drafted[:count].tolist(),
            top={i: TopLogprobs(*(x[: n_emit[i]] for x in found)) for i, found in top.items() if n_emit[i]},
            given=given,
        )

    def _tick(self, clock: list[float]) -> None:
        clock.append(time.perf_counter())

    def _count(self, granted: Sequence[Granted]) -> None:
        self.times.steps += 1
        self.times.rows += sum(g.rows for g in granted)

    def _add_times(self, clock: Sequence[float]) -> None:
        stages = ("build_s", "body_s", "head_s", "draw_s", "commit_s")
        for name, (start, end) in zip(stages, itertools.pairwise(clock), strict=True):
            setattr(self.times, name, getattr(self.times, name) + end - start)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kernel once over ghost rows: the first request must not wait for compilers."""
        for n_rows in {1, min(16, self.max_rows)}:
            self.time_step(n_rows, repeats=0)
            if self.model.adapters is not None:
                self.model.adapters.warm_up(n_rows)
        index = torch.full((1,), self.table.ghost, dtype=torch.int64, device=self.device)
        logits_MV = torch.zeros(1, self.model.config.vocab_size, device=self.device)
        neutral = torch.ones(1, device=self.device)
        params = DrawParams(neutral, self.table.top_k[index], neutral, self.table.min_p[index])
        draw(logits_MV, params, self.table.stream[index], self.table.n_tok[index])

    @torch.inference_mode()
    def time_step(self, n_rows: int, repeats: int = 2) -> float:
        """Seconds of one pass over `n_rows` ghost rows and one output row: the best of 1 + `repeats` tries.

        The first try also loads what the step needs; where one takes long, it is repeated once only.
        """
        self._built = None  # its borders are overwritten here
        rows = self.rows.first(n_rows, 1)
        rows.clear(self.table.ghost)
        rows.reqs.fill_(self.table.ghost)
        rows.row_ptr.copy_(torch.tensor([0, n_rows], dtype=torch.int32))
        best = float("inf")
        for _ in range(1 + repeats):
            clock = [time.perf_counter()]
            joined = all(map(_is_causal, self.decoders.values()))
            few = n_rows < FEW_ROWS
            context = _Context(self, self.target, rows, [(0, n_rows, 1)], joined=joined, few=few)
            hidden_RE = self.model(rows.tok, context)
            self.model.logits(hidden_RE[:1])
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._tick(clock)
            first, best = best, min(best, clock[1] - clock[0])
            if first < float("inf") and best > LONG_STEP_S:
                break
        return best


def _is_causal(decoder: Decoder) -> bool:
    """Whether each of its rows sees all slots up to its own, and no others."""
    return decoder.causal and not decoder.tree


def _has_few_rows(granted: Sequence[Granted]) -> bool:
    """Whether no request of the step counts as a prompt for attention."""
    return all(g.rows < FEW_ROWS for g in granted)


def _borders(reqs: Sequence[int], grants: Sequence[int]) -> list[np.ndarray]:
    """Request indices and row borders, int32 [B] and [B+1]."""
    borders = list(itertools.accumulate(grants, initial=0))
    return [np.array(reqs, np.int32), np.array(borders, np.int32)]


def _fetch(packed: Tensor, e_max: int) -> Callable[[], _Read]:
    """Start the copy of a packed report to the host; the result waits for it."""
    is_cuda = packed.is_cuda
    landed = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=is_cuda)
    landed.copy_(packed, non_blocking=True)
    event = torch.cuda.Event() if is_cuda else None
    if event is not None:
        event.record()

    def read() -> _Read:
        if event is not None:
            event.synchronize()
        n_kv, n_emit, finish, drafted, *rest = landed.numpy()
        emit, logprob = np.stack(rest[:e_max], 1), np.stack(rest[e_max:], 1).view(np.float32)
        return _Read(n_kv, n_emit, finish, drafted, emit, logprob)

    return read


def _reqs(rows: RowTable, segments: Sequence[tuple[Decoder, Segment]]) -> Tensor:
    """Request indices of the step, int64 [B]; of a single segment they are there already."""
    return segments[0][1].reqs_B if len(segments) == 1 else rows.reqs.long()


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
