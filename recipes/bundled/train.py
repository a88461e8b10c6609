"""The optimisation loop shared by the main model and its draft, and the training of the main model.

Batches are windows of the packed stream; each pass over it shifts the windows by a random offset and shuffles them.
The loop checkpoints about once a minute, resumes from the checkpoint, and steps back to it when the loss diverges.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import LlamaLM, round_to_bf16
from .optim import Optimisers, Pacer
from .pack import read_stream
from .settings import Budget, ModelShape

LossFn = Callable[[Tensor, Tensor], Tensor]
LOG_EVERY = 20
EVAL_EVERY = 100
EVAL_WINDOWS = 64
CHECKPOINT_SECONDS = 45.0


class Sampler:
    """Windows of T+1 tokens; which windows make up a step follows from the seed and the step's number alone."""

    def __init__(self, tokens_N: Tensor, length: int, seed: int) -> None:
        self.tokens_N, self.length, self.seed = tokens_N, length, seed
        self.windows = (len(tokens_N) - length - 1) // length
        if self.windows < 1:
            raise ValueError("the packed stream is shorter than two windows")
        self.cached: tuple[int, Tensor] = (-1, torch.empty(0))

    def _starts(self, epoch: int) -> Tensor:
        if self.cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            offset = int(torch.randint(self.length, (1,), generator=generator))
            order_W = torch.randperm(self.windows, generator=generator)
            self.cached = (epoch, (order_W * self.length + offset).to(self.tokens_N.device))
        return self.cached[1]

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of samples `first` to `first + count`, counted over all passes."""
        parts = []
        while count:
            epoch, position = divmod(first, self.windows)
            parts.append(self._starts(epoch)[position : position + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return windows_at(self.tokens_N, torch.cat(parts), self.length)


def windows_at(tokens_N: Tensor, starts_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
    index_BT = starts_B[:, None] + torch.arange(length + 1, device=tokens_N.device)
    ids_BT = tokens_N[index_BT].long()
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def load_stream(path: Path, device: torch.device) -> Tensor:
    return torch.from_numpy(read_stream(path).astype("int32")).to(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


def enable_attention(only: str | None) -> None:
    """Enables one fused attention kernel, or (None) all."""
    torch.backends.cuda.enable_flash_sdp(only in (None, "flash"))
    torch.backends.cuda.enable_cudnn_sdp(only in (None, "cudnn"))


def choose_attention(device: torch.device) -> str:
    """Times the fused attention kernels once, forwards and backwards, and leaves the fastest one enabled."""
    if device.type != "cuda":
        return "default"
    q, k, v = (torch.randn(16, heads, 2048, 64, device=device, dtype=torch.bfloat16) for heads in (6, 2, 2))
    q.requires_grad_()
    times: dict[str, float] = {}
    for name in ("flash", "cudnn"):
        enable_attention(name)
        try:
            for repeat in range(8):
                if repeat == 3:
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
            torch.cuda.synchronize()
            times[name] = (time.perf_counter() - started) / 5
        except RuntimeError as error:
            print(f"attention: {name} does not run here: {str(error)[:200]}", flush=True)
    best = min(times, key=times.__getitem__, default=None)
    enable_attention(best)
    print(f"attention: {best}; seconds: { {n: round(t, 5) for n, t in times.items()} }", flush=True)
    return best or "default"


class Fit:
    """One optimisation run of `model` on `loss_fn`, with its log, held-out loss, checkpoints and recovery."""

    def __init__(
        self, model: LlamaLM, loss_fn: LossFn, tokens: tuple[Tensor, Tensor], budget: Budget, out: Path
    ) -> None:
        self.model, self.loss_fn, self.budget, self.out = model, loss_fn, budget, out
        self.device = tokens[0].device
        self.sampler = Sampler(tokens[0], budget.sequence_length, budget.seed)
        self.held_out = tokens[1]
        self.optimisers = Optimisers(model, budget)
        self.pacer = Pacer(budget)
        self.step = 0
        self.scale = 1.0  # lowered when a run diverges
        self.log: list[dict[str, Any]] = []
        self.saved_at = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimisers": self.optimisers.state_dict(),
            "step": self.step,
            "scale": self.scale,
            "log": self.log,
            "pacer": (self.pacer.elapsed(), self.pacer.total, self.pacer.replanned),
        }

    def save(self, name: str = "checkpoint.pt") -> None:
        self.saved_at = time.perf_counter()
        temporary = self.out / f"{name}.new"
        torch.save(self.state(), temporary)
        temporary.replace(self.out / name)
        (self.out / "log.json").write_text(json.dumps(self.log))

    def resume(self) -> bool:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimisers.load_state_dict(state["optimisers"])
        self.step, self.scale, self.log = state["step"], state["scale"], state["log"]
        self.pacer = Pacer(self.budget, *state["pacer"])
        print(f"resumed at step {self.step}", flush=True)
        return True

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Cross-entropy of the raw next token over a fixed set of held-out windows."""
        length = self.budget.sequence_length
        count = min(EVAL_WINDOWS, (len(self.held_out) - 1) // length)
        total, batch = 0.0, max(1, self.budget.micro_sequences // 4)
        for start in range(0, count, batch):
            starts_B = torch.arange(start, min(start + batch, count), device=self.device) * length
            ids_BT, targets_BT = windows_at(self.held_out, starts_B, length)
            loss = cross_entropy(self.model(ids_BT, compute_dtype(self.device)), targets_BT)
            total += float(loss) * len(starts_B)
        return total / max(1, count)

    def train_step(self) -> Tensor:
        micro, accumulate = self.budget.micro_sequences, self.budget.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(accumulate):
            first = self.step * self.budget.sequences_per_step + part * micro
            loss = self.loss_fn(*self.sampler.batch(first, micro))
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimisers.step(self.pacer.factor(self.step) * self.scale)
        self.step += 1
        return total

    def record(self, loss: float, window: tuple[int, float]) -> None:
        """Logs one line; the held-out loss joins it now and then."""
        tokens = self.budget.tokens_per_step
        row = {"step": self.step, "tokens": self.step * tokens, "loss": loss, "seconds": self.pacer.elapsed()}
        speed = (self.step - window[0]) * tokens / max(1e-9, self.pacer.elapsed() - window[1])
        if self.step % EVAL_EVERY == 0 or self.pacer.done(self.step):
            row["held_out"] = self.held_out_loss()
        self.log.append(row)
        tail = f" held-out {row['held_out']:.4f}" if "held_out" in row else ""
        print(
            f"step {self.step}/{self.pacer.total} loss {loss:.4f}{tail} {speed / 1e6:.3f} M tokens/s "
            f"lr x{self.pacer.factor(self.step) * self.scale:.3f} {self.pacer.elapsed():.0f} s",
            flush=True,
        )

    def recover(self) -> None:
        """Goes back to the last checkpoint at half the learning rate; time already spent stays spent."""
        spent, scale = self.pacer.elapsed(), self.scale / 2
        if scale < 0.1 or not self.resume():
            raise FloatingPointError("the loss diverged and no checkpoint is left to go back to")
        self.scale = scale
        self.pacer = Pacer(self.budget, spent, 0 if not self.budget.max_steps else self.pacer.total, False)
        print(f"diverged: back at step {self.step} with learning rates x{scale}", flush=True)

    def run(self) -> list[dict[str, Any]]:
        self.resume()
        recent, window = [], (self.step, self.pacer.elapsed())
        while not self.pacer.done(self.step):
            self.pacer.observe(self.step, self.synchronise)
            recent.append(self.train_step())
            if self.step % LOG_EVERY and not self.pacer.done(self.step):
                continue
            loss = float(torch.stack(recent).mean())
            recent = []
            if not math.isfinite(loss) or (self.log and loss > self.log[-1]["loss"] + 1.5):
                self.recover()
            else:
                self.record(loss, window)
                if time.perf_counter() - self.saved_at > CHECKPOINT_SECONDS:
                    self.save()
            window = (self.step, self.pacer.elapsed())
        self.save()
        return self.log


def summary(log: list[dict[str, Any]], budget: Budget, windows: int) -> dict[str, Any]:
    """What the reports say of one run."""
    last = log[-1]
    seconds = last["seconds"]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "passes_over_corpus": last["step"] * budget.sequences_per_step / windows,
        "seconds": seconds,
        "tokens_per_second": last["tokens"] / seconds,
        "final_train_loss": last["loss"],
        "final_held_out_loss": last.get("held_out"),
        "budget": asdict(budget),
    }


def train_main(shape: ModelShape, pack: Path, out: Path, budget: Budget, device: torch.device) -> None:
    """Trains the main model and writes checkpoint.pt, log.json and summary.json under `out`."""
    torch.manual_seed(budget.seed)
    attention = choose_attention(device)
    model = LlamaLM(shape).to(device)
    tokens = load_stream(pack / "train.u16", device), load_stream(pack / "heldout.u16", device)
    dtype = compute_dtype(device)
    print(f"train: {model.num_parameters():,} parameters, {len(tokens[0]) / 1e6:.1f} M tokens a pass", flush=True)

    def loss_fn(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return cross_entropy(model(ids_BT, dtype), targets_BT)

    fit = Fit(model, torch.compile(loss_fn, dynamic=False) if budget.compile else loss_fn, tokens, budget, out)
    log = fit.run()
    result = summary(log, budget, fit.sampler.windows) | {"attention": attention}
    (out / "summary.json").write_text(json.dumps(result, indent=1))


def load_trained(shape: ModelShape, run: Path, device: torch.device) -> LlamaLM:
    """The model of a finished run, its weights rounded to bfloat16."""
    model = LlamaLM(shape).to(device)
    model.load_state_dict(torch.load(run / "checkpoint.pt", map_location=device, weights_only=True)["model"])
    return round_to_bf16(model).eval()
