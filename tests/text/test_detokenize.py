"""Streaming detokenisation: any tokens, any split, the pieces together equal decoding the whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import KINDS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from headrace.text import IncrementalDetokenizer, Tokenizer

MakeDir = Callable[[str], Path]
SETTINGS = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_ALPHABET = st.sampled_from("ab  \n▁.éß你好😀😃\u0301\u200d\ufffd\U0001f1e6") | st.characters(exclude_categories=["Cs"])
# The kinds whose vocabularies hold all bytes; in the others, unknown characters are <unk>.
BYTE_KINDS = pytest.mark.parametrize("model_dir", sorted(set(KINDS) - {"metaspace"}), indirect=True)
TEXTS = st.text(_ALPHABET, max_size=12)


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Tokens of texts, mixed with tokens at random: lone bytes, special tokens, ids beyond the vocabulary."""
    known = range(tokenizer.vocab_size)
    if tokenizer.is_byte_level:
        wide = [i for i in known if tokenizer.token_bytes(i)[-1:] >= b"\x80"]
    else:
        wide = [i for i in known if (tokenizer.byte_value(i) or 0) >= 0x80] or [*known]
    beyond = st.integers(tokenizer.vocab_size, tokenizer.vocab_size + 3)
    loose = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(wide) | beyond
    special = st.sampled_from(sorted(tokenizer.special_ids))
    token_ids: list[int] = []
    for _ in range(draw(st.integers(0, 4))):
        token_ids += tokenizer.encode(draw(TEXTS), add_special_tokens=False)
        token_ids += draw(st.lists(loose | special, max_size=5))
    return token_ids


def _stream(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@SETTINGS
@given(data=st.data(), skip=st.booleans())
def test_pieces_equal_the_whole(tokenizer: Tokenizer, events: Counter[str], data: st.DataObject, skip: bool) -> None:
    token_ids = data.draw(token_lists(tokenizer))
    pieces = _stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), token_ids)
    whole = tokenizer.decode(token_ids, skip)
    assert "".join(pieces) == whole
    _count(events, tokenizer, token_ids, pieces, whole)


@SETTINGS
@given(data=st.data(), prompt=TEXTS)
def test_with_a_prompt_the_pieces_are_what_the_output_adds(
    tokenizer: Tokenizer, events: Counter[str], data: st.DataObject, prompt: str
) -> None:
    prompt_ids = tokenizer.encode(prompt)
    token_ids = data.draw(token_lists(tokenizer))
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids + token_ids)
    # Broken bytes right behind a prompt that ends in byte tokens turn the prompt's own character into U+FFFD.
    assume(whole.startswith(before))
    pieces = _stream(IncrementalDetokenizer(tokenizer, prompt_ids), token_ids)
    assert "".join(pieces) == whole[len(before) :]
    _count(events, tokenizer, token_ids, pieces, whole[len(before) :])


@BYTE_KINDS
def test_incomplete_characters_are_held_back(tokenizer: Tokenizer, events: Counter[str]) -> None:
    """Nothing before a character's last byte, the character at the latest with the token that follows."""
    for char in "é你😀":
        token_ids = [_byte_token(tokenizer, byte) for byte in char.encode()]
        follower = tokenizer.encode("a", add_special_tokens=False)[-1]
        pieces = _stream(IncrementalDetokenizer(tokenizer), [*token_ids, follower])
        assert "".join(pieces[: len(token_ids) - 1]) == ""
        assert "".join(pieces).replace(" ", "") == f"{char}a"
        # A special token that is left out does not end the character, one that is shown does.
        eos = tokenizer.eos_ids[-1]
        split = [*token_ids[:1], eos, *token_ids[1:]]
        assert "".join(_stream(IncrementalDetokenizer(tokenizer), split)) == char
        shown = "".join(_stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), split))
        assert shown == tokenizer.decode(split, skip_special_tokens=False)
        assert "\ufffd" in shown
        events["characters in bytes"] += 1


@BYTE_KINDS
def test_a_character_begun_by_the_prompt_is_the_outputs(tokenizer: Tokenizer) -> None:
    first, *rest = [_byte_token(tokenizer, byte) for byte in "😀".encode()]
    prompt_ids = [*tokenizer.encode("the wateré"), first]
    assert "".join(_stream(IncrementalDetokenizer(tokenizer, prompt_ids), rest)) == "😀"


def test_a_literal_replacement_character_is_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a\ufffd\ufffdb", add_special_tokens=False)
    assert "".join(_stream(IncrementalDetokenizer(tokenizer), token_ids)) == tokenizer.decode(token_ids)


@BYTE_KINDS
def test_cost_of_a_token_does_not_grow(tokenizer: Tokenizer) -> None:
    """20,000 tokens: decoding the whole at every token would take minutes."""
    words = tokenizer.encode("the water turns 你好😀 mill ", add_special_tokens=False)
    lone = _byte_token(tokenizer, 0xFF)
    for token_ids in (words * (20_000 // len(words)), [lone] * 20_000):
        began_s = time.perf_counter()
        pieces = _stream(IncrementalDetokenizer(tokenizer), token_ids)
        assert time.perf_counter() - began_s < 5
        assert "".join(pieces) == tokenizer.decode(token_ids)


def _byte_token(tokenizer: Tokenizer, byte: int) -> int:
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.byte_value(token_id) == byte:
            return token_id
        if tokenizer.is_byte_level and tokenizer.token_bytes(token_id) == bytes([byte]):
            return token_id
    raise AssertionError(f"no token for byte {byte}")


def _count(events: Counter[str], tokenizer: Tokenizer, token_ids: list[int], pieces: list[str], whole: str) -> None:
    events["examples"] += 1
    events["characters beyond ASCII"] += sum(not char.isascii() for char in whole)
    events["beyond the vocabulary"] += sum(token_id >= tokenizer.vocab_size for token_id in token_ids)
    if tokenizer.is_byte_level or tokenizer.byte_value(3) is not None:
        visible = (piece for token_id, piece in zip(token_ids, pieces) if token_id not in tokenizer.special_ids)
        events["tokens held back"] += sum(piece == "" for piece in visible)
        events["broken characters"] += whole.count("\ufffd")
        events["outputs that end inside a character"] += pieces[-1] != ""
