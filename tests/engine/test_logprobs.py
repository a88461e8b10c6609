"""Log-probs of chosen and top tokens."""

from __future__ import annotations

import torch

from headrace.sampling.logprobs import _order_keys, gather_logprobs


def test_order_keys_are_a_stable_order() -> None:
    generator = torch.Generator().manual_seed(0)
    x_MV = torch.randn(40, 300, generator=generator)
    x_MV[0] = 1.0
    x_MV[1] = x_MV[1].round()
    x_MV[2, 5:] = float("-inf")
    x_MV[3, ::2] = -0.0
    x_MV[3, 1::2] = 0.0
    expected = x_MV.sort(dim=1, descending=True, stable=True)
    keys_MV = _order_keys(x_MV)
    assert torch.equal(keys_MV.sort(dim=1, descending=True).indices, expected.indices)
    assert all(len(set(row)) == 300 for row in keys_MV.tolist())


def test_top_tokens_are_the_best() -> None:
    logits_MV = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    found = gather_logprobs(logits_MV, torch.arange(5), 7)
    exact_MV = logits_MV.log_softmax(1)
    assert torch.equal(found.logprobs_MN, exact_MV.sort(dim=1, descending=True).values[:, :7])
    assert torch.equal(exact_MV.gather(1, found.ids_MN), found.logprobs_MN)
    assert torch.equal(found.chosen_M, exact_MV[torch.arange(5), torch.arange(5)])
    assert found.rank_M.tolist() == [int((exact_MV[i] > exact_MV[i, i]).sum()) + 1 for i in range(5)]
