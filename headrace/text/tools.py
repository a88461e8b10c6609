"""Tool calls: what a model may write to call a function, and how that is read back.

Each format is that of a family's chat templates. It gives a structural tag (the constraint under which text and calls
are drawn) and a reader for the finished text. The template itself writes the functions into the prompt.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from headrace.errors import RequestError, ToolCallError
from headrace.registry import Registry

ToolChoice = str | Mapping[str, Any]
"""`auto`: text or calls, as the model likes; `required`: at least one; {"function": name}: one call of that one."""

_JSON = json.JSONDecoder(strict=False)  # control characters in strings do no harm here


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for."""

    name: str
    arguments: dict[str, Any]


class Function(NamedTuple):
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any] | bool
    """JSON schema of the arguments."""


SpecialId = Callable[[str], int | None]
"""The id of a text that is a special token of the tokenizer, which letters cannot spell; None for any other text."""


class ToolFormat(ABC):
    """How the models of one family write calls."""

    marks: ClassVar[tuple[str, ...]]
    """Texts by which a chat template is known to want this format."""
    opening: ClassVar[str]
    """What stands in front of a call: the text before it is for the reader."""
    closing: ClassVar[str | None] = None
    """What stands behind a call, and text may follow; None: calls go to the end of the output."""

    @abstractmethod
    def tag(self, functions: Sequence[Function], *, must: bool, one: bool, special: SpecialId) -> dict[str, Any]:
        """The format of a structural tag. `must`: nothing but calls; `one`: a single call."""

    @abstractmethod
    def read(self, text: str) -> list[ToolCall]:
        """The calls of a finished output, special tokens included but the end token. Raises ToolCallError for a call
        that cannot be read, as one that was cut at `max_tokens`."""


TOOL_FORMATS: Registry[ToolFormat] = Registry("tool format", "tool_format")


NAME = '{"name": '
"""How a call begins in every format there is."""


@TOOL_FORMATS.register(
    "hermes",
    label="exact",
    summary='`<tool_call>{"name": .., "arguments": ..}</tool_call>`, any number of them.',
    source="Hermes 2 Pro, Qwen2.5 and Qwen3",
)
class Hermes(ToolFormat):
    """Calls between a pair of marks, anywhere in the text."""

    marks = ("<tool_call>",)
    opening, closing = "<tool_call>", "</tool_call>"

    def tag(self, functions: Sequence[Function], *, must: bool, one: bool, special: SpecialId) -> dict[str, Any]:
        """Marks that are special tokens are drawn as such."""
        opening, closing = special("<tool_call>"), special("</tool_call>")
        tags = []
        for function in functions:
            begin, body, end = "\n" + _beginning(function, "arguments"), _arguments(function), "}\n"
            if opening is None:
                tags.append(_tag("<tool_call>" + begin, body, end + "</tool_call>"))
            else:
                inner = _sequence(_text(begin), body, _text(end))
                tags.append(_tag(_token(opening), inner, "</tool_call>" if closing is None else _token(closing)))
        if must:
            return _row(tags, "\n", one)
        if opening is None:
            return _triggered("<tool_call>", tags, one=one)
        return _behind_text(_row(tags, "\n", one))

    def read(self, text: str) -> list[ToolCall]:
        """Behind every opening mark stands a call."""
        calls = []
        at = text.find("<tool_call>")
        while at >= 0:
            value, end = _value(text, at + len("<tool_call>"))
            calls.append(_call(value, "arguments"))
            closing = text.find("</tool_call>", end)
            if closing < 0 or text[end:closing].strip():
                raise ToolCallError(f"a tool call has no </tool_call> behind it: {text[at : end + 40]!r}")
            at = text.find("<tool_call>", closing)
        return calls


@TOOL_FORMATS.register(
    "llama3_json",
    label="exact",
    summary='`{"name": .., "parameters": ..}` as the whole output, one call.',
    source="Llama 3.1 and 3.2",
)
class Llama3Json(ToolFormat):
    """The output is a call, or it is text."""

    marks = ("<|python_tag|>", "Environment: ipython")
    opening = NAME

    def tag(self, functions: Sequence[Function], *, must: bool, one: bool, special: SpecialId) -> dict[str, Any]:
        """A name in front tells a call from text."""
        tags = [_tag(_beginning(function, "parameters"), _arguments(function), "}") for function in functions]
        return _row(tags, "", one=True) if must else _triggered(NAME, tags, one=True)

    def read(self, text: str) -> list[ToolCall]:
        """The call may stand behind text, and nothing behind it."""
        at = text.find(NAME)
        if at < 0:
            return []
        value, end = _value(text, at)
        if text[end:].strip():
            raise ToolCallError(f"text follows the tool call: {text[end : end + 40]!r}")
        return [_call(value, "parameters")]


@TOOL_FORMATS.register(
    "mistral",
    label="exact",
    summary='`[TOOL_CALLS] [{"name": .., "arguments": ..}, ..]` at the end of the output.',
    source="Mistral 7B v0.3, Nemo and Small",
)
class Mistral(ToolFormat):
    """A list of calls behind one mark."""

    marks = ("[TOOL_CALLS]",)
    opening = "[TOOL_CALLS]"

    def tag(self, functions: Sequence[Function], *, must: bool, one: bool, special: SpecialId) -> dict[str, Any]:
        """The mark is a special token of its tokenizers."""
        mark = special("[TOOL_CALLS]")
        calls = [_tag(_beginning(function, "arguments"), _arguments(function), "}") for function in functions]
        body = _sequence(_optional(_text(" ")), _text("["), _row(calls, ", ", one))
        tag = _tag("[TOOL_CALLS]" if mark is None else _token(mark), body, "]")
        if must:
            return tag
        if mark is None:
            return _triggered("[TOOL_CALLS]", [tag], one=True)
        return _behind_text(tag)

    def read(self, text: str) -> list[ToolCall]:
        """The list is the end of the text."""
        _, mark, rest = text.partition("[TOOL_CALLS]")
        if not mark:
            return []
        value, end = _value(rest, 0)
        if not isinstance(value, list) or rest[end:].strip():
            raise ToolCallError(f"behind [TOOL_CALLS] stands no list of calls alone: {rest[:80]!r}")
        return [_call(item, "arguments") for item in value]


def choose_format(name: str | None, template: str) -> ToolFormat:
    """The named format, or the one whose marks stand in the chat template. Raises RequestError."""
    if name is not None:
        if name not in TOOL_FORMATS.names():
            raise RequestError(f"tool_format is {name!r}; known: {', '.join(TOOL_FORMATS.names())}")
        return TOOL_FORMATS[name].make()
    for part in TOOL_FORMATS:
        found = part.make()
        if any(mark in template for mark in found.marks):
            return found
    raise RequestError(
        "the chat template does not tell how the model writes tool calls: pass tool_format, one of "
        f"{', '.join(TOOL_FORMATS.names())}"
    )


def structural_tag(
    tool_format: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: ToolChoice,
    special: SpecialId,
    *,
    parallel: bool = True,
) -> dict[str, Any]:
    """The constraint for an answer with these tools, in OpenAI's form; `parallel`: several calls may stand in one
    answer. Raises RequestError."""
    functions = [_function(index, tool) for index, tool in enumerate(tools)]
    names = [function.name for function in functions]
    if not functions:
        raise RequestError("tools is empty: leave it out")
    if len(set(names)) < len(names):
        raise RequestError(f"tools name {sorted(n for n in names if names.count(n) > 1)[0]!r} twice: rename one")
    must = choice != "auto"
    one = not isinstance(choice, str) or not parallel
    if isinstance(choice, str):
        if choice not in ("auto", "required"):
            raise RequestError(
                f'tool_choice is {choice!r}; it must be "auto", "required" or {{"function": name}}; for no calls leave '
                "out the tools"
            )
    else:
        wanted = choice.get("function") if isinstance(choice, Mapping) else None
        wanted = wanted.get("name") if isinstance(wanted, Mapping) else wanted
        if wanted not in names:
            raise RequestError(f"tool_choice names {wanted!r}; the tools are {', '.join(names)}")
        functions = [function for function in functions if function.name == wanted]
    return {"type": "structural_tag", "format": tool_format.tag(functions, must=must, one=one, special=special)}


def _function(index: int, tool: Mapping[str, Any]) -> Function:
    body = tool.get("function") if isinstance(tool, Mapping) else None
    name = body.get("name") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(name, str) or not name:
        raise RequestError(
            f'tools[{index}] is {tool!r:.60}; pass {{"type": "function", "function": {{"name": .., "parameters": ..}}}}'
        )
    parameters = body.get("parameters", {"type": "object", "properties": {}, "additionalProperties": False})
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise RequestError(f"the parameters of tool {name!r} must be a JSON schema of type object")
    return Function(name, parameters)


def _value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value behind a place, and where it ends."""
    while text[start : start + 1].isspace():
        start += 1
    try:
        return _JSON.raw_decode(text, start)
    except ValueError as error:
        raise ToolCallError(
            f"a tool call is no whole JSON ({error}): {text[start : start + 80]!r}; if it was cut, raise max_tokens"
        ) from error


def _call(value: Any, key: str) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(value.get(key), dict):
        raise ToolCallError(f"a tool call has no name and {key}: {json.dumps(value):.80}")
    return ToolCall(value["name"], value[key])


def _beginning(function: Function, key: str) -> str:
    """A call up to its arguments, which stand under `key`."""
    return f'{NAME}{json.dumps(function.name)}, "{key}": '


def _arguments(function: Function) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": function.parameters, "max_whitespace_cnt": 16}


def _text(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def _token(token_id: int) -> dict[str, Any]:
    return {"type": "token", "token": token_id}


def _sequence(*elements: dict[str, Any]) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


def _tag(begin: str | dict[str, Any], content: dict[str, Any], end: str | dict[str, Any]) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _optional(content: dict[str, Any]) -> dict[str, Any]:
    return {"type": "optional", "content": content}


def _behind_text(content: dict[str, Any]) -> dict[str, Any]:
    """Any text, and perhaps calls at its end."""
    return _sequence({"type": "any_text"}, _optional(content))


def _triggered(trigger: str, tags: list[dict[str, Any]], *, one: bool) -> dict[str, Any]:
    """Any text; where the trigger appears in it, a call has begun."""
    return {"type": "triggered_tags", "triggers": [trigger], "tags": tags, "stop_after_first": one}


def _row(tags: list[dict[str, Any]], separator: str, one: bool) -> dict[str, Any]:
    """Calls and nothing else."""
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": one,
    }
