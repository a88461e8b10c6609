"""Writes the model cards and the training curve from the measured report: no measured number is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .settings import DRAFT_NAME, MAIN_NAME

FRONT = """---
license: apache-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
tags: [python, code, tiny]
---
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def corpus_section(manifest: dict[str, Any]) -> str:
    summary, packages = manifest["summary"], manifest["packages"]
    licences: dict[str, int] = {}
    for row in packages:
        licences[row["licence"]] = licences.get(row["licence"], 0) + row["bytes_train"]
    shares = ", ".join(
        f"{name} {size / 1e6:.1f} MB" for name, size in sorted(licences.items(), key=lambda i: -i[1])[:6]
    )
    largest = sorted(packages, key=lambda row: -row["bytes_train"])[:12]
    total = summary["bytes_train"]
    rows = "\n".join(
        f"| {r['name']} | {r['version']} | {r['licence']} | {r['bytes_train'] / 1e6:.1f} MB |" for r in largest
    )
    return f"""## Training text

{total / 1e6:.1f} MB of Python source in {summary["files_train"]} files: the standard library of Python
{summary["python"]} and {len(packages) - 1} installed packages whose own metadata declares a permissive licence.
`corpus_manifest.json` lists every package with version, licence and bytes used, and the packages that were refused.
Vendored folders, files that name another licence in their head, generated, data-like and over-long files were left
out, and so were exact and near duplicates. Licence headers were cut off and mail addresses replaced.

By declared licence, the largest: {shares}.

The twelve largest packages:

| package | version | licence | bytes |
| --- | --- | --- | --- |
{rows}
"""


def training_section(runs: dict[str, Any]) -> str:
    main, draft = runs["main"], runs["draft"]
    return f"""## Training

| | {MAIN_NAME} | {DRAFT_NAME} |
| --- | --- | --- |
| parameters | {main["parameters"]:,} | {draft["parameters"]:,} |
| tokens seen | {main["tokens"] / 1e6:.0f} M | {draft["tokens"] / 1e6:.0f} M |
| passes over the text | {main["passes_over_corpus"]:.1f} | {draft["passes_over_corpus"]:.1f} |
| steps | {main["steps"]} | {draft["steps"]} |
| wall-clock | {main["seconds"]:.0f} s | {draft["seconds"]:.0f} s |
| device | {main["device"]} | {draft["device"]} |

Windows of {main["budget"]["sequence_length"]} tokens, {main["budget"]["tokens_per_step"]:,} tokens a step, Muon for the
matrices and AdamW for the rest, bfloat16 products on float32 weights, warm-up, constant, linear decay. The draft learns
from the main model's whole distribution (KL, weight 0.9) and the text (0.1). The recipe is in `recipes/bundled`.

At the end the main model's loss is {main["final_train_loss"]:.2f} nats a token on the text it trains on and
{main["final_held_out_loss"]:.2f} on held-out text: after so many passes it has begun to learn that text by heart.
"""


def results_section(report: dict[str, Any]) -> str:
    held, done = report["held_out"], report["functions"]
    bits, files, greedy = held["bits_per_byte"], held["draft_on_files"], done["draft_on_greedy_completions"]
    names = {
        "control": "as written by the authors",
        "main_greedy": f"{MAIN_NAME}, greedy",
        "main_temperature_0.6": f"{MAIN_NAME}, temperature 0.6",
        "draft_greedy": f"{DRAFT_NAME}, greedy",
    }
    rows = "\n".join(
        f"| {label} | {percent(done[key]['syntax_valid'])} | {percent(done[key]['ended_within_limit'])} | "
        f"{percent(done[key]['syntax_valid_of_ended'])} |"
        for key, label in names.items()
    )
    return f"""## Results

Held out: {held["files"]} files, {held["bytes"]:,} bytes, from the same packages as the training text, no near
duplicate of any file trained on. They measure the fit to this kind of text, not how well the model writes programs.

| | bits per byte |
| --- | --- |
| {MAIN_NAME} | {bits["main"]:.3f} |
| {DRAFT_NAME} | {bits["draft"]:.3f} |
| xz -9e, all files in one stream | {bits["xz_9e"]:.3f} |
| gzip -9, all files in one stream | {bits["gzip_9"]:.3f} |

Next token guessed right by {MAIN_NAME}: {percent(held["next_token_accuracy_main"])}.

{done["control"]["functions"]} held-out functions completed from the file up to the docstring (at most 192 new tokens,
cut at the first dedent), then parsed; a completion that runs into the limit is judged as it stands. The functions were
chosen to fit the limit, and the authors' own bodies went through the same test:

| | parses | ended within the limit | parses, of those that ended |
| --- | --- | --- | --- |
{rows}

A completion that parses is not one that is right: the model is far too small for that. Greedy completions often fall
into repeating a line and so run into the limit.

The draft against {MAIN_NAME}: same first choice for {percent(files["top1_agreement"])} of held-out tokens and
{percent(greedy["top1_agreement"])} of the tokens of {MAIN_NAME}'s greedy completions; acceptance rate of speculative
sampling at temperature 1 {percent(files["acceptance_rate_temperature_1"])}; with four drafted tokens a check of the
greedy completions yields {greedy["tokens_per_check"]["4"]:.2f} tokens (repetition makes these easy to foresee),
on held-out text {files["tokens_per_check"]["4"]:.2f}.
"""


def samples_section(samples: list[dict[str, Any]]) -> str:
    intro = (
        "## Samples\n\nThe first of the fixed list of held-out functions, greedy, cut at the first dedent, unedited.\n"
        "Up to the docstring's end they are quoted from the package named, under its licence; the rest is its own.\n"
    )
    shown = (f"`{s['name']}`\n\n````python\n{s['head']}{s['main_greedy'].rstrip()}\n````\n" for s in samples)
    return "\n".join((intro, *shown))


def main_card(report: dict[str, Any], manifest: dict[str, Any]) -> str:
    bos = report["held_out"]["bos"]
    note = ""
    if bos:
        note = (
            f"\nOver the first 256 tokens of a file the loss is {bos['with_bos']:.3f} nats a token with it, "
            f"{bos['without_bos']:.3f} without."
        )
    return f"""{FRONT}
# {MAIN_NAME}

A base language model for Python source with {report["runs"]["main"]["parameters"]:,} parameters, bundled with Headrace
so that tests, examples and benchmarks run on a real model without a download. Llama architecture: 8 layers, width 384,
6 heads on 2 key/value heads, tied embeddings, context 2048, byte-level BPE of 8192 tokens, bfloat16. The weights are
under the licence of Headrace.

It continues Python files. It follows no instructions, knows next to nothing, and what it writes may be wrong, insecure
or close to its training text. Do not build on its output.

The tokenizer adds no `<|endoftext|>` by itself; in training one stood before each file.{note}
The chat template writes each message as a Python comment; it exists so that chat endpoints have something to render.

{results_section(report)}
{training_section(report["runs"])}
{corpus_section(manifest)}
{samples_section(report["samples"])}"""


def draft_card(report: dict[str, Any]) -> str:
    return f"""{FRONT}
# {DRAFT_NAME}

The draft model of `{MAIN_NAME}` for speculative decoding: {report["runs"]["draft"]["parameters"]:,} parameters,
2 layers, width 128, the same tokenizer, distilled from it on the same text. Of little use alone; limits and training
text are those of the `{MAIN_NAME}` card.

{results_section(report)}
{training_section(report["runs"])}"""


def write_cards(report: dict[str, Any], manifest: dict[str, Any], assets: Path) -> None:
    (assets / MAIN_NAME / "README.md").write_text(main_card(report, manifest))
    (assets / DRAFT_NAME / "README.md").write_text(draft_card(report))
    for name in (MAIN_NAME, DRAFT_NAME):
        public = {key: report[key] for key in ("runs", "held_out", "functions")}
        (assets / name / "evaluation.json").write_text(json.dumps(public, indent=1) + "\n")


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=110)
    axes.plot([r["tokens"] / 1e6 for r in log], [r["loss"] for r in log], lw=0.9, color="#8fb3d9", label="train")
    held = [r for r in log if "held_out" in r]
    axes.plot(
        [r["tokens"] / 1e6 for r in held], [r["held_out"] for r in held], lw=1.4, color="#b3402a", label="held out"
    )
    low = min(r["loss"] for r in log)
    axes.set(xlabel="tokens seen, millions", ylabel="nats per token", title=MAIN_NAME, ylim=(0.9 * low, 3 * low))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
