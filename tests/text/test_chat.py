"""Chat templates: rendered as transformers renders them, refused with a sentence that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from headrace.errors import RequestError, TokenizerError
from headrace.text import ChatTemplates, Tokenizer

MakeDir = Callable[[str], Path]

# Written in the manner of the published families: headers and trimmed content, ChatML with tools, a tool_use template.
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
<|start_header_id|>system<|end_header_id|>

Today is {{ date_string }}.
{{ system }}<|eot_id|>
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant', 'ipython'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN = """\
{%- set ns = namespace(calls=0) %}
{%- if tools %}
    {{- '<|im_start|>system\\nYou may call:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {%- generation %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {%- set ns.calls = ns.calls + 1 %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}' }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'skip' %}
        {%- continue %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
{#- calls so far #}{% if ns.calls %}<!-- {{ ns.calls }} -->{% endif %}
"""

HERMES = [
    {
        "name": "default",
        "template": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    },
    {
        "name": "tool_use",
        "template": "{%- macro kind(spec) %}{{ spec.type }}{% if spec.enum %}{{ spec.enum | tojson }}{% endif %}"
        "{% endmacro %}{% for tool in tools %}{{ tool.name }}({% for key, spec in tool.parameters.items() %}"
        "{{ key }}: {{ kind(spec) }}{{ ', ' if not loop.last }}{% endfor %})\n{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    },
]

CALL = {
    "type": "function",
    "function": {"name": "find", "arguments": {"what": "Mühle ≥ 2 <b>", "n": 3, "deep": [None, True]}},
}
TOOLS = [
    {
        "name": "find",
        "description": "d'oh <&>",
        "parameters": {"what": {"type": "string", "enum": ["ä", "b"]}, "n": {"type": "int"}},
    }
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>&amp;</b> 'quoted' 你好 😀"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "\n hi \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}],
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "find it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "skip", "content": "x"},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "so", "tool_calls": [CALL, CALL["function"]]},
]


def _with_template(directory: Path, template: Any) -> Path:
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    return directory


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("kind", "template"), [("byte_level", LLAMA_3), ("byte_level_nfc", QWEN), ("byte_fallback", HERMES)]
)
def test_chats_equal_transformers(make_dir: MakeDir, kind: str, template: Any, add_generation_prompt: bool) -> None:
    directory = _with_template(make_dir(kind), template)
    tokenizer, reference = Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
    for chat in CHATS:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt)
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert text == expected
        ids = reference.apply_chat_template(chat, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert tokenizer.encode_chat(chat, add_generation_prompt) == ids


@pytest.mark.parametrize(("kind", "template"), [("byte_level_nfc", QWEN), ("byte_fallback", HERMES)])
def test_tools_equal_transformers(make_dir: MakeDir, kind: str, template: Any) -> None:
    directory = _with_template(make_dir(kind), template)
    tokenizer, reference = Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
    for chat in (CHATS[1], TOOL_CHAT) if template is QWEN else (CHATS[1],):
        text = tokenizer.apply_chat_template(chat, tools=TOOLS)
        assert text == reference.apply_chat_template(chat, tools=TOOLS, tokenize=False, add_generation_prompt=True)
        assert "find" in text


def test_variables_equal_transformers(make_dir: MakeDir) -> None:
    directory = _with_template(make_dir("byte_level_nfc"), QWEN)
    tokenizer, reference = Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(CHATS[0], variables={"enable_thinking": False})
    expected = reference.apply_chat_template(
        CHATS[0], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == expected
    assert "</think>" in text
    assert "</think>" not in tokenizer.apply_chat_template(CHATS[0])
    llama = ChatTemplates({"default": LLAMA_3}, {"bos_token": "<b>"}, "here")
    assert "Today is 1 May." in llama.render(CHATS[0], variables={"date_string": "1 May"})


def test_template_files_win_over_the_configuration(make_dir: MakeDir) -> None:
    directory = _with_template(make_dir("byte_level_nfc"), "from the configuration")
    assert Tokenizer.from_dir(directory).apply_chat_template(CHATS[0]) == "from the configuration"
    (directory / "chat_template.jinja").write_text("from the file")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    for loaded in (Tokenizer.from_dir(directory), AutoTokenizer.from_pretrained(directory)):
        options = {} if isinstance(loaded, Tokenizer) else {"tokenize": False}
        assert loaded.apply_chat_template(CHATS[0], **options) == "from the file"
        assert loaded.apply_chat_template(CHATS[0], tools=TOOLS, **options) == "find"


def test_no_template_and_no_default_are_explained(make_dir: MakeDir) -> None:
    tokenizer = Tokenizer.from_dir(make_dir("byte_level"))
    assert not tokenizer.chat_templates
    with pytest.raises(TokenizerError, match="has no chat template: pass the prompt as text"):
        tokenizer.apply_chat_template(CHATS[0])
    with pytest.raises(TokenizerError, match=r"templates \['other'\] and none named 'default'"):
        ChatTemplates({"other": "x"}, {}, "here").render(CHATS[0])
    with pytest.raises(TokenizerError, match="not valid Jinja: line 2"):
        ChatTemplates({"default": "\n{% if %}"}, {}, "here").render(CHATS[0])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str: pass a list of dicts"),
        ({"role": "user"}, "messages is a dict"),
        (["hello"], r"messages\[0\] is a str: pass a dict such as"),
        ([{"content": "x"}], r"messages\[0\] has role None"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"messages\[1\] \(role 'user'\) has no content"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\['content'\] is a list"),
        (
            [{"role": "user", "content": "x", "when": object()}],
            r"messages\[0\]\['when'\] is a object; templates see plain",
        ),
        ([{"role": "other", "content": "x"}], "refused these 1 messages: unknown role other"),
    ],
)
def test_messages_that_do_not_fit_are_refused(messages: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        ChatTemplates({"default": LLAMA_3}, {"bos_token": ""}, "here").render(messages)


def test_nothing_is_silently_ignored() -> None:
    llama = ChatTemplates({"default": LLAMA_3}, {"bos_token": ""}, "here")
    with pytest.raises(RequestError, match="1 tools were passed; chat template 'default' of here does not read tools"):
        llama.render(CHATS[0], tools=TOOLS)
    with pytest.raises(RequestError, match=r"'enable_thinking' is not read .* it reads \['date_string'"):
        llama.render(CHATS[0], variables={"enable_thinking": True})
    with pytest.raises(RequestError, match="'messages' has an argument of its own"):
        llama.render(CHATS[0], variables={"messages": []})
    with pytest.raises(RequestError, match=r"tools\[0\] is a function: pass its JSON schema"):
        ChatTemplates({"default": QWEN}, {}, "here").render(CHATS[0], tools=[lambda: 0])  # type: ignore[list-item]


def test_templates_are_sandboxed() -> None:
    class Tampered(str):
        def __str__(self) -> str:
            return "blue"

    for source in (
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ):
        with pytest.raises(RequestError, match="refused these 1 messages"):
            ChatTemplates({"default": source}, {}, "here").render(CHATS[0])
    message = {"role": "user", "content": Tampered("red")}
    assert ChatTemplates({"default": "{{ messages[0].content }}"}, {}, "here").render([message]) == "red"
