"""Toy models with fixed states, in float64, and a forward of them that knows neither rows nor steps.

`R` is a recurrent block: a short convolution, then gated linear attention (arXiv 2312.06635), S_t = diag(g_t) S_{t-1} +
k_t v_t^T and o_t = S_t^T q_t, so two states; `A` is full attention, `W` a sliding window. Letters: R rows, B requests,
E width, C taps, H heads, K and V sizes of a head, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headrace.layers.norm import RMSNorm
from headrace.layers.placement import Placement
from headrace.models.base import CausalLM
from headrace.models.decoder import embed
from headrace.step import LayerState, StepContext

VOCAB, EOS, MODEL_LEN = 31, 3, 96
WIDTH, TAPS, HEADS, KEY, VALUE, WINDOW = 12, 3, 2, 3, 4, 6
RING = 4
PLACE = Placement(torch.device("cpu"), torch.float64)


def conv_scan(taps_CE: Tensor, state_BCE: Tensor, inputs: Sequence[Tensor], row_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = sum_c w_c x_{t-C+1+c}; the state holds the last inputs, oldest first."""
    (x_RE,) = inputs
    out_RE = torch.full_like(x_RE, float("nan"))
    for b, (low, high) in enumerate(zip(row_ptr.tolist(), row_ptr.tolist()[1:])):
        for r in range(low, high):
            past_CE = torch.cat([state_BCE[b], x_RE[r : r + 1]])
            out_RE[r] = (past_CE * taps_CE).sum(0)
            state_BCE[b] = past_CE[1:]
    return out_RE, state_BCE


def linear_scan(state_BHKV: Tensor, inputs: Sequence[Tensor], row_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Gated linear attention, row by row."""
    q_RHK, k_RHK, v_RHV, g_RHK = inputs
    out_RHV = torch.full_like(v_RHV, float("nan"))
    for b, (low, high) in enumerate(zip(row_ptr.tolist(), row_ptr.tolist()[1:])):
        for r in range(low, high):
            state_BHKV[b] = g_RHK[r, :, :, None] * state_BHKV[b] + k_RHK[r, :, :, None] * v_RHV[r, :, None]
            out_RHV[r] = (q_RHK[r, :, :, None] * state_BHKV[b]).sum(1)
    return out_RHV, state_BHKV


CONV_STATE = LayerState("fixed", state_shape=(TAPS - 1, WIDTH), ring=RING)
LINEAR_STATE = LayerState("fixed", state_shape=(HEADS, KEY, VALUE), ring=RING)


class Toy(CausalLM):
    """One block a letter of `pattern`, each added to the residual stream behind a norm."""

    def __init__(self, pattern: str, *, vocab: int = VOCAB) -> None:
        super().__init__()
        self.pattern = pattern
        self.max_model_len = MODEL_LEN
        # The engine asks for these sizes, and for a text that names the model.
        self.config: Any = SimpleNamespace(vocab_size=vocab, hidden_size=WIDTH, pattern=pattern)
        generator = torch.Generator().manual_seed(5)

        def weight(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
            return nn.Parameter(values * 1.5, requires_grad=False)

        self.embed_VE, self.head_VE = weight(vocab, WIDTH), weight(vocab, WIDTH)
        with torch.no_grad():
            self.embed_VE.mul_(3)
        self.norm = RMSNorm(WIDTH, 1e-6, PLACE)
        nn.init.ones_(self.norm.weight)
        mixed = HEADS * (3 * KEY + VALUE)
        sizes = {"R": mixed, "A": 3 * HEADS * KEY, "W": 3 * HEADS * KEY}
        self.inputs = nn.ParameterList(weight(sizes[kind], WIDTH) for kind in pattern)
        self.outs = nn.ParameterList(weight(WIDTH, HEADS * (VALUE if kind == "R" else KEY)) for kind in pattern)
        self.taps = nn.ParameterList(weight(TAPS, WIDTH) for _ in pattern)

    def layer_states(self) -> list[LayerState]:
        """Two states a recurrent block, one an attention block."""
        of = {
            "R": [CONV_STATE, LINEAR_STATE],
            "A": [LayerState("paged", HEADS, KEY, KEY)],
            "W": [LayerState("window", HEADS, KEY, KEY, window=WINDOW)],
        }
        return [state for kind in self.pattern for state in of[kind]]

    def split(self, block: int, x_RE: Tensor) -> list[Tensor]:
        """Queries, keys, and values of a block, and the gates of a recurrent one."""
        y_RX = F.linear(x_RE, self.inputs[block])
        if self.pattern[block] != "R":
            return [x.unflatten(1, (HEADS, KEY)) for x in y_RX.chunk(3, 1)]
        q, k, g, v = y_RX.split([HEADS * KEY] * 3 + [HEADS * VALUE], 1)
        q, k, g = (x.unflatten(1, (HEADS, KEY)) for x in (q, k, g))
        return [q, k.tanh(), v.unflatten(1, (HEADS, VALUE)), torch.sigmoid(g + 1)]

    def forward(self, tok_R: Tensor, ctx: StepContext, wanted_M: Tensor | None = None) -> Tensor:
        """Rows through the step's operations."""
        x_RE = embed(tok_R, self.embed_VE, ctx.soft_SE)
        layer = 0
        for block, kind in enumerate(self.pattern):
            h_RE = self.norm(x_RE)
            if kind == "R":
                h_RE = F.silu(ctx.recur(layer, (h_RE,), partial(conv_scan, self.taps[block])))
                mixed = ctx.recur(layer + 1, self.split(block, h_RE), linear_scan)
                layer += 2
            else:
                mixed = ctx.attend(layer, *self.split(block, h_RE), scale=KEY**-0.5)
                layer += 1
            x_RE = x_RE + F.linear(mixed.flatten(1), self.outs[block])
        x_RE = self.norm(x_RE)
        return x_RE if wanted_M is None else x_RE[wanted_M]

    def logits(self, hidden_ME: Tensor) -> Tensor:
        """Logits [M, V], float64."""
        return F.linear(hidden_ME, self.head_VE)

    def tensors(self) -> dict[str, list[Tensor]]:
        """No checkpoint."""
        raise NotImplementedError


@cache
def toy(pattern: str) -> Toy:
    """The model of a pattern; every caller gets the same one."""
    return Toy(pattern)


class Naive(NamedTuple):
    """One forward over a whole sequence."""

    logits_TV: Tensor
    states: dict[int, Tensor]
    """States after each token, [T, *X], by layer."""


@torch.inference_mode()
def naive(model: Toy, tokens: Sequence[int]) -> Naive:
    """The whole sequence at once: convolution as such, recurrences in closed form, attention as a dense mask."""
    x_TE = F.embedding(torch.tensor(tokens), model.embed_VE)
    count = len(tokens)
    t, causal_TT = torch.arange(count), torch.ones(count, count, dtype=torch.bool).tril()
    states: dict[int, Tensor] = {}
    layer = 0
    for block, kind in enumerate(model.pattern):
        h_TE = model.norm(x_TE)
        if kind == "R":
            padded_TE = F.pad(h_TE, (0, 0, TAPS - 1, 0))
            states[layer] = torch.stack([padded_TE[i + 1 : i + TAPS] for i in range(count)])
            conv_ET = F.conv1d(padded_TE.t()[None], model.taps[block].t()[:, None], groups=WIDTH)[0]
            q_THK, k_THK, v_THV, g_THK = model.split(block, F.silu(conv_ET.t()))
            log_THK = g_THK.log().cumsum(0)
            decay_TTHK = (log_THK[:, None] - log_THK[None]).masked_fill(~causal_TT[:, :, None, None], -torch.inf).exp()
            states[layer + 1] = torch.einsum("tshk,shk,shv->thkv", decay_TTHK, k_THK, v_THV)
            mixed = torch.einsum("thk,thkv->thv", q_THK, states[layer + 1])
            layer += 2
        else:
            q_THK, k_THK, v_THK = model.split(block, h_TE)
            sees_TT = causal_TT & ((t[:, None] - t < WINDOW) | (kind == "A"))
            score_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * KEY**-0.5
            weight_HTT = score_HTT.masked_fill(~sees_TT, -torch.inf).softmax(-1)
            mixed = torch.einsum("hts,shk->thk", weight_HTT, v_THK)
            layer += 1
        x_TE = x_TE + F.linear(mixed.flatten(1), model.outs[block])
    return Naive(model.logits(model.norm(x_TE)), states)
