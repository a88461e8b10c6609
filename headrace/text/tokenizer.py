"""The tokenizer of a checkpoint directory: text to token ids and back, special tokens, end tokens, chat templates.

Reads the files of the Hugging Face layout (tokenizer.json, tokenizer_config.json, special_tokens_map.json,
generation_config.json, chat_template.jinja). tokenizer.json is the authority on ids: whether a beginning-of-text token
is prepended is decided by its post-processor, as in transformers 5; `add_bos_token` in other files changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from headrace.checks import show
from headrace.errors import RequestError, TokenizerError
from headrace.text.chat import ChatTemplates, Message

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A loaded tokenizer. Read-only after loading and safe to use from several threads.

    Attributes
    ----------
    vocab_size: tokens known, added ones included. The model's own vocabulary may be padded to more.
    special_ids: ids that `skip_special_tokens` leaves out.
    special_tokens: names to texts, e.g. {"bos_token": "<s>"}.
    bos_id: id of the beginning-of-text token, None if there is none.
    eos_ids: every id that ends a generation, ascending: the tokenizer's own and those of generation_config.json.
    chat_templates: the checkpoint's templates; empty (false) if it has none.
    is_byte_level: tokens are spelled in bytes and text is their UTF-8 decoding.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        origin: str = "the tokenizer",
    ) -> None:
        # Padding and truncation saved in tokenizer.json are settings of some training run, not of the vocabulary.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = self._named_id("bos_token")
        own_eos = self._named_id("eos_token")
        self.eos_ids = sorted({*eos_ids, *([] if own_eos is None else [own_eos])})
        self.chat_templates = ChatTemplates(chat_templates or {}, self.special_tokens, origin)
        decoders = _decoder_types(backend)
        self.is_byte_level = bool(decoders) and decoders[0] == "ByteLevel" and set(decoders) <= {"ByteLevel", "Fuse"}
        self._has_byte_fallback = "ByteFallback" in decoders
        self._bytes: dict[int, bytes] = {}
        self._byte_values: dict[int, int | None] = {}

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Load from a model directory.

        Raises TokenizerError if the directory or its tokenizer.json is missing or damaged.
        """
        directory = Path(path)
        try:
            return cls._from_files(directory)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            # Every file has its own sentence; this one is for entries of the wrong kind inside them.
            raise TokenizerError(
                f"the tokenizer's files in {directory} cannot be used ({type(error).__name__}: {error}): download them "
                "again"
            ) from error

    @classmethod
    def _from_files(cls, directory: Path) -> Tokenizer:
        backend = _load_backend(directory)
        config = _read_json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # such files are complete; older ones keep the names beside them
            config = {**config, **_read_json(directory / "special_tokens_map.json")}
        named, listed = _special_tokens(config)
        _add_missing(backend, config.get("added_tokens_decoder") or {}, [*named.values(), *listed])
        return cls(
            backend,
            special_tokens=named,
            eos_ids=_generation_eos_ids(directory),
            chat_templates=_chat_templates(directory, config),
            origin=str(directory),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises RequestError if it is not valid Unicode text."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of many texts, encoded in parallel. Each equals what `encode` gives for it."""
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise RequestError(
                    f"text {index} is a {type(text).__name__}: pass a str, or token ids as prompt_token_ids"
                )
            if not text.isascii():
                _check_unicode(index, text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Ids beyond the vocabulary add nothing; broken UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells a token; None beyond the vocabulary."""
        spelled: str | None = self._backend.id_to_token(token_id)
        return spelled

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary; None if there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token of a byte-level vocabulary stands for; empty beyond the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.token(token_id) or ""
            try:
                known = bytes(_BYTE_OF_LETTER[letter] for letter in token)
            except KeyError:  # an added token is kept as text
                known = token.encode()
            self._bytes[token_id] = known
        return known

    def byte_value(self, token_id: int) -> int | None:
        """The byte of a byte-fallback token such as <0xE4>; None for every other token."""
        if not self._has_byte_fallback:
            return None
        if token_id not in self._byte_values:
            match = _BYTE_TOKEN.fullmatch(self.token(token_id) or "")
            self._byte_values[token_id] = int(match[1], 16) if match else None
        return self._byte_values[token_id]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; see `ChatTemplates.render` for arguments and errors."""
        return self.chat_templates.render(messages, add_generation_prompt, tools, variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's token ids of a conversation. The template writes the special tokens, so none are added."""
        text = self.apply_chat_template(messages, add_generation_prompt, tools, variables)
        return self.encode(text, add_special_tokens=False)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)


def _letters_of_bytes() -> dict[str, int]:
    """Byte-level vocabularies spell a byte as one printable letter; bytes without one take letters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _letters_of_bytes()


def _check_unicode(index: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text {index} has the lone surrogate {text[error.start]!r} at character {error.start}, which UTF-8 cannot "
            "hold: decode the input with errors='replace'"
        ) from error


def _decoder_types(backend: tokenizers.Tokenizer) -> list[str]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return [part["type"] for part in parts]


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON ({error}): download or copy the file again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a JSON {type(content).__name__} and not an object: download the file again")
    return content


def _load_backend(directory: Path) -> tokenizers.Tokenizer:
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory: pass the directory that holds the model's files")
    if not path.is_file():
        if (directory / "tokenizer.model").is_file():
            raise TokenizerError(
                f"{directory} has a tokenizer.model and no tokenizer.json: convert it once with "
                "transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
        raise TokenizerError(
            f"{path} is missing: copy it from the model's repository, or pass skip_tokenizer_init=True and token ids"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{path} cannot be read by tokenizers {tokenizers.__version__} ({error}): download the file again, "
            "or upgrade tokenizers if the checkpoint is newer"
        ) from error


def _token_text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Special tokens that have a name (bos_token, image_token ...), and those that are only listed."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, (list, Mapping)):
        raise TokenizerError(f"the special tokens of tokenizer_config.json are {show(extra)}: they must be a list")
    named_values = {key: value for key, value in config.items() if key.endswith("_token")}
    if isinstance(extra, Mapping):
        named_values |= extra
    named = {key: text for key, value in named_values.items() if (text := _token_text(value))}
    listed = [] if isinstance(extra, Mapping) else [text for value in extra if (text := _token_text(value))]
    return named, listed


def _add_missing(backend: tokenizers.Tokenizer, added: Mapping[str, Any], special: Sequence[str]) -> None:
    """Tokens that only the configuration knows get the next ids, in the order in which transformers adds them."""
    if not isinstance(added, Mapping) or not all(
        str(token_id).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str)
        for token_id, token in added.items()
    ):
        raise TokenizerError(
            f"added_tokens_decoder of tokenizer_config.json is {show(added)}: it must be an object from token ids to "
            "objects with content"
        )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing: dict[str, tokenizers.AddedToken] = {}
    for _, token in sorted(added.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            flags = {
                key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in token
            }
            missing[token["content"]] = tokenizers.AddedToken(token["content"], **flags)
    for text in special:
        if text not in known:
            missing.setdefault(text, tokenizers.AddedToken(text, special=True))
    backend.add_tokens(list(missing.values()))


def _generation_eos_ids(directory: Path) -> list[int]:
    # Checkpoints without a generation_config.json keep the same field in config.json.
    path = directory / "generation_config.json"
    if not path.is_file():
        path = directory / "config.json"
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise TokenizerError(f"{path} has eos_token_id {show(value)}: it must be a token id or a list of token ids")
    return ids


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template files win over those inside tokenizer_config.json, as in transformers."""
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: _read_template(path) for name, path in files.items()}
    inside = config.get("chat_template")
    if isinstance(inside, str):
        return {"default": inside}
    if isinstance(inside, list) and all(isinstance(entry, Mapping) for entry in inside):
        inside = {entry.get("name"): entry.get("template") for entry in inside}
    if inside and not (
        isinstance(inside, Mapping) and all(isinstance(x, str) for pair in inside.items() for x in pair)
    ):
        raise TokenizerError(
            f"{directory / 'tokenizer_config.json'} has the chat_template {show(inside)}: it must be a text, or a list "
            "of objects with name and template"
        )
    return dict(inside or {})


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read as text ({error}): download the file again") from error
