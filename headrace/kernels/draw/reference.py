"""Keyed draw of one token a row, in plain torch: the definition that every faster form is compared with.

token = argmax over survivors v of z(v) + g(v), z = (logit - max) / temperature, ties to the lowest id (Gumbel-max:
Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). g = -log(-log1p(-u)) with u from Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3") under key = stream, counter = (t_out, nth, purpose, v // 4),
word v % 4: noise is a function of the place, so that no generator state exists.
Letters: M output rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class DrawParams(NamedTuple):
    """Sampling parameters, one entry an output row. A neutral value switches its filter off."""

    temperature_M: Tensor
    """float32; 0 means greedy: the most probable token, without noise or filters."""
    top_k_M: Tensor
    """int32; keep the k most probable tokens; 0 is off."""
    top_p_M: Tensor
    """float32; keep the smallest set of the most probable tokens that holds this mass; 1 is off."""
    min_p_M: Tensor
    """float32; keep tokens at least this fraction as probable as the most probable one; 0 is off."""


class Drawn(NamedTuple):
    """What was drawn. Rows that hold NaN, +inf or nothing finite have id -1 and NaN elsewhere."""

    id_M: Tensor
    """int32; the token."""
    logp_raw_M: Tensor
    """float32; its log-probability under the model's own logits."""
    logp_draw_M: Tensor
    """float32; its log-probability under what was drawn from: tempered, filtered, renormalised. Greedy: 0."""
    lse_M: Tensor
    """float32; log-sum-exp of the model's own logits."""


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product. By halves, because the product does not fit a signed int64."""
    low_part = x * (multiplier & 0xFFFF)
    high_part = x * (multiplier >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox4x32(key: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10: int64 [..., 2] key and [..., 4] counter, words in [0, 2^32), to int64 [..., 4] random words."""
    k0, k1 = key.unbind(-1)
    c0, c1, c2, c3 = counter.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def gumbel_noise(
    stream_M2: Tensor, t_out_M: Tensor, vocab: int, nth: int | Tensor = 0, purpose: int = 0
) -> Tensor:  # fmt: skip
    """Standard Gumbel noise, float32 [M, V], between -2.82 and 22.88.

    u = min((x + 0.5) 2^-32, 1 - 2^-24), every step rounded to the nearest float32: x to float, then the sum; the
    scaling is exact. Zero gives 2^-33, and the largest x, which rounds to one, gives the clamp.

    Args:
        stream_M2: int32 bit patterns of the key.
        t_out_M: int32 index of the token that the row decides.
        vocab: V.
        nth: step inside a block; one number, or one a row.
        purpose: what the noise is for; 0 for tokens.
    """
    rows = t_out_M.shape[0]
    blocks = torch.arange((vocab + 3) // 4, device=t_out_M.device)
    counter_MB4 = torch.zeros(rows, blocks.shape[0], 4, dtype=torch.int64, device=t_out_M.device)
    counter_MB4[..., 0] = t_out_M.long()[:, None]
    counter_MB4[..., 1] = nth.long()[:, None] if isinstance(nth, Tensor) else nth
    counter_MB4[..., 2] = purpose
    counter_MB4[..., 3] = blocks
    word_MV = philox4x32(stream_M2.long()[:, None] & _WORD, counter_MB4 & _WORD).flatten(1)[:, :vocab]
    u_MV = ((word_MV.float() + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)
    return -torch.log(-torch.log1p(-u_MV))


def survivors(z_MV: Tensor, params: DrawParams) -> Tensor:
    """Which tokens may be drawn, bool [M, V]: min-p, then top-k, then top-p over what is left, renormalised.

    Each filter keeps a prefix of the tokens ordered by falling z, then rising id. `z_MV` is 0 for the most probable
    token of a row. Masses are summed in float64.
    """
    z_sorted_MV, order_MV = torch.sort(z_MV, dim=-1, descending=True, stable=True)
    # In logarithms the bound is exact at min_p = 1, where exp would round close runners-up to equals.
    bound_M1 = params.min_p_M.double().clamp(0.0, 1.0).log().to(z_MV.dtype)[:, None]
    keep_MV = (z_sorted_MV >= bound_M1) & (z_sorted_MV > -torch.inf)
    rank_V = torch.arange(z_MV.shape[1], device=z_MV.device)
    top_k_M1 = params.top_k_M[:, None]
    keep_MV &= (rank_V < top_k_M1) | (top_k_M1 <= 0)
    mass_MV = torch.where(keep_MV, z_sorted_MV.double().exp(), 0.0).cumsum(-1)
    before_MV = torch.nn.functional.pad(mass_MV[:, :-1], (1, 0))
    top_p_M1 = params.top_p_M.double()[:, None]
    keep_MV &= (before_MV < top_p_M1 * mass_MV[:, -1:]) | (top_p_M1 >= 1.0) | (rank_V == 0)
    return torch.zeros_like(keep_MV).scatter_(1, order_MV, keep_MV)


def draw_reference(
    logits_MV: Tensor,
    params: DrawParams,
    stream_M2: Tensor,
    t_out_M: Tensor,
    *,
    raw_MV: Tensor | None = None,
    nth: int | Tensor = 0,
    purpose: int = 0,
) -> Drawn:
    """See `headrace.kernels.draw.draw`. Any device and floating dtype; half precision is widened to float32."""
    if logits_MV.dtype not in (torch.float32, torch.float64):
        logits_MV = logits_MV.float()
    raw_MV = logits_MV if raw_MV is None else raw_MV.to(logits_MV.dtype)
    max_M, raw_max_M = logits_MV.amax(-1), raw_MV.amax(-1)  # amax hands NaN on
    bad_M = ~(max_M.isfinite() & raw_max_M.isfinite())
    logits_MV = logits_MV.masked_fill(bad_M[:, None], 0.0)
    greedy_M = params.temperature_M <= 0
    temperature_M = params.temperature_M.masked_fill(greedy_M, 1.0).to(logits_MV.dtype)
    z_MV = (logits_MV - max_M.masked_fill(bad_M, 0.0)[:, None]) / temperature_M[:, None]

    keep_MV = survivors(z_MV, params)
    score_MV = z_MV + gumbel_noise(stream_M2, t_out_M, logits_MV.shape[1], nth, purpose)
    drawn_M = score_MV.masked_fill(~keep_MV, -torch.inf).argmax(-1)
    id_M = torch.where(greedy_M, logits_MV.argmax(-1), drawn_M)[:, None]

    z_lse_M = z_MV.double().masked_fill(~keep_MV, -torch.inf).logsumexp(-1)
    logp_draw_M = (z_MV.gather(1, id_M)[:, 0] - z_lse_M).masked_fill(greedy_M, 0.0)
    lse_M = raw_MV.double().logsumexp(-1)
    logp_raw_M = raw_MV.gather(1, id_M)[:, 0] - lse_M
    return Drawn(
        id_M[:, 0].masked_fill(bad_M, -1).int(),
        *(x_M.masked_fill(bad_M, torch.nan).float() for x_M in (logp_raw_M, logp_draw_M, lse_M)),
    )
