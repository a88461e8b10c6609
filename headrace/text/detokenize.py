"""Token by token to text: what was given out never changes, and all of it together equals decoding the whole at once.

A token may hold a part of a character. Byte-level vocabularies spell tokens in bytes, so their text is a UTF-8 stream
and is decoded as one. All other decoders are asked through a short window: new text = decode(context + new tokens)
less decode(context), where the context is the last token that shows. It keeps spaces right for decoders that treat the
first token differently. In vocabularies with byte fallback a run of byte tokens decodes as one piece, valid or not at
all, so the run is held back until another token ends it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Protocol

from headrace.text.tokenizer import Tokenizer


class _Stream(Protocol):
    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one output, as its tokens arrive.

    Parameters
    ----------
    tokenizer: the tokenizer that decodes.
    prompt_ids: tokens that stand before the output, for left context: with them the text is what the output adds to
        the prompt's text (a leading space is kept; a character begun by the prompt and completed by the output is the
        output's). Without them the text is exactly `tokenizer.decode(output_ids)`.
    skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        visible = (token_id for token_id in reversed(prompt_ids) if self._shows(token_id))
        self._stream: _Stream
        if tokenizer.is_byte_level:
            self._stream = _ByteLevelStream(tokenizer, visible)
        else:
            self._stream = _WindowStream(tokenizer, visible)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is now certain (often "", while a character is incomplete)."""
        return self._stream.push(token_id) if self._shows(token_id) else ""

    def finish(self) -> str:
        """The output has ended: give out what was held back, incomplete characters as U+FFFD."""
        return self._stream.finish()

    def _shows(self, token_id: int) -> bool:
        # Decoding the whole drops such tokens first: they neither end a run of bytes nor count as the first token.
        return token_id not in self._hidden and self._tokenizer.token(token_id) is not None


class _ByteLevelStream:
    """Tokens are bytes, whole output is one UTF-8 stream. Constant work a token."""

    def __init__(self, tokenizer: Tokenizer, prompt_backwards: Iterator[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tail = b""
        for token_id in prompt_backwards:
            tail = tokenizer.token_bytes(token_id) + tail
            if len(tail) >= 4:  # no character is longer, so the state at the end no longer depends on what came before
                break
        self._utf8.decode(tail)

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream:
    """Tokens are pieces of text and a decoder joins them. Work a token is that of decoding two or three tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt_backwards: Iterator[int]) -> None:
        self._tokenizer = tokenizer
        self._window, settled = _prompt_context(tokenizer, prompt_backwards)
        self._given = len(self._decode(self._window[:settled]))  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        if self._tokenizer.byte_value(token_id) is not None:
            return ""
        new = self._new_text()
        self._shrink()
        return new

    def finish(self) -> str:
        new = self._new_text()
        self._given += len(new)
        return new

    def _new_text(self) -> str:
        return self._decode(self._window)[self._given :]

    def _shrink(self) -> None:
        """Keep as context the shortest end of the window that shows: one token, more only if the last decodes to ""."""
        for start in range(len(self._window) - 1, -1, -1):
            text = self._decode(self._window[start:])
            if text or start == 0:
                self._window = self._window[start:]
                self._given = len(text)
                return

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False) if token_ids else ""


def _prompt_context(tokenizer: Tokenizer, prompt_backwards: Iterator[int]) -> tuple[list[int], int]:
    """The prompt's last token that shows, then the byte tokens of a character that the prompt leaves incomplete.

    Returns the window and how many of its tokens are settled text of the prompt.
    """
    run: list[int] = []  # byte tokens at the very end, last first
    context: list[int] = []  # what stands before them
    for token_id in prompt_backwards:
        if not context and tokenizer.byte_value(token_id) is not None:
            run.append(token_id)
            continue
        context.insert(0, token_id)
        if tokenizer.decode(context, skip_special_tokens=False):
            run.reverse()
            return context + run[len(run) - _incomplete_bytes(tokenizer, run) :], len(context)
    window = context + run[::-1]
    return window, len(window) - _incomplete_bytes(tokenizer, run[::-1])


def _incomplete_bytes(tokenizer: Tokenizer, run: list[int]) -> int:
    """How many byte tokens at the end of a run begin a character that further bytes could complete."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    utf8.decode(bytes(tokenizer.byte_value(token_id) or 0 for token_id in run))
    return len(utf8.getstate()[0])
