"""Tokenizer: the same ids as transformers on the same directory, special tokens, errors that help."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from headrace.errors import RequestError, TokenizerError
from headrace.text import Tokenizer

MakeDir = Callable[[str], Path]
_SPECIALS = [
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "<｜tool sep｜>",
]
_WORDS = ["the water", " turns", "  ", "\n\n", "你好", "😀", "é", "e\u0301", "1234", "don't", "\t", "\x00", " "]
TEXTS = st.lists(st.sampled_from(_SPECIALS + _WORDS) | st.text(max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_dir)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, add_special_tokens=st.booleans())
def test_ids_and_text_equal_transformers(
    tokenizer: Tokenizer, reference: Any, events: Counter[str], text: str, add_special_tokens: bool
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens)
    assert token_ids == reference.encode(text, add_special_tokens=add_special_tokens)
    assert tokenizer.encode_batch([text, "x", text], add_special_tokens)[0::2] == [token_ids, token_ids]
    for skip in (True, False):
        assert tokenizer.decode(token_ids, skip) == reference.decode(token_ids, skip_special_tokens=skip)
    events["examples"] += 1
    events["special tokens"] += any(token_id in tokenizer.special_ids for token_id in token_ids)
    events["beyond ASCII"] += not text.isascii()


def test_names_and_sizes_equal_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.bos_id == reference.bos_token_id
    assert reference.eos_token_id in tokenizer.eos_ids
    assert set(reference.all_special_ids) <= tokenizer.special_ids
    assert tokenizer.special_tokens == reference.special_tokens_map


def test_end_tokens_are_the_union_of_both_files(make_dir: MakeDir) -> None:
    directory = make_dir("byte_level")
    assert Tokenizer.from_dir(directory).eos_ids == [1, 4]  # [1, 4] in generation_config.json, 4 is the tokenizer's own
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.from_dir(directory).eos_ids == [1, 4]
    (directory / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.from_dir(directory).eos_ids == [4]
    (directory / "generation_config.json").unlink()
    (directory / "config.json").write_text('{"eos_token_id": [0, 1]}')
    assert Tokenizer.from_dir(directory).eos_ids == [0, 1, 4]
    (directory / "config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(TokenizerError, match="eos_token_id '</s>'"):
        Tokenizer.from_dir(directory)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_nfc", "byte_fallback"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_post_processor_decides_on_the_beginning_token(make_dir: MakeDir, kind: str, add_bos: bool) -> None:
    directory = make_dir(kind)
    _change(directory / "tokenizer_config.json", add_bos_token=add_bos)
    reference = AutoTokenizer.from_pretrained(directory)
    assert Tokenizer.from_dir(directory).encode("the water") == reference.encode("the water")


def test_saved_padding_and_truncation_are_not_applied(make_dir: MakeDir) -> None:
    directory = make_dir("byte_level")
    text = "the water of a river turns"
    plain = Tokenizer.from_dir(directory).encode(text)
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    _change(directory / "tokenizer.json", truncation=truncation, padding={**padding, "pad_to_multiple_of": None})
    assert Tokenizer.from_dir(directory).encode(text) == plain


def test_tokens_that_only_the_configuration_knows(make_dir: MakeDir) -> None:
    directory = make_dir("byte_level_nfc")
    added = {"content": "<plain>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    _change(
        directory / "tokenizer_config.json",
        added_tokens_decoder={"434": {**added, "special": False}},
        bos_token="<new bos>",
        extra_special_tokens=["<listed>"],
    )
    tokenizer, reference = Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
    text = "a<plain>b<new bos>c<listed>d"
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "a<plain>bcd"
    assert tokenizer.bos_id == reference.bos_token_id == tokenizer.token_id("<new bos>")
    assert tokenizer.vocab_size == len(reference)


def test_names_in_special_tokens_map(make_dir: MakeDir) -> None:
    directory = make_dir("byte_fallback")
    (directory / "tokenizer_config.json").write_text("{}")
    entry = {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": entry}))
    tokenizer = Tokenizer.from_dir(directory)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    assert (Tokenizer.from_dir(directory).bos_id, Tokenizer.from_dir(directory).eos_ids) == (None, [])


def test_llama_2_directory_equals_transformers_on_plain_text(make_dir: MakeDir) -> None:
    directory = make_dir("byte_fallback")
    _change(directory / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=False)
    reference, tokenizer = AutoTokenizer.from_pretrained(directory), Tokenizer.from_dir(directory)
    for text in ("the water turns", "naïve 你好 😀!", "a  b", "x"):
        assert tokenizer.encode(text) == reference.encode(text)
    # A space before the text is kept beside the one that sentencepiece puts there, as the model was trained.
    assert [tokenizer.token(token_id) for token_id in tokenizer.encode(" x")] == ["<s>", "▁", "▁x"]


def test_bytes_of_tokens(make_dir: MakeDir) -> None:
    byte_level = Tokenizer.from_dir(make_dir("byte_level_nfc"))
    text = "ça 😀\n<｜tool sep｜>"
    assert b"".join(byte_level.token_bytes(token_id) for token_id in byte_level.encode(text)).decode() == text
    assert byte_level.token_bytes(10**6) == b""
    assert byte_level.byte_value(5) is None
    fallback = Tokenizer.from_dir(make_dir("byte_fallback"))
    assert [fallback.byte_value(token_id) for token_id in (2, 3, 258, 259)] == [None, 0, 255, None]


def test_what_cannot_be_encoded_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"text 1 has the lone surrogate '\\ud800' at character 2"):
        tokenizer.encode_batch(["fine", "ab\ud800"])
    with pytest.raises(RequestError, match="text 0 is a int"):
        tokenizer.encode(7)  # type: ignore[arg-type]


def test_missing_and_damaged_files_are_named(make_dir: MakeDir, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a directory"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing.*skip_tokenizer_init"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json: convert it once"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read by tokenizers \d"):
        Tokenizer.from_dir(tmp_path)
    directory = make_dir("byte_level")
    (directory / "tokenizer_config.json").write_text("{,}")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_dir(directory)
    (directory / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="holds a JSON list"):
        Tokenizer.from_dir(directory)


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spellings_are_what_tokens_add(tokenizer: Tokenizer, events: Counter[str], data: st.DataObject) -> None:
    """Behind a prompt, the bytes of tokens are those of the text that they add."""
    events.update(dict.fromkeys(["several tokens"], 0))
    spellings = tokenizer.spellings()
    assert len(spellings) == tokenizer.vocab_size
    assert all(not spellings[token] for token in tokenizer.special_ids)
    plain = [token for token, text in enumerate(spellings) if text]
    text = data.draw(TEXTS)
    ids = [t for t in tokenizer.encode(text, add_special_tokens=False) if spellings[t]]
    ids += data.draw(st.lists(st.sampled_from(plain), max_size=3))
    prompt = tokenizer.encode("the water")
    try:
        added = b"".join(spellings[token] for token in ids).decode()
    except UnicodeDecodeError:
        return
    events["several tokens"] += len(ids) > 1
    assert tokenizer.decode(prompt + ids) == tokenizer.decode(prompt) + added
