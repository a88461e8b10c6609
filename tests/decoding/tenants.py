"""Decoders that exist to stretch the seam: drafts by script, a tree, a block, soft rows.

`registered()` puts them into the registry for the time of a test; the engine meets them only by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.decoding.base import DECODERS, Clocks, Demand, OwnModel, Segment, Setup, SoftRows
from headrace.decoding.chain import ChainDecoder
from headrace.request import Request
from headrace.step import Commit

_truth: dict[tuple[int, ...], tuple[int, ...]] = {}
"""What plain decoding makes of a prompt: drafters that are always right read it here."""


def teach(prompt: tuple[int, ...], output: tuple[int, ...]) -> None:
    """Tell the scripted drafters how a prompt goes on."""
    _truth[prompt] = output


class _Scripted(ChainDecoder):
    """Drafts from the known continuation, changed by `spoil`."""

    def spoil(self, token: int, place: int) -> int:
        return token

    def room(self, room: int) -> int:
        return room

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        draft_BK = torch.zeros(len(seg.grants), self.most, dtype=torch.int32, device=seg.table.device)
        count_B = torch.zeros(len(seg.grants), dtype=torch.int32, device=seg.table.device)
        for i, index in enumerate(seg.reqs_B.tolist()):
            known = tuple(seg.table.hist[index, : int(seg.table.n_tok[index])].tolist())
            ahead = next(
                (
                    output[len(known) - len(prompt) :]
                    for prompt, output in _truth.items()
                    if (prompt + output)[: len(known)] == known and len(known) >= len(prompt)
                ),
                (),
            )
            drafts = [self.spoil(token, len(known) + k) for k, token in enumerate(ahead)]
            drafts = (drafts + [5] * self.most)[: self.room(int(room_B[i]))][: self.most]
            draft_BK[i, : len(drafts)] = torch.tensor(drafts, dtype=torch.int32)
            count_B[i] = len(drafts)
        return draft_BK, count_B


class AlwaysRight(_Scripted):
    """Every draft is what plain decoding emits; behind its end, drafts go on."""


class AlwaysWrong(_Scripted):
    """No draft is right."""

    def spoil(self, token: int, place: int) -> int:
        return (token + 1) % self.setup.model.config.vocab_size


class SometimesRight(_Scripted):
    """Every third draft is wrong, and the number of drafts changes."""

    def spoil(self, token: int, place: int) -> int:
        return token if place % 3 else (token + 7) % self.setup.model.config.vocab_size

    def room(self, room: int) -> int:
        return max(room - 1, 0)


class OverLong(_Scripted):
    """Ignores how many drafts may still be known: the engine has to clamp."""

    def room(self, room: int) -> int:
        return self.most if room else 0


class Tree(_Scripted):
    """Two branches behind the known tokens, the wrong one first: accepted keys have to move.

    Rows: pending tokens, then branch A (wrong) and branch B (the chain's drafts), each as long as the drafts.
    """

    tree = True

    def demand(self, clocks: Clocks) -> Demand:
        return Demand(1, clocks.n_tok - clocks.n_done + 2 * clocks.drafted)

    def n_outputs(self, rows: int) -> int:
        return min(rows, 2 * self.most + 1)

    def _node(self, seg: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """By row: offset behind the pending rows (negative for those), drafts d, depth in its branch, branch."""
        req_R = seg.reqs_B[seg.entry_R]
        pending_R = seg.table.n_tok[req_R] - seg.table.n_done[req_R]
        node_R, d_R = seg.k_R - pending_R, self.count_B[req_R].clamp(min=1)
        return node_R, d_R, node_R % d_R, node_R // d_R

    def plan(self, seg: Segment) -> None:
        super().plan(seg)
        node_R, d_R, depth_R, branch_R = self._node(seg)
        req_R = seg.reqs_B[seg.entry_R]
        is_node_R = node_R >= 0
        draft_R = self.draft_BK[req_R, depth_R.clamp(max=self.most - 1).long()]
        wrong_R = (draft_R + 1) % self.setup.model.config.vocab_size
        seg.rows.tok.copy_(torch.where(is_node_R, torch.where(branch_R == 0, wrong_R, draft_R), seg.rows.tok))
        t_R = seg.table.n_tok[req_R] + depth_R
        seg.rows.t.copy_(torch.where(is_node_R, t_R, seg.rows.t))
        seg.rows.pos.copy_(torch.where(is_node_R, t_R + seg.table.pos_off[req_R], seg.rows.pos[0]))
        where_X = is_node_R.nonzero()[:, 0]
        if len(where_X):
            pending_X = (seg.k_R - node_R)[where_X, None]
            # The interval of a node begins behind the pending rows, which all nodes see.
            seg.rows.a[where_X] = pending_X[:, 0]
            seg.rows.b[where_X] = pending_X[:, 0]
            offset_k = torch.arange(2 * self.most, device=where_X.device)
            mine = (offset_k // d_R[where_X, None] == branch_R[where_X, None]) & (offset_k <= node_R[where_X, None])
            seg.mask_rows(where_X, mine)

    def paths(self, seg: Segment) -> Tensor:
        node_R, _, depth_R, branch_R = self._node(seg)
        req_M = seg.reqs_B[seg.out_entry_M]
        node_M, depth_M, branch_M = (x[seg.out_row_M] for x in (node_R, depth_R, branch_R))
        draft_MK = self.draft_BK[req_M]
        draft_MK = torch.where((branch_M == 0)[:, None], (draft_MK + 1) % self.setup.model.config.vocab_size, draft_MK)
        count_M = torch.where(node_M >= 0, depth_M + 1, 0)
        return torch.where(torch.arange(self.most, device=count_M.device) < count_M[:, None], draft_MK, -1).long()

    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        """The walk, request by request."""
        table, rows = seg.table, seg.rows
        count, width = len(seg.grants), self.e_max
        emit, priced = (torch.zeros(count, width, dtype=torch.int32) for _ in range(2))
        path = torch.zeros(count, width, dtype=torch.int32)
        n_kv, n_emit, path_from = (torch.zeros(count, dtype=torch.int32) for _ in range(3))
        for i, r in enumerate(seg.reqs_B.tolist()):
            grant, outs = seg.grants[i], seg.outputs[i]
            pending = int(table.n_tok[r] - table.n_done[r])
            first_row, first_out = int(seg.first_B[i]), int(seg.out_first_B[i])
            if grant < pending:
                n_kv[i] = path_from[i] = grant
                continue
            drafts = int(self.count_B[r])
            here, accepted, emitted = pending - 1, [], []
            while True:
                draw = first_out + here - (grant - outs)
                emitted.append((int(id_M[draw]), draw))
                depth = 0 if here < pending else (here - pending) % drafts + 1
                branches = [0, 1] if here < pending else [(here - pending) // drafts]
                nodes = [pending + b * drafts + depth for b in branches if depth < drafts]
                match = [k for k in nodes if k < grant and int(rows.tok[first_row + k]) == emitted[-1][0]]
                if not match:
                    break
                here = match[0]
                accepted.append(here)
            n_kv[i], n_emit[i], path_from[i] = pending + len(accepted), len(emitted), pending
            for k, (token, draw) in enumerate(emitted):
                emit[i, k], priced[i, k] = token, draw
            path[i, : len(accepted)] = torch.tensor(accepted, dtype=torch.int32)
        return Commit(*(x.to(id_M.device) for x in (n_kv, n_emit, emit, priced, path, path_from)))


class Jacobi(ChainDecoder):
    """A block that is guessed anew until it stands still: for several steps nothing is emitted, and the provisional
    slots are written again (parallel decoding by fixed points, arXiv 2305.10427)."""

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        draft_BK = (
            torch.arange(self.most, dtype=torch.int32, device=seg.table.device).expand(len(seg.grants), -1).clone()
        )
        going_B = self.going_B[seg.reqs_B]
        draft_BK = torch.where(going_B[:, None], self.draft_BK[seg.reqs_B], draft_BK)
        return draft_BK, room_B.int()

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.going_B = torch.zeros(setup.max_reqs + 1, dtype=torch.bool, device=setup.device)

    def admit(self, request: Request) -> None:
        super().admit(request)
        self.going_B[request.index] = False

    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        commit = super().resolve(seg, id_M, hidden_ME)
        reqs_B = seg.reqs_B
        drafts_B = self.count_B[reqs_B]
        whole_B = (commit.n_emit == 0) | (commit.n_emit == drafts_B + 1) | (seg.grant_B != drafts_B + 1)
        self.going_B[reqs_B] = ~whole_B & (drafts_B > 0)
        # The next guess is what the rows drew. Rows behind a draw that failed are never right.
        self.draft_BK[reqs_B] = commit.emit[:, : self.most].clamp(min=0)
        nothing_B = torch.zeros_like(commit.n_kv)
        commit.n_kv = torch.where(whole_B, commit.n_kv, nothing_B)
        commit.n_emit = torch.where(whole_B, commit.n_emit, nothing_B)
        return commit


class Soft(ChainDecoder):
    """Rows that are no tokens, made from hidden states, stand behind the drafts; what they draw is drafted next."""

    n_soft = 3

    def bind(self, own: Sequence[OwnModel], soft: SoftRows) -> None:
        self.soft = soft
        self.next_B: dict[int, list[int]] = {}

    def demand(self, clocks: Clocks) -> Demand:
        tail = min(self.n_soft, clocks.limit - clocks.n_tok - clocks.drafted)
        return Demand(1, clocks.n_tok - clocks.n_done + clocks.drafted + max(tail, 0))

    def n_outputs(self, rows: int) -> int:
        return min(rows, self.most + 1 + self.n_soft)

    def _soft_number(self, seg: Segment) -> Tensor:
        """By row: number of the soft row, negative for tokens."""
        req_R = seg.reqs_B[seg.entry_R]
        return seg.rows.t - seg.table.n_tok[req_R] - self.count_B[req_R]

    def plan(self, seg: Segment) -> None:
        super().plan(seg)
        number_R = self._soft_number(seg)
        seg.rows.tok.copy_(torch.where(number_R >= 0, -1 - (self.soft.first + number_R), seg.rows.tok))

    def resolve(self, seg: Segment, id_M: Tensor, hidden_ME: Tensor) -> Commit:
        number_M = self._soft_number(seg)[seg.out_row_M]
        for i, r in enumerate(seg.reqs_B.tolist()):
            mine = (seg.out_entry_M == i) & (number_M >= 0)
            self.next_B[r] = id_M[mine].clamp(min=0).tolist()
        assert hidden_ME.shape[0] == len(id_M)
        norm_ME = hidden_ME / hidden_ME.norm(dim=1, keepdim=True)
        self.soft.table_SE[:] = norm_ME[-1] * torch.arange(1, self.n_soft + 1, device=id_M.device)[:, None]
        return super().resolve(seg, id_M, hidden_ME)

    def propose(self, seg: Segment, room_B: Tensor) -> tuple[Tensor, Tensor]:
        draft_BK = torch.zeros(len(seg.grants), self.most, dtype=torch.int32, device=seg.table.device)
        count_B = torch.zeros(len(seg.grants), dtype=torch.int32, device=seg.table.device)
        for i, r in enumerate(seg.reqs_B.tolist()):
            found = self.next_B.get(r, [])[: min(self.most, int(room_B[i]))]
            draft_BK[i, : len(found)] = torch.tensor(found, dtype=torch.int32)
            count_B[i] = len(found)
        return draft_BK, count_B


TENANTS = {
    "test_tree": Tree,
    "test_jacobi": Jacobi,
    "test_soft": Soft,
    "test_always_right": AlwaysRight,
    "test_always_wrong": AlwaysWrong,
    "test_sometimes_right": SometimesRight,
    "test_over_long": OverLong,
}


@contextmanager
def registered(*parts: tuple[str, type]) -> Iterator[None]:
    """Register test decoders, and take them out again."""
    for name, kind in parts:
        DECODERS.register(name, label="exact", summary="A decoder of the tests.")(kind)
    try:
        yield
    finally:
        for name, _ in parts:
            DECODERS.remove(name)
