"""Constrained generation: outputs that keep to a JSON schema, a regular expression, a grammar or a list of choices.

xgrammar (Dong et al., arXiv 2411.15100) compiles what is asked for and says which tokens may come next, as a mask of
bits. Under speculation each drafted token is accepted on trial and taken back, so that every draw has the mask that it
would have alone, and a draft that the grammar refuses is never drawn.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headrace.errors import InvariantError, RequestError, TokenizerError
from headrace.params import CONSTRAINTS, SamplingParams
from headrace.request import Request
from headrace.sampling.json_schema import check_schema
from headrace.sampling.patterns import check_pattern
from headrace.sampling.processors import PROCESSORS, LogitProcessor, Setup

MAX_SPACES = 16
"""Most white space between two parts of a JSON text: without a bound an output need never end."""
CACHE_BYTES = 2**28
"""Compiled grammars that are kept."""
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")
EVERYTHING = -1
"""A word of the mask in which all tokens are allowed."""


@PROCESSORS.register(
    "constraints",
    label="exact",
    summary="Only what keeps to a JSON schema, regular expression, grammar or list of choices may be drawn.",
    source="xgrammar, arXiv 2411.15100",
    option="json_schema=, regex=, grammar=, choice=, structural_tag=",
    example={"regex": "[a-f]{4,12}"},
    composes="everything that leaves it an end: no min_tokens, no ignore_eos without stop_token_ids",
)
class Constraints(LogitProcessor):
    """logits[v] = -inf for tokens that no output of the grammar goes on with; a stop token only where it may end."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._grammars: _Grammars | None = None
        self._lock = threading.Lock()
        self._trials: dict[int, _Trial] = {}

    def wants(self, params: SamplingParams) -> bool:
        """A constraint is given."""
        return params.constraint is not None

    def prepare(self, params: SamplingParams, stop_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Compile. Raises RequestError for what cannot be kept, is not understood, has no end, or is not kept by the
        output so far."""
        if not stop_ids:
            raise RequestError(
                f"{params.constraint} needs a token that ends the output: leave out ignore_eos, or give stop_token_ids"
            )
        matcher = self._matcher(params, stop_ids)
        mask = torch.zeros(1, self._words, dtype=torch.int32)
        matcher.fill_next_token_bitmask(mask)
        if not mask.any():
            raise RequestError(f"{params.constraint} cannot be met: no token of the vocabulary can begin an output")
        for place, token in enumerate(output_ids):
            if matcher.is_terminated() or not matcher.accept_token(token):
                raise RequestError(
                    f"the record's output does not keep to its {params.constraint}: token {token} at {place} is none "
                    "that it allows: take the record as it was exported"
                )

    def admit(self, request: Request) -> None:
        """Begin, and take what is out already."""
        trial = self._trials[request.index] = _Trial(self._matcher(request.params, request.stop_ids))
        for token in request.output_ids:
            trial.take(token)

    def release(self, index: int) -> None:
        """Forget the request."""
        self._trials.pop(index, None)

    def apply(self, logits_MV: Tensor, rows: Sequence[int], indices: Sequence[int], path_ML: Tensor) -> None:
        """Mask, all rows in one operation."""
        import xgrammar

        # Row by row that of the logits: the library takes one index for both.
        mask_MW = torch.full((logits_MV.shape[0], self._words), EVERYTHING, dtype=torch.int32)
        if not path_ML.shape[1] and len(set(indices)) == len(indices):
            # One call for all: the library fills them in threads.
            matchers = [self._trials[index].matcher for index in indices]
            self._library("").batch.batch_fill_next_token_bitmask(matchers, mask_MW, list(rows))
        else:
            paths = path_ML[list(rows)].tolist()
            for row, index, path in zip(rows, indices, paths, strict=True):
                self._trials[index].fill(mask_MW, row, [token for token in path if token >= 0])
            for index in dict.fromkeys(indices):
                self._trials[index].back_to(0)
        xgrammar.apply_token_bitmask_inplace(logits_MV, mask_MW.to(logits_MV.device), indices=list(rows))

    def observe(self, index: int, token: int) -> None:
        """One token further."""
        self._trials[index].take(token)

    @property
    def _words(self) -> int:
        return -(-self.setup.vocab_size // 32)

    def _matcher(self, params: SamplingParams, stop_ids: Sequence[int]) -> Any:
        kind = params.constraint
        assert kind is not None
        grammar = self._library(kind).compile(kind, getattr(params, kind))
        import xgrammar  # here and below: an extra that may be absent, and slow to import

        return xgrammar.GrammarMatcher(grammar, override_stop_tokens=list(stop_ids))

    def _library(self, kind: str) -> _Grammars:
        """The compiler for this vocabulary; made when the first request needs it. Raises RequestError."""
        with self._lock:
            if self._grammars is None:
                self._grammars = _Grammars(self.setup, kind)
            return self._grammars


class _Grammars:
    """Compiled grammars of one vocabulary, shared by its requests. Safe in any thread."""

    def __init__(self, setup: Setup, kind: str) -> None:
        """`kind` is what a refusal names. Raises RequestError without library or tokenizer."""
        try:
            import xgrammar
        except ImportError as error:
            raise RequestError(f"{kind} needs the library xgrammar: pip install 'headrace[constraints]'") from error
        if setup.spellings is None:
            raise RequestError(f"{kind} needs the tokenizer: leave out skip_tokenizer_init")
        try:
            spellings = list(setup.spellings())[: setup.vocab_size]
        except TokenizerError as error:
            raise RequestError(f"{kind} cannot be used with this tokenizer: {error}") from error
        self._spellings, self._vocab_size = spellings, setup.vocab_size
        self._compilers: dict[bool, Any] = {}
        self.batch = xgrammar.BatchGrammarMatcher()
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, kind: str, value: Any) -> Any:
        """The compiled grammar; the last ones are kept up to `CACHE_BYTES`. Raises RequestError."""
        try:
            key = json.dumps([kind, value])
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{kind} cannot be written as JSON ({_reason(error)}): correct it") from error
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        try:
            made = _COMPILE[kind](self._compiler(json_only=kind == "json_schema"), value)
        except RequestError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise RequestError(f"{kind} is not understood or cannot be met ({_reason(error)}): correct it") from error
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > 1 and sum(g.memory_size_bytes for g in self._kept.values()) > CACHE_BYTES:
                self._kept.popitem(last=False)
        return made

    def _compiler(self, *, json_only: bool) -> Any:
        """A compiler over all tokens, or over those that JSON may hold.

        In strings of a bounded length the library allows control characters as they are, which is no JSON. Outside
        strings none is needed but the line feed, which it keeps out of strings.
        """
        import xgrammar

        with self._lock:
            if json_only not in self._compilers:
                # Empty spellings, and ids behind the tokenizer's last, are never allowed. Special tokens get one that
                # is no UTF-8: then a structural tag can name them by id, and no text contains them.
                known = [b"" if json_only and _CONTROL.search(text) else text or b"\xff" for text in self._spellings]
                info = xgrammar.TokenizerInfo(
                    known, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=[]
                )
                self._compilers[json_only] = xgrammar.GrammarCompiler(info, cache_enabled=False)
            return self._compilers[json_only]


def _reason(error: Exception) -> str:
    """What the library says, without the places in its source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[-1].rpartition(".cc:")[2].partition(": ")[2] or lines[-1]).strip()


class _Trial:
    """The matcher of a request, and the drafted tokens that it took on trial."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher
        self._ahead: list[int] = []

    def take(self, token: int) -> None:
        """A token that is out for good. Raises InvariantError for one that the grammar refuses."""
        if self.matcher.is_terminated() or not self.matcher.accept_token(token):
            raise InvariantError(f"token {token} was drawn although the constraint refuses it")

    def fill(self, mask: Tensor, place: int, path: Sequence[int]) -> None:
        """The mask of a draw behind a path of drafted tokens, int32 [.., words]; where the path is refused, so that the
        draw is never looked at, it stays as it is."""
        common = 0
        while common < min(len(path), len(self._ahead)) and path[common] == self._ahead[common]:
            common += 1
        self.back_to(common)
        for token in path[common:]:
            if self.matcher.is_terminated() or not self.matcher.accept_token(token):
                return
            self._ahead.append(token)
        if not self.matcher.is_terminated():
            self.matcher.fill_next_token_bitmask(mask, place)

    def back_to(self, count: int) -> None:
        """Take back all but the first tokens of the trial."""
        if len(self._ahead) > count:
            self.matcher.rollback(len(self._ahead) - count)
            del self._ahead[count:]


def _from_schema(compiler: Any, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"json_schema is no JSON ({error}): correct it, or pass a dict") from error
    check_schema(value)
    return compiler.compile_json_schema(json.dumps(value), max_whitespace_cnt=MAX_SPACES)


def _from_regex(compiler: Any, value: str) -> Any:
    check_pattern(value, "regex")
    return compiler.compile_regex(value)


def _from_choice(compiler: Any, value: Sequence[str]) -> Any:
    return compiler.compile_grammar(f"root ::= {' | '.join(json.dumps(text, ensure_ascii=False) for text in value)}")


def _from_tag(compiler: Any, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"structural_tag is no JSON ({error}): correct it, or pass a dict") from error
    _check_tag(value)
    return compiler.compile_structural_tag(json.dumps(value))


def _check_tag(node: Any) -> None:
    """Raises RequestError for schemas and patterns in a structural tag that the library would not keep."""
    if isinstance(node, dict) and node.get("type") == "json_schema":
        check_schema(node.get("json_schema"))
    elif isinstance(node, dict):
        if node.get("type") == "regex":
            check_pattern(node.get("pattern"), "structural_tag: pattern")
        for part in node.values():
            _check_tag(part)
    elif isinstance(node, list):
        for part in node:
            _check_tag(part)


_COMPILE: dict[str, Callable[[Any, Any], Any]] = {
    "json_schema": _from_schema,
    "regex": _from_regex,
    "grammar": lambda compiler, value: compiler.compile_grammar(value),
    "choice": _from_choice,
    "structural_tag": _from_tag,
}
assert set(_COMPILE) == set(CONSTRAINTS)
