"""A step context without pages: every key ever written is kept in a list, visibility is one dense mask.

The definition of attention that models are tested with, in plain torch: a row sees the tokens of its own sequence
up to its own index, the last `window` of them in window layers. Letters: R rows, T tokens kept, H query heads,
K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.models.base import CausalLM
from headrace.step import LayerState


class DenseCache:
    """Keys and values of any number of sequences; `step` opens the context of the next forward."""

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states
        self.kv: list[tuple[Tensor, Tensor] | None] = [None] * len(states)
        self.seq_T = torch.empty(0, dtype=torch.int64)
        self.t_T = torch.empty(0, dtype=torch.int64)

    def step(self, seq_R: list[int], t_R: list[int]) -> DenseContext:
        """A context for rows of the given sequences at the given token indices."""
        self.seq_T = torch.cat((self.seq_T, torch.tensor(seq_R)))
        self.t_T = torch.cat((self.t_T, torch.tensor(t_R)))
        return DenseContext(self, torch.tensor(seq_R), torch.tensor(t_R))


class DenseContext:
    """One forward over rows that were appended to a DenseCache."""

    def __init__(self, cache: DenseCache, seq_R: Tensor, t_R: Tensor) -> None:
        self.cache, self.seq_R, self.t_R = cache, seq_R, t_R
        self.pos_AR = t_R.to(torch.int32)[None]
        self.soft_SE = None
        self.layers: list[int] = []

    turns = False

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
        """Append the rows' keys and values, then attend with a dense mask."""
        state = self.cache.states[layer]
        rows, heads, size = q_RHD.shape
        assert size == state.head_dim
        assert k_RKD.shape == (rows, state.kv_heads, state.head_dim)
        assert v_RKD.shape == (rows, state.kv_heads, state.v_head_dim)
        self.layers.append(layer)
        past = self.cache.kv[layer]
        k_TKD = torch.cat((past[0], k_RKD)) if past else k_RKD.clone()
        v_TKD = torch.cat((past[1], v_RKD)) if past else v_RKD.clone()
        self.cache.kv[layer] = (k_TKD, v_TKD)
        t_T = self.cache.t_T
        sees_RT = (self.seq_R[:, None] == self.cache.seq_T) & (t_T <= self.t_R[:, None])
        if state.window:
            sees_RT &= t_T > self.t_R[:, None] - state.window
        group = heads // state.kv_heads
        score_HRT = torch.einsum("rhd,thd->hrt", q_RHD, k_TKD.repeat_interleave(group, 1)) * scale
        if softcap:
            score_HRT = torch.tanh(score_HRT / softcap) * softcap
        score_HRT = score_HRT.masked_fill(~sees_RT, float("-inf"))
        if sinks_H is not None:
            score_HRT = torch.cat((score_HRT, sinks_H[:, None, None].expand(heads, rows, 1)), -1)
        weight_HRT = score_HRT.softmax(-1)[..., : t_T.numel()]
        return torch.einsum("hrt,thd->rhd", weight_HRT, v_TKD.repeat_interleave(group, 1))


@torch.inference_mode()
def dense_logits(model: CausalLM, sequences: list[list[int]], first: int = 0) -> list[Tensor]:
    """Logits of every token of several sequences, all rows in one forward. `first`: index of each first token."""
    seq_R = [s for s, tokens in enumerate(sequences) for _ in tokens]
    t_R = [first + t for tokens in sequences for t in range(len(tokens))]
    tok_R = torch.tensor([token for tokens in sequences for token in tokens], dtype=torch.int32)
    hidden_RE = model(tok_R, DenseCache(model.layer_states()).step(seq_R, t_R))
    return list(model.logits(hidden_RE).split([len(tokens) for tokens in sequences]))


@torch.inference_mode()
def dense_greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """The tokens that follow the prompt at temperature 0: the prompt as one step, then one row a step."""
    cache = DenseCache(model.layer_states())
    new, rows, start = [], list(prompt), 0
    for _ in range(count):
        ctx = cache.step([0] * len(rows), list(range(start, start + len(rows))))
        hidden_RE = model(torch.tensor(rows), ctx)
        start += len(rows)
        rows = [int(model.logits(hidden_RE[-1:]).argmax())]
        new += rows
    return new
