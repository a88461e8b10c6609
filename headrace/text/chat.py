"""Chat templates: messages to one prompt text, with the Jinja dialect that Hugging Face checkpoints are written for.

Templates come with the checkpoint and are not trusted: they run in Jinja's immutable sandbox and see plain JSON data
only. A template that does not read what the caller passes (tools, a variable) is refused, never silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.checks import show
from headrace.errors import RequestError, TokenizerError

Message = Mapping[str, Any]
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")


class ChatTemplates:
    """The templates of one checkpoint, by name.

    Parameters
    ----------
    templates: name to Jinja source. "default" is used unless tools are passed and there is one named "tool_use".
    special_tokens: variables such as `bos_token` that every template may read.
    origin: where the templates come from, for messages.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], origin: str) -> None:
        self._sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        self._environment = _environment()
        self._compiled: dict[str, tuple[jinja2.Template, set[str]]] = {}

    def __bool__(self) -> bool:
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. Encode it without special tokens: the template writes its own.

        Parameters
        ----------
        messages: at least one {"role": str, "content": str}; other keys go to the template as they are. The content
            may be missing or None only beside "tool_calls".
        add_generation_prompt: end with the header that makes the model answer.
        tools: JSON schemas of functions, for templates that read tools.
        variables: further template variables, e.g. {"enable_thinking": False}. Only such as the template reads.

        Raises
        ------
        TokenizerError: there is no template, or it is not valid Jinja.
        RequestError: the messages, tools or variables do not fit, or the template refuses them.
        """
        try:
            checked = [_check_message(i, message) for i, message in enumerate(_as_sequence("messages", messages))]
        except RecursionError as error:
            raise RequestError("messages hold a list or dict inside itself: pass plain JSON data") from error
        if not checked:
            raise RequestError("messages is empty: a chat needs at least one message")
        schemas = (
            None if tools is None else [_check_tool(i, tool) for i, tool in enumerate(_as_sequence("tools", tools))]
        )
        name = self._choose(with_tools=schemas is not None)
        template, readable = self._compile(name)
        extra = self._check_variables(variables or {}, readable)
        if schemas and "tools" not in readable:
            raise RequestError(
                f"{len(schemas)} tools were passed; chat template {name!r} of {self._origin} does not read tools: "
                "leave them out, or describe them in the system message"
            )
        context = {"documents": None, **self._special_tokens, **extra}
        try:
            return template.render(
                messages=checked, tools=schemas, add_generation_prompt=add_generation_prompt, **context
            )
        except Exception as error:  # a template may do anything that Python can refuse
            raise RequestError(
                f"chat template {name!r} of {self._origin} refused these {len(checked)} messages: {error}. "
                "Change their roles or order, or pass the prompt as text"
            ) from error

    def _choose(self, with_tools: bool) -> str:
        if not self._sources:
            raise TokenizerError(
                f"{self._origin} has no chat template: pass the prompt as text, use an instruction-tuned checkpoint, "
                "or put a chat_template.jinja into the model directory"
            )
        if with_tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" not in self._sources:
            raise TokenizerError(
                f"{self._origin} has chat templates {sorted(self._sources)} and none named 'default': "
                "save the one to use as chat_template.jinja in the model directory"
            )
        return "default"

    def _compile(self, name: str) -> tuple[jinja2.Template, set[str]]:
        if name not in self._compiled:
            source = self._sources[name]
            try:
                readable = meta.find_undeclared_variables(self._environment.parse(source))
                self._compiled[name] = self._environment.from_string(source), readable
            except jinja2.TemplateSyntaxError as error:
                raise TokenizerError(
                    f"chat template {name!r} of {self._origin} is not valid Jinja: line "
                    f"{error.lineno}: {error.message}. Repair it in the model directory, or pass the prompt as text"
                ) from error
        return self._compiled[name]

    def _check_variables(self, variables: Mapping[str, Any], readable: set[str]) -> dict[str, Any]:
        for name in variables:
            if name in _OWN_VARIABLES:
                raise RequestError(f"template variable {name!r} has an argument of its own: pass it there")
            if name not in readable:
                known = sorted(
                    readable - set(_OWN_VARIABLES) - set(self._special_tokens) - {*self._environment.globals}
                )
                raise RequestError(
                    f"template variable {name!r} is not read by the chat template of {self._origin}; it reads {known}: "
                    "leave it out"
                )
        return {name: _plain(f"template variable {name!r}", value) for name, value in variables.items()}


def _as_sequence(what: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(f"{what} is a {type(value).__name__}: pass a list of dicts")
    return value


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(
            f'{where} is a {type(message).__name__}: pass a dict such as {{"role": "user", "content": "..."}}'
        )
    # Clients send "content": null beside tool calls; templates test for the key and would print None.
    plain = {key: _plain(f"{where}[{key!r}]", value) for key, value in message.items() if value is not None}
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where} has role {show(role)}: pass a name such as 'system', 'user' or 'assistant'")
    if content is None and not plain.get("tool_calls"):
        raise RequestError(f"{where} (role {role!r}) has no content: pass a string, which may be empty")
    if content is not None and not isinstance(content, str):
        raise RequestError(f"{where}['content'] is a {type(content).__name__}; chats are text here: pass a string")
    return plain


def _check_tool(index: int, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise RequestError(f"tools[{index}] is a {type(tool).__name__}: pass its JSON schema as a dict")
    return {key: _plain(f"tools[{index}][{key!r}]", value) for key, value in tool.items()}


def _plain(where: str, value: Any) -> Any:
    """Rebuild a value from plain JSON types: objects with methods have no business inside an untrusted template."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # the base type's own method: a subclass such as an enum prints something else
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(where, key): _plain(f"{where}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{where}[{index}]", item) for index, item in enumerate(value)]
    raise RequestError(
        f"{where} is a {type(value).__name__}; templates see plain JSON data: pass text, numbers, lists, dicts"
    )


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training masks. For generation only its content matters."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares the attribute so)

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
