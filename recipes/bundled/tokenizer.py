"""Byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) with pre-tokens cut for Python source.

A run of indentation is a pre-token of its own, and neither newlines nor punctuation join the word after them, so that
a prompt may end after `:`, after the newline, or after the indentation and still look like training text. Digits stay
single. Nothing is normalised: decode(encode(text)) == text.
"""

from __future__ import annotations

import time
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .corpus import read_documents
from .settings import BOS, BOS_ID, PAD, PAD_ID, VOCAB_SIZE

PATTERN = "|".join(
    (
        r"(?<=\n)[ \t]+",  # indentation, whole
        r"\n+",
        r" ?[\p{L}_]+",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}_]+",
        r"[^\S\n]+(?!\S)",  # spaces inside a line: all but the one that joins the next word
        r"[^\S\n]",
    )
)
SAMPLE_BYTES = 120_000_000


def train(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Learns the merges; the vocabulary has exactly `vocab_size` entries, the two special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        max_token_length=32,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocabulary of {tokenizer.get_vocab_size()} entries, {vocab_size} wanted: too little text")
    if (tokenizer.token_to_id(BOS), tokenizer.token_to_id(PAD)) != (BOS_ID, PAD_ID):
        raise ValueError("special tokens did not get the first two ids")
    return tokenizer


def load(path: Path) -> Tokenizer:
    """The tokenizer as corpus text needs it: source that spells out a special token is ordinary text."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def build(corpus: Path, out: Path) -> None:
    """Trains on the head of the training text (it is in hash order, so the head is a fair sample)."""
    started = time.perf_counter()
    sample, size = [], 0
    for document in read_documents(corpus / "train.txt"):
        sample.append(document)
        size += len(document)
        if size > SAMPLE_BYTES:
            break
    train(sample).save(str(out))
    print(f"tokenizer: trained on {size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s", flush=True)
