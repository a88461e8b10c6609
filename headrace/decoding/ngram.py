"""Drafts by n-gram look-up: what followed the last tokens the time before (prompt look-up decoding; the same idea as
the retrieval part of arXiv 2304.04487). No second model, no training; good where output repeats its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.decoding.base import DECODERS, Segment
from headrace.decoding.chain import ChainDecoder

LONGEST = 3
SHORTEST = 1
"""Tokens of the suffix that is looked up; longer matches are preferred."""


@DECODERS.register(
    "ngram",
    label="exact",
    summary="Drafts what followed the last tokens the time before; verified by the coupled walk.",
    source="prompt look-up decoding; arXiv 2304.04487",
)
class NGram(ChainDecoder):
    """The latest earlier place where the longest suffix of up to three tokens stands."""

    def captures(self, prompts: bool) -> bool:
        """Steps of drafts, whose draws are as many as their rows."""
        return not prompts

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens behind the match, as far as they are known. Letters: T tokens of the history."""
        reqs_B = seg.reqs_B
        n_B1 = seg.table.n_tok[reqs_B].long()[:, None]
        hist_BT = seg.table.hist[reqs_B]
        place_T = torch.arange(hist_BT.shape[1], device=hist_BT.device)
        best_B = torch.full_like(n_B1[:, 0], -1)
        same_BT = torch.ones_like(hist_BT, dtype=torch.bool)
        for length in range(1, LONGEST + 1):
            # same[e]: the `length` tokens that end at e equal the last `length` ones.
            last_B1 = hist_BT.gather(1, (n_B1 - length).clamp(min=0))
            shifted_BT = hist_BT.roll(length - 1, 1)
            same_BT = same_BT & (shifted_BT == last_B1) & (place_T >= length - 1) & (place_T < n_B1 - 1)
            if length >= SHORTEST:
                found_B = torch.where(same_BT, place_T, -1).amax(1)
                best_B = torch.where(found_B >= 0, found_B, best_B)
        step_K = torch.arange(self.most, device=best_B.device)
        source_BK = best_B[:, None] + 1 + step_K
        count_B = torch.where(best_B >= 0, n_B1[:, 0] - best_B - 1, 0).minimum(room_B)
        draft_BK = hist_BT.gather(1, source_BK.clamp(0, hist_BT.shape[1] - 1))
        return draft_BK, count_B.int()
