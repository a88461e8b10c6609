"""Distils the draft from the main model: KL to the teacher's whole distribution, mixed with cross-entropy.

Hinton et al., arXiv:1503.02531; for drafting, DistillSpec, arXiv:2310.08461. The teacher has its exported (bfloat16)
weights, since those are what the draft is asked to foresee.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import LlamaLM
from .settings import Budget, ModelShape
from .train import Fit, compute_dtype, enable_attention, load_stream, load_trained, summary

KL_WEIGHT = 0.9


def distillation_loss(student_BTV: Tensor, teacher_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """KL_WEIGHT * KL(teacher || student) + the rest * cross-entropy, mean over positions."""
    student_logp_NV = F.log_softmax(student_BTV.flatten(0, 1).float(), dim=-1)
    teacher_logp_NV = F.log_softmax(teacher_BTV.flatten(0, 1).float(), dim=-1)
    kl = (teacher_logp_NV.exp() * (teacher_logp_NV - student_logp_NV)).sum(-1).mean()
    return KL_WEIGHT * kl + (1 - KL_WEIGHT) * F.nll_loss(student_logp_NV, targets_BT.flatten())


def distil_draft(
    shapes: tuple[ModelShape, ModelShape], pack: Path, runs: tuple[Path, Path], budget: Budget, device: torch.device
) -> None:
    """`shapes` and `runs` are those of the teacher and of the draft; writes the draft's run."""
    torch.manual_seed(budget.seed)
    enable_attention(None)  # the two models differ in head width: let each shape find its kernel
    teacher = load_trained(shapes[0], runs[0], device).requires_grad_(False)
    student = LlamaLM(shapes[1]).to(device)
    tokens = load_stream(pack / "train.u16", device), load_stream(pack / "heldout.u16", device)
    dtype = compute_dtype(device)
    print(f"distil: {student.num_parameters():,} parameters", flush=True)

    def teach(ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            return teacher(ids_BT, dtype)

    def follow(ids_BT: Tensor, targets_BT: Tensor, teacher_BTV: Tensor) -> Tensor:
        return distillation_loss(student(ids_BT, dtype), teacher_BTV, targets_BT)

    if budget.compile:
        teach, follow = torch.compile(teach, dynamic=False), torch.compile(follow, dynamic=False)

    def loss_fn(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return follow(ids_BT, targets_BT, teach(ids_BT))

    fit = Fit(student, loss_fn, tokens, budget, runs[1])
    log = fit.run()
    (runs[1] / "summary.json").write_text(json.dumps(summary(log, budget, fit.sampler.windows), indent=1))
