"""Scores the exported models on held-out files: bits per byte, and how well the draft foresees the main model.

Arithmetic is float32 on the bfloat16 weights. Every file is scored from its beginning, in windows that slide by half
their length, so that a token has at least half a window of context behind it where the file is that long.
Drafting follows speculative sampling (arXiv:2211.17192): overlap is its acceptance rate, sum(min(p, q)).
"""

from __future__ import annotations

import lzma
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import LlamaLM
from .settings import BOS_ID

BATCH = 16
DRAFT_LENGTHS = (2, 4, 6)
BOS_PROBE = 256


@dataclass
class Scores:
    """Sums over scored tokens; `flags` holds, for each file, the agreement flags of its windows by position."""

    tokens: int = 0
    nats_main: float = 0.0
    nats_draft: float = 0.0
    top1_main: float = 0.0
    agree: float = 0.0
    coupled: float = 0.0
    overlap: float = 0.0
    flags: dict[int, list[tuple[int, list[bool]]]] = field(default_factory=dict)


def windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """(start, end, first scored target) of each window over ids 0..length-1; every target 1.. is scored once."""
    result, scored, start = [], 1, 0
    while scored < length:
        end = min(length, start + window)
        result.append((start, end, scored))
        scored, start = end, start + window // 2
    return result


def score_documents(main: LlamaLM, draft: LlamaLM, documents: list[list[int]], window: int) -> Scores:
    """Scores each document (its ids, without the leading `<|endoftext|>`) under both models."""
    device = main.model.embed_tokens.weight.device
    jobs = [(n, *w) for n, ids in enumerate(documents) for w in windows(len(ids) + 1, window + 1)]
    jobs.sort(key=lambda job: job[2] - job[1])
    scores, generator = Scores(), torch.Generator(device).manual_seed(1)
    for first in range(0, len(jobs), BATCH):
        part = jobs[first : first + BATCH]
        longest = max(end - start for _, start, end, _ in part)
        ids_BT = torch.zeros(len(part), longest, dtype=torch.long)
        mask_BT = torch.zeros(len(part), longest - 1, dtype=torch.bool)
        for row, (n, start, end, scored) in enumerate(part):
            ids_BT[row, : end - start] = torch.tensor([BOS_ID, *documents[n]][start:end])
            mask_BT[row, scored - start - 1 : end - start - 1] = True
        flags_BT = _score_batch(main, draft, ids_BT.to(device), mask_BT.to(device), scores, generator)
        for row, (n, _, _, scored) in enumerate(part):
            scores.flags.setdefault(n, []).append((scored, flags_BT[row][mask_BT[row]].tolist()))
    return scores


@torch.no_grad()
def _score_batch(
    main: LlamaLM, draft: LlamaLM, ids_BT: Tensor, mask_BT: Tensor, scores: Scores, generator: torch.Generator
) -> Tensor:
    targets_N1 = ids_BT[:, 1:][mask_BT][:, None]
    main_NV = F.log_softmax(main(ids_BT[:, :-1])[mask_BT], dim=-1)
    draft_NV = F.log_softmax(draft(ids_BT[:, :-1])[mask_BT], dim=-1)
    agree_N = main_NV.argmax(-1) == draft_NV.argmax(-1)
    gumbel_NV = -torch.empty_like(main_NV).exponential_(generator=generator).log()
    scores.tokens += len(targets_N1)
    scores.nats_main -= float(main_NV.gather(1, targets_N1).double().sum())
    scores.nats_draft -= float(draft_NV.gather(1, targets_N1).double().sum())
    scores.top1_main += float((main_NV.argmax(-1) == targets_N1[:, 0]).sum())
    scores.agree += float(agree_N.sum())
    scores.coupled += float(((main_NV + gumbel_NV).argmax(-1) == (draft_NV + gumbel_NV).argmax(-1)).sum())
    scores.overlap += float(torch.minimum(main_NV, draft_NV).exp().double().sum())
    flags_BT = torch.zeros_like(mask_BT)
    flags_BT[mask_BT] = agree_N
    return flags_BT.cpu()


def tokens_per_check(sequences: list[list[bool]], drafted: int) -> float:
    """Mean tokens gained by one check of `drafted` proposals, when a proposal counts if all before it agreed."""
    checks = tokens = 0
    for flags in sequences:
        position = 0
        while position < len(flags):
            run = 0
            while run < drafted and position + run < len(flags) and flags[position + run]:
                run += 1
            step = min(run + 1, len(flags) - position)
            position, tokens, checks = position + step, tokens + step, checks + 1
    return tokens / max(1, checks)


@torch.no_grad()
def bos_effect(main: LlamaLM, documents: list[list[int]]) -> dict[str, float]:
    """Nats a token over the first tokens of files, with and without the leading `<|endoftext|>`."""
    device = main.model.embed_tokens.weight.device
    chosen = [ids[: BOS_PROBE + 1] for ids in documents if len(ids) > BOS_PROBE][:64]
    if not chosen:
        return {}
    ids_BT = torch.tensor(chosen, device=device)
    bos_B1 = torch.full((len(chosen), 1), BOS_ID, device=device)
    result = {}
    for name, inputs_BT, skip in (("with", torch.cat((bos_B1, ids_BT[:, :-1]), 1), 1), ("without", ids_BT[:, :-1], 0)):
        logits_BTV = main(inputs_BT)[:, skip:]
        result[f"{name}_bos"] = float(F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()))
    return result


def compressed_bits(data: bytes) -> dict[str, float]:
    """Bits a byte that general compressors need for all held-out text in one stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    gzip_size = len(packer.compress(data) + packer.flush())
    xz_size = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return {"gzip_9": 8 * gzip_size / len(data), "xz_9e": 8 * xz_size / len(data)}


def held_out_report(
    main: LlamaLM, draft: LlamaLM, texts: list[str], ids: list[list[int]], window: int
) -> dict[str, Any]:
    """All numbers that need no generation."""
    scores = score_documents(main, draft, ids, window)
    data = "".join(texts).encode()
    per_byte = 1 / (0.6931471805599453 * len(data))
    ordered = [[flag for _, flags in sorted(parts) for flag in flags] for _, parts in sorted(scores.flags.items())]
    return {
        "files": len(texts),
        "bytes": len(data),
        "tokens": scores.tokens,
        "bytes_per_token": len(data) / scores.tokens,
        "bits_per_byte": {"main": scores.nats_main * per_byte, "draft": scores.nats_draft * per_byte}
        | compressed_bits(data),
        "nats_per_token": {"main": scores.nats_main / scores.tokens, "draft": scores.nats_draft / scores.tokens},
        "next_token_accuracy_main": scores.top1_main / scores.tokens,
        "draft_on_files": {
            "top1_agreement": scores.agree / scores.tokens,
            "coupled_sample_agreement": scores.coupled / scores.tokens,
            "acceptance_rate_temperature_1": scores.overlap / scores.tokens,
            "tokens_per_check": {str(k): tokens_per_check(ordered, k) for k in DRAFT_LENGTHS},
        },
        "bos": bos_effect(main, ids),
    }
