"""Bodies of /v1/completions and /v1/chat/completions, read into `Work`.

Sources: OpenAI's API reference; vLLM's names for what goes beyond it. A field is read, or it is listed here as one
that changes no answer, or it is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, NoReturn

from headrace.checks import show, unknown, whole_number
from headrace.errors import RequestError, TokenizerError
from headrace.openai_api.work import Kind, Work
from headrace.params import CONSTRAINTS, SamplingParams
from headrace.text.tokenizer import Tokenizer
from headrace.text.tools import ToolFormat, choose_format, structural_tag

MAX_DEPTH = 128
"""Objects and lists inside each other in one body."""
MAX_PROMPTS = 2048
"""Prompts of one body of /v1/completions."""
MAX_TOP_LOGPROBS = 20

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_BOOL: Schema = {"type": "boolean"}
_INT: Schema = {"type": "integer"}
_OBJECT: Schema = {"type": "object"}

ENGINE_FIELDS: dict[str, str] = {
    spec.name: spec.metadata["help"]
    for spec in dataclasses.fields(SamplingParams)
    if spec.name not in ("logprobs", "prompt_logprobs", "detokenize")
}
"""Fields of `SamplingParams` that a body may have under their own names. Log-probs have OpenAI's forms here."""

IDLE_FIELDS: dict[str, str] = {
    "user": "who asks",
    "metadata": "notes of the caller",
    "safety_identifier": "who asks",
    "prompt_cache_key": "prefixes are found by their content",
    "prompt_cache_retention": "prefixes are kept as long as there is room",
    "service_tier": "there is one",
}
"""OpenAI's fields that change no answer: read by nobody."""

COMMON: dict[str, Schema] = {
    "model": _TEXT,
    "stream": _BOOL,
    "stream_options": {"type": "object", "properties": {"include_usage": _BOOL}, "additionalProperties": False},
    "response_format": {"type": "object", "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}}},
    "return_token_ids": _BOOL,
    "priority": _INT,
    "deadline_s": {"type": "number"},
}
COMPLETIONS: dict[str, Schema] = COMMON | {
    "prompt": {
        "anyOf": [
            _TEXT,
            {"type": "array", "items": _TEXT},
            {"type": "array", "items": _INT},
            {"type": "array", "items": {"type": "array", "items": _INT}},
        ]
    },
    "best_of": _INT,
    "echo": _BOOL,
    "logprobs": _INT,
    "suffix": {"type": "null"},
}
CHAT: dict[str, Schema] = COMMON | {
    "messages": {
        "type": "array",
        "items": {"type": "object", "properties": {"role": _TEXT, "content": _TEXT}, "required": ["role"]},
    },
    "max_completion_tokens": _INT,
    "logprobs": _BOOL,
    "top_logprobs": _INT,
    "tools": {"type": "array", "items": _OBJECT},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]},
    "parallel_tool_calls": _BOOL,
    "chat_template_kwargs": _OBJECT,
    "add_generation_prompt": _BOOL,
    "modalities": {"type": "array", "items": {"enum": ["text"]}},
    "store": _BOOL,
}

REFUSED: dict[str, str] = {
    "functions": "pass tools",
    "function_call": "pass tool_choice",
    "audio": "answers are text here",
    "prediction": "choose a speculative decoder when the server starts",
    "reasoning_effort": "pass chat_template_kwargs, where the chat template reads something like it",
    "verbosity": "say it in a message",
    "web_search_options": "nothing is searched here",
    "prompt_logprobs": "use echo with logprobs, or /generate",
    "detokenize": "answers are text here; use /generate for token ids alone",
}
"""Fields that others know and that cannot be had here, with the way out."""

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
EMPTY_MESSAGE_FIELDS = ("refusal", "audio", "annotations", "function_call")
"""Clients send answers back with these; they may be null or empty."""


def schema_of(kind: Kind) -> Schema:
    """JSON schema of a body, for the OpenAPI document."""
    table = COMPLETIONS if kind == "completions" else CHAT
    hints = typing.get_type_hints(SamplingParams)
    properties = {name: json_type(hints[name]) | {"description": text} for name, text in ENGINE_FIELDS.items()}
    properties |= {name: {"description": text} for name, text in IDLE_FIELDS.items()}
    properties |= table
    needed = ["prompt"] if kind == "completions" else ["messages"]
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def json_type(hint: Any) -> Schema:
    """JSON schema of an annotation of an option."""
    plain = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    if hint in plain:
        return {"type": plain[hint]}
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return {"type": "array", "items": json_type(inner[0])}
    if origin is dict:
        values = {} if inner[1] is Any else json_type(inner[1])
        return {"type": "object", "additionalProperties": values}
    return {"anyOf": [json_type(one) for one in inner]}


def read_json(data: bytes | str) -> Any:
    """The value of a JSON text, read strictly. Raises RequestError.

    Refused besides what is no JSON: other bytes than UTF-8, numbers that are no finite double, an object with a key
    twice, half of a surrogate pair, more than `MAX_DEPTH` levels.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 (byte {error.start}): encode it so") from error
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep: make it flatter")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError(f"the body is not JSON ({reason}{place}): {show(text)}") from error
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "the body has half of a surrogate pair, which UTF-8 cannot hold: decode the input with errors='replace'"
            ) from error
    return value


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _TOKENS.finditer(text):
        sign = match[0]
        if sign in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif sign in "]}":
            depth -= 1
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the body has an object with {show(twice)} twice: leave one out")
    return made


def _no_constant(name: str) -> NoReturn:
    raise RequestError(f"the body has {name}, which is no JSON: numbers are finite")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise RequestError(f"the body has the number {show(text)}, which is more than a double holds")
    return value


def parse(kind: Kind, body: Any, tokenizer: Tokenizer | None, *, tool_format: str | None = None) -> Work:
    """What a body asks for. Raises RequestError naming the field; of unknown fields the first.

    `tokenizer` renders chats; without one there are token ids only. `tool_format`: a name from docs/systems.md; if not
    given, known by the chat template. A field that is null counts as not given.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body is {show(body)}; it must be an object")
    table = COMPLETIONS if kind == "completions" else CHAT
    fields = {name: value for name, value in body.items() if value is not None}
    for name in fields:
        if name in REFUSED:
            raise RequestError(f"{name} cannot be had here: {REFUSED[name]}")
        if name not in table and name not in ENGINE_FIELDS and name not in IDLE_FIELDS:
            raise RequestError(unknown("field", name, [*table, *ENGINE_FIELDS, *IDLE_FIELDS]))
    given = {name: fields[name] for name in ENGINE_FIELDS if name in fields}
    work = _completions(fields, given) if kind == "completions" else _chat(fields, given, tokenizer, tool_format)
    work.model = _text(fields, "model")
    work.tokenizer = tokenizer
    work.stream = _flag(fields, "stream")
    work.include_usage = _usage_wanted(fields, work.stream)
    work.return_token_ids = _flag(fields, "return_token_ids")
    work.priority = _number(fields, "priority") or 0
    work.deadline_s = _seconds(fields, "deadline_s")
    return work


def _completions(fields: dict[str, Any], given: dict[str, Any]) -> Work:
    if "suffix" in fields:
        raise RequestError("suffix cannot be had here: write the prompt in the model's own form for filling in")
    best_of, n = _number(fields, "best_of"), given.get("n", 1)
    if best_of is not None and best_of != n:
        raise RequestError(f"best_of is {best_of} and n is {show(n)}: ask for n and choose among them; leave it out")
    echo, top = _flag(fields, "echo"), _number(fields, "logprobs")
    if echo and top is not None and fields.get("stream"):
        raise RequestError("logprobs of an echo come with whole answers: set stream to false, or leave one out")
    if echo and given.get("truncate_prompt_tokens") is not None:
        raise RequestError("truncate_prompt_tokens is given beside echo: cut the prompt before sending")
    given |= {"logprobs": top} | ({"prompt_logprobs": top} if echo else {})
    given |= _format_constraint(fields.get("response_format"), given)
    prompts = _prompts(fields.get("prompt"))
    return Work("completions", None, prompts, SamplingParams.from_dict(given), echo=echo, top_logprobs=top)


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    if prompt is None:
        raise RequestError("prompt is missing: give a text, token ids, or a list of such")
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt is {show(prompt)}; it must be a text, token ids, or a list of such")
    if all(isinstance(one, str) for one in prompt):
        found = [{"prompt": one} for one in prompt]
    elif all(whole_number(one) is not None for one in prompt):
        return [{"prompt_token_ids": prompt}]
    elif all(isinstance(one, list) for one in prompt):
        for place, one in enumerate(prompt):
            for token in one:
                if whole_number(token) is None:
                    raise RequestError(f"prompt[{place}] has {show(token)}; token ids are whole numbers")
        found = [{"prompt_token_ids": one} for one in prompt]
    else:
        raise RequestError(f"prompt is {show(prompt)}; all its entries must be texts, or token ids, or lists of ids")
    if len(found) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(found)} entries; at most {MAX_PROMPTS} go into one request: send several")
    return found


def _chat(fields: dict[str, Any], given: dict[str, Any], tokenizer: Tokenizer | None, tool_format: str | None) -> Work:
    if tokenizer is None:
        raise RequestError("chats need the tokenizer's template: start without skip_tokenizer_init, or send token ids")
    if _flag(fields, "store"):
        raise RequestError("store is true, and nothing is stored here: leave it out")
    if fields.get("modalities", ["text"]) != ["text"]:
        raise RequestError(f'modalities is {show(fields["modalities"])}; answers are text here: pass ["text"]')
    limit = _number(fields, "max_completion_tokens")
    if limit is not None and given.get("max_tokens", limit) != limit:
        raise RequestError(
            f"max_completion_tokens is {limit} and max_tokens is {show(given['max_tokens'])}, its older name: give one"
        )
    given["max_tokens"] = given.get("max_tokens") if limit is None else limit
    top = _number(fields, "top_logprobs")
    if top is not None and not _flag(fields, "logprobs"):
        raise RequestError("top_logprobs is given without logprobs: set logprobs to true")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs is {show(top)}; it must be between 0 and {MAX_TOP_LOGPROBS}")
    if _flag(fields, "logprobs"):
        top = top or 0
        given["logprobs"] = top
    given |= _format_constraint(fields.get("response_format"), given)
    reader, tools, hidden, one_call = _tools(fields, given, tokenizer, tool_format)
    variables = fields.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise RequestError(f"chat_template_kwargs is {show(variables)}; it must be an object")
    messages = _messages(fields.get("messages"))
    prompt_wanted = _flag(fields, "add_generation_prompt", default=True)
    try:
        ids = tokenizer.encode_chat(messages, prompt_wanted, tools, variables)
    except TokenizerError as error:
        raise RequestError(str(error)) from error
    work = Work("chat", None, [{"prompt_token_ids": ids}], SamplingParams.from_dict(given), top_logprobs=top)
    work.tools, work.hidden, work.one_call = reader, hidden, one_call
    return work


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {show(messages)}; it must be a list of at least one message")
    return [_message(place, message) for place, message in enumerate(messages)]


def _message(place: int, message: Any) -> dict[str, Any]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where} is {show(message)}; it must be an object with role and content")
    plain = {name: value for name, value in message.items() if value is not None}
    for name in list(plain):
        if name in EMPTY_MESSAGE_FIELDS:
            if plain.pop(name):
                raise RequestError(f"{where}.{name} cannot be had here: chats are text; leave it out")
        elif name not in MESSAGE_FIELDS:
            raise RequestError(unknown(f"field of {where}", name, MESSAGE_FIELDS))
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "\n".join(_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    calls = plain.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls is {show(calls)}; it must be a list")
        plain["tool_calls"] = [_past_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if plain.get("role") == "developer":
        plain["role"] = "system"  # OpenAI's newer name; templates know the older one
    return plain


def _part(where: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"{where} is {show(kind or part)}; parts of a content are text here: send text parts only")
    return str(part["text"])


def _past_call(where: str, call: Any) -> dict[str, Any]:
    """Templates write the arguments as an object; OpenAI's clients send them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} is {show(call)}; it must be an object with function, name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = read_json(arguments or "{}")
        except RequestError as error:
            raise RequestError(f"{where}.function.arguments: {error}") from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments is {show(arguments)}; it must be an object, or its JSON text")
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(
    fields: dict[str, Any], given: dict[str, Any], tokenizer: Tokenizer, tool_format: str | None
) -> tuple[ToolFormat | None, list[dict[str, Any]] | None, re.Pattern[str] | None, bool]:
    """Reader, tools for the template, what is hidden, and whether there may be one call only; sets the constraint."""
    tools = fields.get("tools") or None
    choice = fields.get("tool_choice")
    if tools is None:
        if choice not in (None, "none"):
            raise RequestError(f"tool_choice is {show(choice)} and there are no tools: pass tools, or leave it out")
        return None, None, None, False
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f"tools is {show(tools)}; it must be a list of objects")
    parallel = _flag(fields, "parallel_tool_calls", default=True)
    for place, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            raise RequestError(f"tools[{place}].type is {show(tool['type'])}; tools are functions here")
    if choice == "none":
        return None, None, None, False
    wanted: Any = choice or "auto"
    if not isinstance(wanted, (str, Mapping)):
        raise RequestError(f"tool_choice is {show(wanted)}; it must be a text, or an object that names a function")
    if given.get("skip_special_tokens") is False:
        raise RequestError(
            "skip_special_tokens is false beside tools, which need such tokens for themselves: leave it out"
        )
    for name in CONSTRAINTS:
        if given.get(name) is not None:
            said = "response_format" if fields.get("response_format") else name
            raise RequestError(f"{said} is given beside tools, which are a constraint too: give one of them")
    try:
        reader = choose_format(tool_format, tokenizer.chat_templates.source(with_tools=True))
    except TokenizerError as error:
        raise RequestError(str(error)) from error
    given["structural_tag"] = structural_tag(reader, tools, wanted, tokenizer.special_id, parallel=parallel)
    # Marks of calls may be special tokens: they have to be seen to be read.
    given["skip_special_tokens"] = False
    return reader, tools, _hidden(tokenizer, reader), not parallel or not isinstance(wanted, str)


def _hidden(tokenizer: Tokenizer, reader: ToolFormat) -> re.Pattern[str] | None:
    texts = {tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.special_ids}
    texts -= {reader.opening, reader.closing or "", ""}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def _format_constraint(wanted: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    if wanted is None:
        return {}
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return {}
    beside = next((name for name in CONSTRAINTS if name in given), None)
    if beside is not None:
        raise RequestError(f"response_format and {beside} are given: one constraint at a time; leave out one of them")
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema":
        raise RequestError(f"response_format is {show(wanted)}; its type must be text, json_object or json_schema")
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, (dict, bool)):
        raise RequestError('response_format has no schema: write {"json_schema": {"name": .., "schema": {..}}}')
    return {"json_schema": schema}


def _usage_wanted(fields: dict[str, Any], stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options is given without stream: set stream to true, or leave it out")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options is {show(options)}; it must be an object")
    for name, value in options.items():
        if name != "include_usage" and value:
            raise RequestError(f"stream_options.{name} cannot be had here; known: include_usage")
    return _flag(options, "include_usage")


def _flag(fields: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {show(value)}; it must be true or false")
    return value


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} is {show(value)}; it must be a text")
    return value


def _number(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {show(value)}; it must be a whole number")
    return value


def _seconds(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{name} is {show(value)}; it must be a number of seconds")
    try:
        return float(value)
    except OverflowError as error:
        raise RequestError(f"{name} is more than a double holds: lower it") from error
