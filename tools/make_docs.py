"""Write the generated pages of docs/ from the registries, or check that they are up to date (--check)."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from headrace import errors
from headrace.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.errors import HeadraceError
from headrace.models.base import CausalLM
from headrace.models.checkpoint import load_model
from headrace.models.registry import families
from headrace.params import SamplingParams
from headrace.parts import REGISTRIES
from headrace.quantization import FORMS
from headrace.ranks import ONE, Ranks
from headrace.serve.settings import ServeConfig
from headrace.text.tools import TOOL_FORMATS
from tools.bad_input import Bench, rows

ROOT = Path(__file__).resolve().parent.parent
LABELS = """\
| label | meaning |
| --- | --- |
| exact | the same tokens as plain decoding |
| in_law | the same distribution |
| lossy | other tokens, a function of the request alone |
| contextual | depends on cache contents, neighbours or load; runs only where a request asks for it |
"""


def systems_page() -> str:
    """docs/systems.md: every registered part."""
    lines = [
        "# Systems that work today",
        "",
        "Generated from the registries by `make docs`; a part that is not listed here does not exist yet.",
        "",
        LABELS,
    ]
    for registry in REGISTRIES:
        lines += [f"## {registry.seam.capitalize()}", ""]
        lines += ["| part | label | option | what it does | source | composes with |", "| --- " * 6 + "|"]
        lines += [
            f"| {p.name} | {p.label} | `{p.option}` | {p.summary} | {p.source or 'the field'} | {p.composes} |"
            for p in registry
        ]
        lines.append("")
    lines += ["## Tool format", "", "| format | option | what the model writes | models |", "| --- " * 4 + "|"]
    lines += [f"| {p.name} | `{p.option}` | {p.summary} | {p.source} |" for p in TOOL_FORMATS]
    lines += ["", *_forms(), "## Pairs", "", *_pairs(), ""]
    lines += ["## Ranks", "", *_ranks(), ""]
    lines += ["## Model family", "", "| model_type | architectures |", "| --- | --- |"]
    lines += [f"| {name} | {', '.join(architectures)} |" for name, architectures in families()]
    lines += [
        "",
        "Devices: on the CPU attention, the draw and the small operations have compiled kernels, on a GPU kernels in",
        "Triton; on a GPU steps are recorded as CUDA graphs too.",
    ]
    return "\n".join(lines) + "\n"


def _forms() -> list[str]:
    """What checkpoints may hold weights in: no option of the engine, so that there are no pairs of it."""
    lines = ["## Weight form", "", "Said by the checkpoint, `quant_method` in its `quantization_config`.", ""]
    lines += ["| form | label | what it does | source | composes with |", "| --- " * 5 + "|"]
    lines += [f"| {p.name} | {p.label} | {p.summary} | {p.source} | {p.composes} |" for p in FORMS]
    return [*lines, ""]


def _pairs() -> list[str]:
    """How many pairs of parts there are, seam by seam."""
    seams = [registry.seam for registry in REGISTRIES]
    lines = [
        "Every pair of parts of two seams runs in `tests/test_pairs.py`: either the tokens of each request are those",
        "that the lossy part alone, or plain decoding, gives it, or the engine refuses to start with a sentence.",
        "",
        "| | " + " | ".join(seams) + " |",
        "| --- " * (len(seams) + 1) + "|",
    ]
    for i, one in enumerate(REGISTRIES):
        cells = [
            f"{len(one.names()) * len(other.names())} pairs" if j > i else "" for j, other in enumerate(REGISTRIES)
        ]
        lines.append(f"| {one.seam} | " + " | ".join(cells) + " |")
    refused = _refused()
    lines += ["", f"Refused at start, {len(refused)} of them; all others run.", ""]
    lines += ["| part | part | what the engine says |", "| --- | --- | --- |"]
    return lines + [f"| {one} | {other} | {sentence} |" for one, other, sentence in refused]


def _ranks() -> list[str]:
    """The parts with which an engine on several ranks does not start."""
    lines = [
        "With `tensor_parallel_size` above 1 every part runs in `tests/distributed/test_ranks.py`: either the tokens",
        "are those of one rank, or the engine refuses to start with a sentence.",
        "",
        "| part | what the engine says |",
        "| --- | --- |",
    ]
    with _tiny() as (directory, model):
        for part in itertools.chain.from_iterable(REGISTRIES):
            sentence = _refusal({**part.example, "tensor_parallel_size": 2}, directory, model, Ranks(size=2))
            lines += [f"| {part.name} | {sentence} |"] if sentence else []
    return lines


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
"""A model that starts in no time."""


def _refused() -> list[tuple[str, str, str]]:
    """Pairs of parts with which an engine does not start, and its sentence."""
    refused = []
    with _tiny() as (directory, model):
        for seam, another in itertools.combinations(REGISTRIES, 2):
            for one, other in itertools.product(seam, another):
                sentence = _refusal({**one.example, **other.example}, directory, model)
                if sentence:
                    refused.append((one.name, other.name, sentence))
    return refused


@contextlib.contextmanager
def _tiny() -> Iterator[tuple[str, CausalLM]]:
    """A tiny model, and a directory that holds it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(TINY))
        model = load_model(directory, device="cpu", dtype="float32", load_format="random", seed=0)
        tensors = {name: views[0].contiguous() for name, views in model.tensors().items()}
        save_file(tensors, str(Path(directory) / "model.safetensors"))
        yield directory, model


def _refusal(given: dict[str, Any], directory: str, model: CausalLM, ranks: Ranks = ONE) -> str:
    """What an engine with these options says instead of starting; nothing if it starts."""
    fields = {f.name for f in dataclasses.fields(EngineConfig)}
    options: dict[str, Any] = {k: directory if v == "<checkpoint>" else v for k, v in given.items() if k in fields}
    try:
        Engine(EngineConfig(num_pages=64, max_num_seqs=2, max_num_batched_tokens=16, **options), model, ranks=ranks)
    except HeadraceError as refusal:
        return str(refusal)
    return ""


def options_page() -> str:
    """docs/options.md: every engine option, sampling parameter and option of the server."""
    lines = ["# Options", "", "Generated from the dataclasses that hold them, by `make docs`.", ""]
    for title, kind in (
        ("Engine: `LLM(...)`", EngineConfig),
        ("Request: `SamplingParams(...)`", SamplingParams),
        ("Server: `headrace serve`, with `--` and dashes", ServeConfig),
    ):
        lines += [f"## {title}", "", "| option | default | meaning |", "| --- | --- | --- |"]
        for spec in dataclasses.fields(kind):
            choices = spec.metadata["choices"]
            text = spec.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
            lines.append(f"| {spec.name} | `{spec.default!r}` | {text} |")
        lines.append("")
    return "\n".join(lines)


def errors_page() -> str:
    """docs/errors.md: every error and every way to it, as it happens on a tiny model."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeadraceError)]
    lines = [
        "# Errors",
        "",
        "Generated by `make docs`: every line below was made by doing it (`tools/bad_input/`).",
        "",
    ]
    lines += [
        "An error names the thing, the value, the limit and the way out. It is raised where the value enters: by the",
        "constructor, at start, or when a request is added. Other requests go on with the tokens they would have had.",
        "Where `...` stands, the words are those of another library; `/models` is the directory of the model.",
        "",
    ]
    lines += ["| error | meaning |", "| --- | --- |"]
    lines += [f"| {kind.__name__} | {' '.join((kind.__doc__ or '').split())} |" for kind in kinds]
    lines += [
        "",
        "`headrace` ends with the status 0; 1 if an output, or part of it, is missing; 2 for what was asked wrongly;",
        "130 after Ctrl-C; 141 if the reader of its output went away. What `headrace generate` has finished by then is",
        "kept: the output file holds whole lines only, in the order of the prompts. Bad lines of its input are all",
        "named, and then no line is run. After Ctrl-C in `LLM.generate` all its requests are aborted, and the next",
        "call finds an idle engine.",
        "",
    ]
    with Bench() as bench:
        for title, columns, table in rows(bench):
            lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
            lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in table]
            lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A message inside a table of Markdown."""
    plain = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return plain.replace("|", "\\|").replace("<", "\\<").replace("\n", " ")


PAGES = {"docs/systems.md": systems_page, "docs/options.md": options_page, "docs/errors.md": errors_page}


def main() -> int:
    """Returns the exit status: 1 if --check finds a page that is not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(f"wrote {name}")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
