"""Drafts by a smaller model with the same tokenizer (speculative decoding, arXiv 2211.17192, 2302.01318).

The draft model keeps its own cache in groups of its own, one clock behind the target's at most. After each commit it
evaluates the known tokens that it has not seen, then its own drafts one by one. It draws with the target's noise: where
both models agree on the distribution they draw the same token, also when sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.decoding.base import DECODERS, OwnModel, Segment, Setup, SoftRows, Span
from headrace.decoding.chain import ChainDecoder
from headrace.errors import ConfigError
from headrace.kernels.draw import DrawParams, draw
from headrace.models.checkpoint import load_model
from headrace.request import Request
from headrace.step import NONE, RowTable
from headrace.tables import RequestTable


@DECODERS.register(
    "draft_model",
    label="exact",
    summary="A smaller model drafts a chain; verified by the coupled walk.",
    source="arXiv 2211.17192, 2302.01318",
    option='decoder="draft_model", draft_model="<checkpoint>"',
    example={"decoder": "draft_model", "draft_model": "<checkpoint>"},
)
class DraftModel(ChainDecoder):
    """Runs the draft model after every commit, for all its requests together."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.scratch = self.most
        config, weight = setup.config, next(setup.model.parameters())
        if config.draft_model is None:
            raise ConfigError('decoder="draft_model" needs draft_model, the directory or hub id of a smaller model')
        dtype = str(weight.dtype).removeprefix("torch.")
        drafter = load_model(
            config.draft_model,
            device=str(setup.device),
            dtype=dtype,
            load_format="auto",
            seed=config.seed,
            max_model_len=setup.max_len,
        )
        if drafter.config.vocab_size != setup.model.config.vocab_size:
            raise ConfigError(
                f"draft_model {config.draft_model} has a vocabulary of {drafter.config.vocab_size} tokens, the model "
                f"{setup.model.config.vocab_size}: a drafter needs the same tokenizer"
            )
        self.models = (drafter,)
        # Scratch slots written behind the draft model's committed ones, by request index.
        self._written_B = torch.zeros(setup.max_reqs + 1, dtype=torch.int32, device=setup.device)

    def bind(self, own: Sequence[OwnModel], soft: SoftRows) -> None:
        """The draft model's own pass, and its clock."""
        ((self._evaluate, self._kv_len_GB),) = own

    def admit(self, request: Request) -> None:
        """A prefix hit brings the draft model's cache too."""
        self._written_B[request.index].zero_()  # see Chain.admit

    def captures(self, prompts: bool) -> bool:
        """Steps of drafts: all counts of rows are known before."""
        return not prompts

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        """Catch up with the known tokens, then K passes of one row a request."""
        table, reqs_B = seg.table, seg.reqs_B
        n_tok_B, n_done_B = table.n_tok[reqs_B], table.n_done[reqs_B]
        # Accepted drafts are in the cache already: their slots become committed.
        kv_B = torch.minimum(self._kv_len_GB[0][reqs_B] + self._written_B[reqs_B], n_done_B)
        end_B = torch.where(room_B > 0, n_tok_B, n_done_B)
        # In plain decoding at most one accepted draft and the new token are unseen; of a prompt all rows of the step.
        most = [rows + 1 if prompt else 2 for rows, prompt in zip(seg.grants, seg.prompts, strict=True)]
        self._set_clock(reqs_B, kv_B)
        rows, spans, last_B = self._known_rows(seg, most, kv_B, end_B)
        hidden_BE = self._evaluate(rows, spans, last_B)
        self._set_clock(reqs_B, end_B)
        draft_BK = torch.zeros(len(most), self.most, dtype=torch.int32, device=reqs_B.device)
        for k in range(self.most):
            draft_BK[:, k] = self._draw(seg, hidden_BE, n_tok_B + k).clamp_(min=0)
            if k + 1 < self.most:
                rows, spans, last_B = self._draft_row(seg, draft_BK[:, k], k, n_tok_B, k + 1 < room_B)
                hidden_BE = self._evaluate(rows, spans, last_B)
        self._written_B[reqs_B] = (room_B - 1).clamp(0, self.most - 1).int()
        return draft_BK, room_B.int()

    def _set_clock(self, reqs_B: Tensor, kv_B: Tensor) -> None:
        for kv_len_B in self._kv_len_GB:
            kv_len_B[reqs_B] = kv_B

    def _known_rows(
        self, seg: Segment, most: list[int], kv_B: Tensor, end_B: Tensor
    ) -> tuple[RowTable, list[Span], Tensor]:
        """Rows of the known tokens [kv, end) of each request, ghosts where there are fewer than `most`."""
        table, device = seg.table, kv_B.device
        # Without prompts all counts are equal, and nothing has to be uploaded.
        even = not any(seg.prompts)
        count_B = torch.full_like(seg.reqs_B, most[0]) if even else torch.tensor(most, device=device)
        rows = _rows(sum(most), count_B, seg.reqs_B, table.ghost)
        first_B = count_B.cumsum(0) - count_B
        entry_R = torch.arange(len(most), device=device).repeat_interleave(count_B, output_size=sum(most))
        k_R = (torch.arange(sum(most), device=device) - first_B[entry_R]).int()
        t_R = kv_B[entry_R] + k_R
        _fill(rows, table, seg.reqs_B[entry_R], t_R, k_R, t_R < end_B[entry_R])
        rows.tok.copy_(table.hist[rows.req.long(), rows.t.long()])
        last_B = first_B + (end_B - kv_B - 1).clamp(min=0)
        return rows, self._spans(most, seg), last_B

    def _draft_row(
        self, seg: Segment, tok_B: Tensor, k: int, n_tok_B: Tensor, live_B: Tensor
    ) -> tuple[RowTable, list[Span], Tensor]:
        """One row a request: draft k behind the known tokens."""
        count = len(seg.grants)
        rows = _rows(count, torch.ones_like(seg.reqs_B), seg.reqs_B, seg.table.ghost)
        k_R = torch.full_like(n_tok_B, k)
        _fill(rows, seg.table, seg.reqs_B, n_tok_B + k, k_R, live_B)
        rows.tok.copy_(tok_B)
        return rows, self._spans([1] * count, seg), torch.arange(count, device=n_tok_B.device)

    def _spans(self, sizes: list[int], seg: Segment) -> list[Span]:
        spans, first = [], 0
        for size in sizes:
            spans.append((first, size, seg.table.hist.shape[1]))
            first += size
        return spans

    def _draw(self, seg: Segment, hidden_BE: Tensor, t_out_B: Tensor) -> Tensor:
        table, reqs_B = seg.table, seg.reqs_B
        params = DrawParams(table.temperature[reqs_B], table.top_k[reqs_B], table.top_p[reqs_B], table.min_p[reqs_B])
        logits_BV = self.models[0].logits(hidden_BE).float()
        return draw(logits_BV, params, table.stream[reqs_B], t_out_B).id_M


def _rows(n_rows: int, count_B: Tensor, reqs_B: Tensor, ghost: int) -> RowTable:
    rows = RowTable.allocate(n_rows, len(reqs_B), ghost, 1, reqs_B.device)
    rows.reqs.copy_(reqs_B)
    torch.cumsum(count_B, 0, dtype=torch.int32, out=rows.row_ptr[1:])
    return rows


def _fill(rows: RowTable, table: RequestTable, req_R: Tensor, t_R: Tensor, k_R: Tensor, live_R: Tensor) -> None:
    """Chain rows behind the committed slots, ghosts where `live_R` is False."""
    rows.req.copy_(torch.where(live_R, req_R, table.ghost))
    rows.t.copy_(torch.where(live_R, t_R, 0))
    rows.pos.copy_(torch.where(live_R, t_R + table.pos_off[req_R], 0))
    rows.dst.copy_(torch.where(live_R, k_R, 0))
    rows.a.copy_(torch.where(live_R, 0, NONE))
    rows.c.copy_(torch.where(live_R, k_R + 1, 1))
