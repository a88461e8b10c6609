"""Small tokenizers of the kinds that checkpoints ship, trained here and saved as model directories."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_WORDS = "the water of a river turns wheel and mill stone while children play near old bridge under grey sky".split()
CORPUS = [
    *(
        f"{a} {b}, {c}! def {a}_{b}(x): return x + {i}\n"
        for i, (a, b, c) in enumerate(zip(_WORDS, _WORDS[3:], _WORDS[5:]))
    ),
    *(" ".join(_WORDS[i::3]) for i in range(3)),
    "naïve café über straße élève",
    "if x == 1:\n        return {'a': [1, 2, 3]}\n",
] * 3
# Emoji and Chinese only here: the byte-level trainer sees them, so that some merges end inside a character.
WIDE = ["😀😃😀😃 你好世界 你好", "日本語 日本 😀😀😀", "한국어 한국"] * 6
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _save(backend: Tokenizer, directory: Path, **names: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(directory)
    return directory


def byte_level(directory: Path, bos: bool = True) -> Path:
    """Llama 3: byte-level, a regular expression splits, the post-processor prepends the beginning token."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=620, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS + WIDE, trainer)
    if bos:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B:1", special_tokens=[(specials[0], 0)]
                ),
            ]
        )
    _save(backend, directory, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    return directory


def byte_level_nfc(directory: Path) -> Path:
    """Qwen 2 and 3: byte-level after NFC, no beginning token, ChatML tokens, one added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT.replace("{1,3}", "")), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS + WIDE, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<｜tool sep｜>", normalized=False)])
    return _save(backend, directory, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _with_byte_fallback(corpus: list[str]) -> models.BPE:
    """A model whose ids 3 to 258 are the bytes, as sentencepiece lays them out."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    backend.train_from_iterator([word for line in corpus for word in line.split()], trainer)
    trained = json.loads(backend.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    order = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces[3:], "▁▁", "▁▁▁▁"]
    merges = [*(tuple(merge) for merge in trained["merges"]), ("▁", "▁"), ("▁▁", "▁▁")]
    vocab = {piece: index for index, piece in enumerate(order)}
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def byte_fallback(directory: Path) -> Path:
    """Llama 2: spaces are letters, unknown characters fall back to bytes, the first space of a text is dropped."""
    backend = Tokenizer(_with_byte_fallback(CORPUS))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _add_sentencepiece_specials(backend)
    return _save(backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_fallback_unstripped(directory: Path) -> Path:
    """Gemma: as Llama 2, but no space is put before a text and none is dropped."""
    backend = Tokenizer(_with_byte_fallback(CORPUS))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _add_sentencepiece_specials(backend)
    return _save(backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace(directory: Path) -> Path:
    """Unknown characters become <unk>; the Metaspace decoder treats the first token differently."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _save(backend, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _add_sentencepiece_specials(backend: Tokenizer) -> None:
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )


KINDS = {
    "byte_level": byte_level,
    "byte_level_nfc": byte_level_nfc,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": byte_fallback_unstripped,
    "metaspace": metaspace,
}
