"""The operation `multiply_picked`: every row goes through the linear map of the expert that was picked for it.

    y_p = W_{e(p)} x_{p // K} + b_{e(p)}

Pairs p are rows and their picks side by side: pair r K + k is row r with its k-th expert. The routing of a layer is
sorted once (`plan_experts`) and used by the products of the layer. Letters: R rows, K experts of a row, P = R K pairs,
N experts, I inputs, O outputs.
"""

from __future__ import annotations

from torch import Tensor

from headrace.kernels.experts.reference import Groups, group_pairs, multiply_groups

__all__ = ["ExpertPlan", "multiply_picked", "plan_experts"]


class ExpertPlan:
    """The pairs of a step, in the order of their experts."""

    def __init__(self, pick_RK: Tensor, experts: int) -> None:
        self.pick_P = pick_RK.flatten()
        self.experts = experts
        self.groups: Groups | None = None
        self.on_gpu = self.pick_P.is_cuda
        if self.on_gpu:
            from headrace.kernels.experts import gpu  # Triton is loaded where it is used

            self.tiles = gpu.list_tiles(self.pick_P, experts)
        else:
            self.groups = group_pairs(self.pick_P)


def plan_experts(pick_RK: Tensor, experts: int) -> ExpertPlan:
    """Sort the pairs by expert. On a GPU nobody waits for the device.

    Args:
        pick_RK: experts of the rows, int64 in [0, experts).
        experts: N.
    """
    return ExpertPlan(pick_RK, experts)


def multiply_picked(
    plan: ExpertPlan, x_RI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None = None, *, share: int
) -> Tensor:
    """y_p = W x_{p // share} + b with the weights of the expert of pair p.

    Args:
        plan: the pairs.
        x_RI: inputs, one for `share` pairs.
        weight_NOI: of all experts, of the type of x.
        bias_NO: biases, or None.
        share: K where x has a row a row, 1 where it has a row a pair.

    Returns:
        A new tensor [P, O].

    Raises:
        ConfigError: the tensors are on a GPU and Triton cannot be imported.
    """
    if plan.on_gpu:
        from headrace.kernels.experts import gpu  # Triton is loaded where it is used

        return gpu.multiply_tiles(plan.tiles, x_RI, weight_NOI, bias_NO, share)
    assert plan.groups is not None
    return multiply_groups(plan.groups, x_RI, weight_NOI, bias_NO, share)
