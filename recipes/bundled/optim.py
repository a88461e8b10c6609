"""Optimisers and the learning-rate schedule.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"), with the update scale and weight decay of Moonlight
(arXiv:2502.16982), for the matrices inside the layers; AdamW (arXiv:1711.05101) for the embedding and the norms.
Matrices of one shape are orthogonalised as one batch. The schedule is warm-up, stable, decay (arXiv:2404.06395), its
length found while training from the measured speed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .settings import Budget

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4
MEASURE_FROM = 10
MEASURE_STEPS = 40


def orthogonalise(m_NRC: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """Moves the singular values of each matrix near 1 by a quintic Newton-Schulz iteration."""
    a, b, c = NS_COEFFICIENTS
    tall = m_NRC.shape[-2] > m_NRC.shape[-1]
    x = (m_NRC.mT if tall else m_NRC).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; an update has about the root-mean-square that AdamW's would have."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_batch(parameters, max(shape), group)

    def _step_batch(self, parameters: list[Tensor], longest: int, group: dict[str, Any]) -> None:
        momenta = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momenta.append(state["momentum"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov_NRC = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        dtype = torch.bfloat16 if nesterov_NRC.is_cuda else torch.float32
        update_NRC = orthogonalise(nesterov_NRC, dtype).float() * (0.2 * longest**0.5 * group["lr"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, list(update_NRC.unbind(0)))


class Optimisers:
    """Both optimisers behind one learning-rate factor."""

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        fused = others[0].is_cuda
        self.muon = Muon(matrices, budget.muon_lr)
        self.adam = torch.optim.AdamW(
            others, budget.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=fused
        )
        self.base = (budget.muon_lr, budget.adam_lr)

    def step(self, factor: float) -> None:
        for optimiser, base in zip((self.muon, self.adam), self.base, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


class Pacer:
    """Knows how many steps fit the time limit, and so where in the schedule a step stands.

    The total is set once from the speed of the first steps and once more where the decay begins.
    """

    def __init__(self, budget: Budget, spent_seconds: float = 0.0, total: int = 0, replanned: bool = False) -> None:
        self.budget = budget
        self.started = time.perf_counter() - spent_seconds
        self.total = budget.max_steps or total
        self.replanned = replanned or bool(budget.max_steps)
        self.mark: tuple[int, float] | None = None

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def observe(self, step: int, synchronise: Callable[[], None]) -> None:
        """Called before each step; plans when the measured stretch is over and again where the decay begins."""
        if self.mark is None:
            self.mark = (step + MEASURE_FROM, 0.0)
        if step == self.mark[0]:
            synchronise()
            self.mark = (step, self.elapsed())
        first_plan = not self.total and step == self.mark[0] + MEASURE_STEPS
        second_plan = not self.replanned and self.total and step == self.decay_start() and step > self.mark[0]
        if first_plan or second_plan:
            synchronise()
            rate = (step - self.mark[0]) / (self.elapsed() - self.mark[1])
            self.total = max(step + 1, step + int(rate * (self.budget.seconds - self.elapsed()) * 0.995))
            self.replanned = bool(second_plan)
            tokens = self.budget.tokens_per_step
            print(
                f"plan: {self.total} steps, {self.total * tokens / 1e6:.0f} M tokens, "
                f"{rate * tokens / 1e6:.3f} M tokens/s",
                flush=True,
            )

    def decay_start(self) -> int:
        return self.total - int(self.total * DECAY_FRACTION)

    def factor(self, step: int) -> float:
        """The learning-rate factor of a step: linear up, flat, linear down to nearly nothing."""
        warmup = min(WARMUP_STEPS, max(1, self.total // 10)) if self.total else WARMUP_STEPS
        rise = min(1.0, (step + 1) / warmup)
        if not self.total or step < self.decay_start():
            return rise
        return rise * max(0.005, (self.total - step) / (self.total - self.decay_start()))

    def done(self, step: int) -> bool:
        over_time = not self.budget.max_steps and self.elapsed() > self.budget.seconds * 1.05
        return over_time or bool(self.total and step >= self.total)
