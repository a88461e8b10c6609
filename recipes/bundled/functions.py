"""Lets the exported models complete held-out functions and counts how many completions parse.

A prompt is the file up to the end of a function's docstring. The completion ends at the first line that is indented
no deeper than the `def`, and must make a function that parses and has a statement besides its docstring. The same test
on the functions as their authors wrote them is the control.
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .evaluate import DRAFT_LENGTHS, tokens_per_check
from .export import load_exported
from .model import LlamaLM
from .settings import BOS_ID, PAD_ID, EvalLimits, ModelShape

PER_FILE = 4
MIN_BODY_TOKENS = 12


@dataclass(frozen=True)
class Task:
    """One function to complete: prompt ids, the text from `def` to the docstring's end, and the author's body."""

    name: str
    ids: list[int]
    head: str
    body: str
    indent: int


def find_functions(text: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    """Functions with a docstring and more, at module or class level, with the docstring's last line number."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(child.body) > 1:
                    end = child.body[0].end_lineno or 0
                    if ast.get_docstring(child) and child.body[1].lineno > end >= child.lineno:
                        yield child, end


def prompt_ids(tokenizer: Tokenizer, prefix: str, limit: int) -> list[int]:
    """The prefix's ids; when they are too many, its last whole lines."""
    ids = tokenizer.encode(prefix, add_special_tokens=False).ids
    if len(ids) < limit:
        return [BOS_ID, *ids]
    tail = tokenizer.decode(ids[-limit:], skip_special_tokens=False)
    return tokenizer.encode(tail[tail.find("\n") + 1 :], add_special_tokens=False).ids[-limit:]


def tasks_of(tokenizer: Tokenizer, name: str, text: str, limits: EvalLimits) -> Iterator[Task]:
    lines = text.split("\n")
    for node, doc_end in find_functions(text):
        body = "\n".join(lines[doc_end : node.end_lineno]) + "\n"
        size = len(tokenizer.encode(body, add_special_tokens=False).ids)
        if MIN_BODY_TOKENS <= size <= limits.new_tokens:
            ids = prompt_ids(tokenizer, "\n".join(lines[:doc_end]) + "\n", limits.prompt_tokens)
            head = "\n".join(lines[node.lineno - 1 : doc_end]) + "\n"
            yield Task(f"{name}:{node.name}", ids, head, body, node.col_offset)


def find_tasks(tokenizer: Tokenizer, names: list[str], texts: list[str], limits: EvalLimits) -> list[Task]:
    """A fixed list: some functions of each file, all ordered by the hash of their name."""
    tasks: list[Task] = []
    for name, text in zip(names, texts, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sorted(tasks_of(tokenizer, name, text, limits), key=_order)
        tasks += found[:PER_FILE]
    return sorted(tasks, key=_order)[: limits.functions]


def _order(task: Task) -> str:
    return hashlib.sha256(task.name.encode()).hexdigest()


def cut(completion: str, indent: int) -> tuple[str, bool]:
    """The completion up to its first line indented no deeper than the `def`, and whether there is such a line."""
    kept: list[str] = []
    for line in completion.split("\n"):
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return "\n".join(kept).rstrip() + "\n", True
        kept.append(line)
    return "\n".join(kept), False


def is_valid(task: Task, body: str) -> bool:
    """True when head and body parse as one function that holds more than a docstring."""
    wrapper = "if True:\n" if task.indent else ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(wrapper + task.head + body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    outer = tree.body[0].body if wrapper and isinstance(tree.body[0], ast.If) else tree.body
    return len(outer) == 1 and isinstance(outer[0], (ast.FunctionDef, ast.AsyncFunctionDef)) and len(outer[0].body) > 1


def judge(tasks: list[Task], completions: list[tuple[str, bool]]) -> dict[str, Any]:
    """Rates over all tasks; a completion that did not end within the limit is judged as far as it came."""
    valid = ended = both = 0
    for task, (completion, stopped) in zip(tasks, completions, strict=True):
        body, dedented = cut(completion, task.indent)
        good, over = is_valid(task, body), dedented or stopped
        valid, ended, both = valid + good, ended + over, both + (good and over)
    count = max(1, len(tasks))
    return {
        "functions": len(tasks),
        "syntax_valid": valid / count,
        "ended_within_limit": ended / count,
        "syntax_valid_of_ended": both / max(1, ended),
    }


@torch.no_grad()
def complete(
    folder: Path, tasks: list[Task], limits: EvalLimits, device: torch.device, temperature: float
) -> list[list[int]]:
    """New ids for each task through transformers; temperature 0 is greedy. Ids end before `<|endoftext|>`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    width = max(len(task.ids) for task in tasks)
    ids_BT = torch.full((len(tasks), width), PAD_ID)
    for row, task in enumerate(tasks):
        ids_BT[row, width - len(task.ids) :] = torch.tensor(task.ids)
    torch.manual_seed(1)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    mask_BT = (ids_BT != PAD_ID).long().to(device)
    out_BT = model.generate(ids_BT.to(device), attention_mask=mask_BT, max_new_tokens=limits.new_tokens, **sampling)
    new = out_BT[:, width:].tolist()
    return [ids[: ids.index(BOS_ID)] if BOS_ID in ids else ids for ids in new]


@torch.no_grad()
def agreement_on(draft: LlamaLM, tasks: list[Task], generated: list[list[int]], device: torch.device) -> dict[str, Any]:
    """How far the draft's greedy choice follows the main model's greedy completions: exact for greedy drafting."""
    sequences = []
    for task, ids in zip(tasks, generated, strict=True):
        if not ids:
            continue
        row_1T = torch.tensor([[*task.ids, *ids]], device=device)
        choice_T: Tensor = draft(row_1T[:, :-1])[0, len(task.ids) - 1 :].argmax(-1)
        sequences.append((choice_T == row_1T[0, len(task.ids) :]).tolist())
    flat = [flag for flags in sequences for flag in flags]
    return {
        "top1_agreement": sum(flat) / max(1, len(flat)),
        "tokens_per_check": {str(k): tokens_per_check(sequences, k) for k in DRAFT_LENGTHS},
    }


def completion_report(
    folders: tuple[Path, Path],
    draft_shape: ModelShape,
    held_out: tuple[list[str], list[str]],
    limits: EvalLimits,
    tokenizer: Tokenizer,
    device: torch.device,
) -> dict[str, Any]:
    """Syntax rates of the control, the main model (greedy, temperature 0.6) and the draft, and the first samples."""
    tasks = find_tasks(tokenizer, *held_out, limits)
    report: dict[str, Any] = {"control": judge(tasks, [(t.body, True) for t in tasks])}
    samples: list[dict[str, Any]] = [
        {"name": t.name, "head": t.head, "author": t.body} for t in tasks[: limits.samples]
    ]
    runs = (
        ("main_greedy", folders[0], 0.0),
        ("main_temperature_0.6", folders[0], 0.6),
        ("draft_greedy", folders[1], 0.0),
    )
    for label, folder, temperature in runs:
        ids = complete(folder, tasks, limits, device, temperature)
        texts = [tokenizer.decode(row, skip_special_tokens=False) for row in ids]
        stopped = [len(row) < limits.new_tokens for row in ids]
        report[label] = judge(tasks, list(zip(texts, stopped, strict=True)))
        for sample, task, text in zip(samples, tasks, texts, strict=False):
            sample[label] = cut(text, task.indent)[0]
        if label == "main_greedy":
            draft = load_exported(folders[1], draft_shape, device)
            report["draft_on_greedy_completions"] = agreement_on(draft, tasks, ids, device)
        print(f"functions: {label}: {report[label]}", flush=True)
    return {"report": report, "samples": samples}
