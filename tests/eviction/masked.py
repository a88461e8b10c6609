"""Models and the definition that evicted caches are compared with: dense attention under the mask of what is kept.

Nothing is paged here and nothing moves: every key of a sequence is kept in a list, and a compaction clears bits of a
mask by (layer, head, token). Letters: R rows, T tokens so far, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny import CONFIG
from torch import Tensor

from headrace.eviction.base import Cells, Evictor, select
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model


@functools.cache
def random_model(**changes: Any) -> CausalLM:
    """A float64 model whose next token depends on its whole context; three layers with two key heads each."""
    config = CONFIG | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2} | changes
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        model = load_model(directory, device="cpu", dtype="float64", load_format="random", seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                scale = 1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) * scale)
    return model


def window_model(window: int = 9, whole_layers: int = 1) -> CausalLM:
    """The first layers see everything, the others a window."""
    return random_model(
        architectures=("Qwen2ForCausalLM",),
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=whole_layers,
    )


class Kept(NamedTuple):
    """What the cells of a layer hold, in the order of tokens."""

    tokens_K: list[list[int]]
    k_K: list[Tensor]
    v_K: list[Tensor]


Coded = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class MaskedCache:
    """All keys and values of one sequence, and which of them each head still sees."""

    def __init__(self, model: CausalLM, coded: Coded | None = None) -> None:
        self.states = model.layer_states()
        self.coded = coded or (lambda k_RKD, v_RKD: (k_RKD, v_RKD))
        self.k: list[list[Tensor]] = [[] for _ in self.states]
        self.v: list[list[Tensor]] = [[] for _ in self.states]
        self.gone: list[list[set[int]]] = [[set() for _ in range(s.kv_heads)] for s in self.states]

    def kept(self, layer: int) -> Kept:
        n = len(self.k[layer])
        tokens_K = [[t for t in range(n) if t not in gone] for gone in self.gone[layer]]
        k_K = [torch.stack([self.k[layer][t][h] for t in tokens]) for h, tokens in enumerate(tokens_K)]
        v_K = [torch.stack([self.v[layer][t][h] for t in tokens]) for h, tokens in enumerate(tokens_K)]
        return Kept(tokens_K, k_K, v_K)

    def compact(self, evictor: Evictor, budget: int, groups: Sequence[tuple[int, ...]]) -> None:
        for layers in groups:
            kept = [self.kept(layer) for layer in layers]
            k_LKnD = torch.stack([torch.stack(one.k_K) for one in kept])
            heads, n = k_LKnD.shape[1:3]
            cells = Cells(layers, heads, n, budget, lambda k_LKnD=k_LKnD: k_LKnD.clone(), k_LKnD.device)  # type: ignore[misc]
            keep_LKm = select(evictor.score(cells), cells, evictor.keep_len(layers, n, budget))
            for i, layer in enumerate(layers):
                for head in range(heads):
                    stays = {kept[i].tokens_K[head][s] for s in keep_LKm[i, head].tolist()}
                    self.gone[layer][head] |= set(kept[i].tokens_K[head]) - stays


class MaskedContext:
    """One forward over the next tokens of the sequence."""

    def __init__(self, cache: MaskedCache, rows: range) -> None:
        self.cache, self.rows = cache, rows
        self.pos_AR = torch.tensor(rows, dtype=torch.int32)[None]
        self.soft_SE = None

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
        k_RKD, v_RKD = self.cache.coded(k_RKD, v_RKD)
        self.cache.k[layer] += list(k_RKD.clone())
        self.cache.v[layer] += list(v_RKD.clone())
        k_TKD, v_TKD = torch.stack(self.cache.k[layer]), torch.stack(self.cache.v[layer])
        out_RHD = torch.zeros(len(self.rows), q_RHD.shape[1], v_RKD.shape[2], dtype=q_RHD.dtype)
        group, window = q_RHD.shape[1] // k_RKD.shape[1], self.cache.states[layer].window
        for r, t in enumerate(self.rows):
            for head in range(q_RHD.shape[1]):
                gone = self.cache.gone[layer][head // group]
                seen = [s for s in range(t + 1) if s not in gone and (not window or s > t - window)]
                weight = (k_TKD[seen, head // group] @ q_RHD[r, head] * scale).softmax(0)
                out_RHD[r, head] = weight @ v_TKD[seen, head // group]
        return out_RHD


class Masked(NamedTuple):
    """A whole sequence by the definition."""

    logits_TV: Tensor
    """Of every token, teacher-forced."""
    after: dict[int, list[Kept]]
    """By trigger what each layer keeps."""


@torch.inference_mode()
def run_masked(
    model: CausalLM,
    tokens: Sequence[int],
    prompt_len: int,
    evictor: Evictor,
    budget: int,
    groups: Sequence[tuple[int, ...]],
    coded: Coded | None = None,
) -> Masked:
    """Evaluate the tokens from trigger to trigger. `coded`: what a codec makes of the rows' keys and values."""
    cache = MaskedCache(model, coded)
    logits, after, done = [], {}, 0
    while done < len(tokens):
        trigger = evictor.next_trigger(prompt_len, done, budget)
        end = min(trigger, len(tokens))
        hidden_RE = model(torch.tensor(tokens[done:end]), MaskedContext(cache, range(done, end)))
        logits.append(model.logits(hidden_RE))
        done = end
        if done == trigger:
            cache.compact(evictor, budget, groups)
            after[done] = [cache.kept(layer) for layer in range(len(cache.states))]
    return Masked(torch.cat(logits), after)
