"""One command that makes both bundled models: `python -m recipes.bundled --out DIR`.

The stages run in order; one whose result exists under DIR is skipped, and an interrupted training resumes from its last
checkpoint. The models end up in DIR/assets, the picture in DIR/bundled-model.png, all numbers in DIR/report.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import DRAFT_NAME, DRAFT_SHAPE, MAIN_NAME, MAIN_SHAPE, Budget, EvalLimits, ModelShape

STAGES = ("corpus", "tokenizer", "pack", "train", "export", "distil", "export-draft", "evaluate", "card")


@dataclass(frozen=True)
class Job:
    """Everything the stages need to know."""

    out: Path
    workers: int
    only: str | None
    main: Budget
    draft: Budget
    limits: EvalLimits
    main_shape: ModelShape = MAIN_SHAPE
    draft_shape: ModelShape = DRAFT_SHAPE

    @property
    def assets(self) -> Path:
        return self.out / "assets"


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_memory() -> None:
    """Drops compiled code and cached device memory of the stage before."""
    import gc

    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stage_corpus(job: Job) -> None:
    from . import corpus

    corpus.build(job.out / "corpus", job.workers, re.compile(job.only) if job.only else None)


def stage_tokenizer(job: Job) -> None:
    from . import tokenizer

    tokenizer.build(job.out / "corpus", job.out / "tokenizer.json")


def stage_pack(job: Job) -> None:
    from . import pack

    pack.build(job.out / "corpus", job.out / "tokenizer.json", job.out / "pack")


def stage_train(job: Job) -> None:
    from .train import train_main

    train_main(job.main_shape, job.out / "pack", job.out / "main", job.main, device())


def stage_distil(job: Job) -> None:
    from .distill import distil_draft

    free_memory()
    runs = job.out / "main", job.out / "draft"
    distil_draft((job.main_shape, job.draft_shape), job.out / "pack", runs, job.draft, device())


def _export(job: Job, shape: ModelShape, run: str, name: str) -> None:
    import torch

    from .export import export
    from .train import load_trained

    model = load_trained(shape, job.out / run, torch.device("cpu"))
    export(model, job.out / "tokenizer.json", job.out / "corpus" / "manifest.json", job.assets / name)


def stage_export(job: Job) -> None:
    _export(job, job.main_shape, "main", MAIN_NAME)


def stage_export_draft(job: Job) -> None:
    _export(job, job.draft_shape, "draft", DRAFT_NAME)


def run_summary(job: Job, run: str, shape: ModelShape) -> dict[str, Any]:
    import torch

    from .model import LlamaLM

    result: dict[str, Any] = json.loads((job.out / run / "summary.json").read_text())
    result["budget"]["tokens_per_step"] = (job.main if run == "main" else job.draft).tokens_per_step
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return result | {"parameters": LlamaLM(shape).num_parameters(), "device": name, "torch": torch.__version__}


def stage_evaluate(job: Job) -> None:
    from .corpus import read_documents
    from .evaluate import held_out_report
    from .export import load_exported
    from .functions import completion_report
    from .pack import encode_documents
    from .tokenizer import load

    free_memory()
    tokenizer = load(job.out / "tokenizer.json")
    names = json.loads((job.out / "corpus" / "heldout.json").read_text())[: job.limits.documents]
    texts = read_documents(job.out / "corpus" / "heldout.txt")[: job.limits.documents]
    folders = job.assets / MAIN_NAME, job.assets / DRAFT_NAME
    runs = {"main": run_summary(job, "main", job.main_shape), "draft": run_summary(job, "draft", job.draft_shape)}
    report: dict[str, Any] = {"runs": runs}
    main = load_exported(folders[0], job.main_shape, device())
    draft = load_exported(folders[1], job.draft_shape, device())
    report["held_out"] = held_out_report(main, draft, texts, encode_documents(tokenizer, texts), job.limits.window)
    print(json.dumps(report["held_out"], indent=1), flush=True)
    (job.out / "report.json").write_text(json.dumps(report, indent=1))
    done = completion_report(folders, job.draft_shape, (names, texts), job.limits, tokenizer, device())
    report |= {"functions": done["report"], "samples": done["samples"]}
    (job.out / "report.json").write_text(json.dumps(report, indent=1))


def stage_card(job: Job) -> None:
    from . import card

    report = json.loads((job.out / "report.json").read_text())
    card.write_cards(report, json.loads((job.out / "corpus" / "manifest.json").read_text()), job.assets)
    card.plot(json.loads((job.out / "main" / "log.json").read_text()), job.out / "bundled-model.png")


RUN: dict[str, Callable[[Job], None]] = {
    "corpus": stage_corpus,
    "tokenizer": stage_tokenizer,
    "pack": stage_pack,
    "train": stage_train,
    "export": stage_export,
    "distil": stage_distil,
    "export-draft": stage_export_draft,
    "evaluate": stage_evaluate,
    "card": stage_card,
}


def run_stages(job: Job, stages: tuple[str, ...]) -> None:
    """Runs the stages not yet done; a marker file tells that one is."""
    markers = job.out / "done"
    markers.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if (markers / stage).exists():
            print(f"stage {stage}: already done", flush=True)
            continue
        started = time.perf_counter()
        RUN[stage](job)
        (markers / stage).write_text(f"{time.perf_counter() - started:.1f} s\n")
        print(f"stage {stage}: done in {time.perf_counter() - started:.1f} s", flush=True)


def parse(argv: list[str] | None = None) -> tuple[Job, tuple[str, ...]]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bundled", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated, in order (default: all)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that clean the corpus")
    parser.add_argument("--packages", help="regular expression: only these packages (default: all)")
    parser.add_argument("--train-seconds", type=float, default=600.0)
    parser.add_argument("--distil-seconds", type=float, default=150.0)
    parser.add_argument("--train-steps", type=int, default=0, help="a fixed number of steps instead of a time limit")
    parser.add_argument("--distil-steps", type=int, default=0)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=64, help="sequences that go through the model at once")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches in a step of the main model")
    parser.add_argument("--muon-lr", type=float, default=4e-3)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--eval-documents", type=int, default=EvalLimits.documents)
    parser.add_argument("--eval-functions", type=int, default=EvalLimits.functions)
    args = parser.parse_args(argv)
    stages = tuple(args.stages.split(","))
    if unknown := set(stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")

    def budget(seconds: float, steps: int, accumulate: int, scale: float) -> Budget:
        rates = args.muon_lr * scale, args.adam_lr * scale
        return Budget(seconds, steps, args.sequence_length, args.micro, accumulate, *rates, not args.no_compile)

    main = budget(args.train_seconds, args.train_steps, args.accumulate, 1.0)
    draft = budget(args.distil_seconds, args.distil_steps, 1, 1.5)
    limits = EvalLimits(documents=args.eval_documents, functions=args.eval_functions)
    return Job(args.out, args.workers, args.packages, main, draft, limits), stages


if __name__ == "__main__":
    chosen_job, chosen_stages = parse()
    run_stages(chosen_job, chosen_stages)
