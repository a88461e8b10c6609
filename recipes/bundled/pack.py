"""Packs the corpus into one stream of 16-bit token ids, each document after a `<|endoftext|>`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .corpus import read_documents
from .settings import BOS_ID
from .tokenizer import load

CHUNK = 2000


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False)]


def write_stream(tokenizer: Tokenizer, documents: list[str], path: Path) -> int:
    """Appends `<|endoftext|>` and the ids of each document to `path`; returns the number of tokens."""
    total = 0
    with path.open("wb") as file:
        for start in range(0, len(documents), CHUNK):
            for ids in encode_documents(tokenizer, documents[start : start + CHUNK]):
                file.write(np.array([BOS_ID, *ids], dtype=np.uint16).tobytes())
                total += len(ids) + 1
    return total


def build(corpus: Path, tokenizer_path: Path, out: Path) -> None:
    """Writes train.u16 and heldout.u16 under `out`."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load(tokenizer_path)
    for name in ("train", "heldout"):
        documents = read_documents(corpus / f"{name}.txt")
        size = sum(len(d.encode()) for d in documents)
        total = write_stream(tokenizer, documents, out / f"{name}.u16")
        print(
            f"pack: {name}: {total / 1e6:.2f} M tokens, {size / total:.3f} bytes a token, "
            f"{time.perf_counter() - started:.1f} s",
            flush=True,
        )


def read_stream(path: Path) -> np.ndarray:
    """The packed ids as a read-only memory map of uint16."""
    return np.memmap(path, dtype=np.uint16, mode="r")
