"""Tool calls in the format of each family: drawn under the constraint, read back, and refused where they cannot be."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from walker import TOKENS, constraints, walk

from headrace import LLM, SamplingParams
from headrace.errors import RequestError, ToolCallError
from headrace.text.chat import ChatTemplates
from headrace.text.tools import TOOL_FORMATS, ToolCall, ToolFormat, choose_format, structural_tag

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "ask_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"enum": ["C", "F"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop_all"}},
]
CHOICES: list[Any] = [
    "auto",
    "required",
    {"function": "stop_all"},
    {"type": "function", "function": {"name": "ask_weather"}},
]
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]


def valid(calls: list[ToolCall]) -> bool:
    schema = TOOLS[0]["function"]["parameters"]
    for call in calls:
        if call.name == "ask_weather":
            jsonschema.validate(call.arguments, schema)
        else:
            assert call == ToolCall("stop_all", {})
    return bool(calls)


@pytest.mark.parametrize("special", [False, True], ids=["spelled", "special tokens"])
@pytest.mark.parametrize("name", TOOL_FORMATS.names())
def test_random_outputs_are_read(name: str, special: bool) -> None:
    """Walks through the constraint: what ends is read, holds calls where they must be, and their arguments validate."""
    tokens = [*TOKENS, *MARKS]
    spelled = [*TOKENS, *([b""] * 3 if special else [mark.encode() for mark in MARKS])]
    part = constraints(spelled)
    texts = [token if isinstance(token, bytes) else token.encode() for token in tokens]

    def special_id(text: str) -> int | None:
        return tokens.index(text) if special and text in MARKS else None

    tool_format = TOOL_FORMATS[name].make()
    for choice in CHOICES:
        tag = structural_tag(tool_format, TOOLS, choice, special_id)
        found = []
        for seed in range(12):
            output = walk(SamplingParams(structural_tag=tag), random.Random(seed), spelled, part=part, texts=texts)
            if output is None:
                continue
            try:
                calls = tool_format.read(output.decode(errors="replace"))
            except ToolCallError:
                assert choice == "auto", output  # text that looks like a mark
                continue
            assert valid(calls) or choice == "auto"
            if isinstance(choice, dict):
                assert len(calls) == 1
            found += [call.name for call in calls]
        if choice == "required":
            assert set(found) == {"ask_weather", "stop_all"}
        elif choice != "auto":
            assert set(found) == {"stop_all" if choice == CHOICES[2] else "ask_weather"}


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("hermes", "no call", []),
        ("hermes", 'Let me see.<tool_call>\n{"name": "a", "arguments": {"x": "</tool_call>"}}\n</tool_call>',
         [ToolCall("a", {"x": "</tool_call>"})]),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}</tool_call>\n<tool_call>{"arguments": {"y": [1]}, '
         '"name": "b"}</tool_call>', [ToolCall("a", {}), ToolCall("b", {"y": [1]})]),
        ("llama3_json", '{"name": "a", "parameters": {"x": 1}}', [ToolCall("a", {"x": 1})]),
        ("llama3_json", '<|python_tag|>{"name": "a", "parameters": {}}', [ToolCall("a", {})]),
        ("llama3_json", "It is warm.", []),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": "\t"}}]',
         [ToolCall("a", {}), ToolCall("b", {"x": "\t"})]),
        ("mistral", "nothing", []),
    ],
)  # fmt: skip
def test_reading(name: str, text: str, calls: list[ToolCall]) -> None:
    assert TOOL_FORMATS[name].make().read(text) == calls


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "a", "argum'),
        ("hermes", '<tool_call>{"name": "a", "arguments": {}}'),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("llama3_json", '{"name": "a", "parameters": {}} and so on'),
        ("llama3_json", '{"name": "a", "parameters": 3}'),
        ("mistral", '[TOOL_CALLS] {"name": "a", "arguments": {}}'),
        ("mistral", '[TOOL_CALLS] [{"name": "a"}]'),
    ],
)
def test_what_cannot_be_read(name: str, text: str) -> None:
    with pytest.raises(ToolCallError):
        TOOL_FORMATS[name].make().read(text)


def test_templates_tell_the_format() -> None:
    for name, template in [
        ("hermes", "{{ tools }}<tool_call>"),
        ("mistral", "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]"),
        ("llama3_json", "Environment: ipython"),
    ]:
        assert type(choose_format(None, template)) is type(TOOL_FORMATS[name].make())
        assert isinstance(choose_format(name, ""), ToolFormat)
    with pytest.raises(RequestError, match="tool_format"):
        choose_format(None, "{{ tools }}")
    with pytest.raises(RequestError, match="hermes, llama3_json, mistral"):
        choose_format("xml", "")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "auto", "empty"),
        ([{"name": "a"}], "auto", "tools\\[0\\]"),
        ([TOOLS[0], TOOLS[0]], "auto", "twice"),
        (TOOLS, "none", "tool_choice"),
        (TOOLS, {"function": "missing"}, "'missing'"),
        ([{"function": {"name": "a", "parameters": {"type": "string"}}}], "auto", "type object"),
    ],
)
def test_refusals(tools: Any, choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        structural_tag(TOOL_FORMATS["hermes"].make(), tools, choice, lambda text: None)


def test_chat_with_tools(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.tokenizer is not None
    template = "{{ messages[0].content }}{% for tool in tools or [] %}# {{ tool.function.name }}{% endfor %}\n"
    monkeypatch.setattr(llm.tokenizer, "chat_templates", ChatTemplates({"default": template}, {}, "test"))
    messages = [{"role": "user", "content": "weather = "}]
    params = SamplingParams(max_tokens=160, temperature=0.7, n=2, seed=3)
    for name in TOOL_FORMATS.names():
        forced = {"function": "ask_weather"}
        (output,) = llm.chat(messages, params, tools=TOOLS, tool_choice=forced, tool_format=name)
        for sample in output.outputs:
            assert sample.error is None
            assert valid(sample.tool_calls or [])
    (output,) = llm.chat(
        messages, SamplingParams(max_tokens=9), tools=TOOLS, tool_choice="required", tool_format="hermes"
    )
    assert isinstance(output.outputs[0].error, ToolCallError), "the call was cut"
    (output,) = llm.chat(messages, SamplingParams(max_tokens=4))
    assert output.outputs[0].tool_calls is None
    with pytest.raises(RequestError, match="regex is given beside tools"):
        llm.chat(messages, SamplingParams(regex="a"), tools=TOOLS, tool_format="hermes")
    with pytest.raises(RequestError, match="does not tell"):
        llm.chat(messages, tools=TOOLS)
    with pytest.raises(RequestError, match="none are passed"):
        llm.chat(messages, tool_format="hermes")
    bad = json.loads(json.dumps(TOOLS[:1]))
    bad[0]["function"]["parameters"]["properties"]["city"] = {"type": "string", "not": {"const": "x"}}
    with pytest.raises(RequestError, match="'not' at #/properties/city"):
        llm.chat(messages, tools=bad, tool_format="hermes")
    llm.engine.check_idle()
