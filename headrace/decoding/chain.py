"""Chains of drafts, verified by the coupled walk: what n-gram look-up and draft models share.

Rows of a request are its pending tokens and then its drafts. Every row from the last pending one on draws the
target's own token; a draft is accepted while it equals what the row before it drew, and the first draw that no draft
matches is emitted too. So d accepted drafts emit d + 1 tokens, and with no draft the step is a plain one
(speculative decoding: arXiv 2211.17192; sampling as the target would have sampled with shared noise: the Gumbel
coupling of arXiv 2403.10444).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from headrace.decoding.autoregressive import plan_known, walks
from headrace.decoding.base import Clocks, Decoder, Demand, Segment, Setup
from headrace.kernels.walk import Drafts, walk
from headrace.request import Request
from headrace.step import Commit


class ChainDecoder(Decoder):
    """Keeps the drafts of each request and verifies them; a method says where drafts come from.

    Letters: K drafts at most (`draft_tokens`), W = K + 1 draws at most.
    """

    causal = True
    scratch = 0
    """See `Demand.scratch`."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.most = setup.config.draft_tokens
        self.e_max = self.most + 1
        self.draft_BK = torch.zeros(setup.max_reqs + 1, self.most, dtype=torch.int32, device=setup.device)
        self.count_B = torch.zeros(setup.max_reqs + 1, dtype=torch.int32, device=setup.device)

    @abstractmethod
    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts behind the known tokens, int32 [B, K], and their number, int32 [B], at most `room_B`.

        Requests that have more than one token pending, or that ended, have no room; drafts are never negative.
        """

    def admit(self, request: Request) -> None:
        """Nothing is drafted yet."""
        self.count_B[request.index].zero_()  # an assignment would copy a number from the host and wait

    def demand(self, clocks: Clocks) -> Demand:
        """Pending tokens and drafts; one row is enough for progress."""
        return Demand(1, clocks.n_tok - clocks.n_done + clocks.drafted, self.scratch)

    def n_outputs(self, rows: int) -> int:
        """The last pending row and the drafts; of a chunk as many rows, whose draws are not read."""
        return min(rows, self.most + 1)

    def plan(self, seg: Segment) -> None:
        """Pending tokens, then drafts."""
        plan_known(seg)
        req_R = seg.reqs_B[seg.entry_R]
        ahead_R = seg.rows.t - seg.table.n_tok[req_R]
        draft_R = self.draft_BK[req_R, ahead_R.clamp(0, self.most - 1).long()]
        seg.rows.tok.copy_(torch.where(ahead_R >= 0, draft_R, seg.rows.tok))

    def paths(self, seg: Segment) -> Tensor:
        """The drafts before each draw."""
        req_M = seg.reqs_B[seg.out_entry_M]
        count_M = seg.rows.t[seg.out_row_M] + 1 - seg.table.n_tok[req_M]
        step_K = torch.arange(self.most, device=req_M.device)
        return torch.where(step_K < count_M[:, None], self.draft_BK[req_M], -1).long()

    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        """The coupled walk."""
        return Commit(*walk(walks(seg), id_M, Drafts(self.draft_BK, self.count_B)))

    def draft(self, seg: Segment) -> Tensor:
        """Propose for the requests that decode."""
        table, reqs_B = seg.table, seg.reqs_B
        n_tok_B = table.n_tok[reqs_B]
        # A draft at the last index that may be known would be accepted in vain: nothing may follow it.
        room_B = (table.limit[reqs_B] - 1 - n_tok_B).clamp(0, self.most)
        decodes_B = (n_tok_B - table.n_done[reqs_B] == 1) & (table.finish[reqs_B] == 0)
        draft_BK, count_B = self.propose(seg, torch.where(decodes_B, room_B, 0))
        self.draft_BK[reqs_B] = draft_BK
        self.count_B[reqs_B] = count_B
        return count_B
