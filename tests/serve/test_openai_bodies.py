"""Bodies of OpenAI's API to work: what is read, what is refused and with which words, and strict JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import RequestError, UnknownModelError
from headrace.llm import BUNDLED_MODEL
from headrace.openai_api import parse, read_json
from headrace.openai_api.bodies import CHAT, COMPLETIONS, ENGINE_FIELDS, schema_of
from headrace.openai_api.work import Work
from headrace.text.chat import ChatTemplates
from headrace.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer.from_dir(BUNDLED_MODEL)
    made.chat_templates = ChatTemplates({"default": TEMPLATE}, made.special_tokens, "the test")
    return made


def chat(tokenizer: Tokenizer, **fields: Any) -> Work:
    return parse("chat", {"messages": [{"role": "user", "content": "hi"}], **fields}, tokenizer)


@pytest.mark.parametrize(("prompt", "count"), [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2)], ids=str)
def test_prompts_of_all_four_forms(prompt: Any, count: int) -> None:
    work = parse("completions", {"model": "m", "prompt": prompt, "n": 2, "best_of": 2, "user": "u"}, None)
    assert len(work.prompts) == count
    assert work.params.n == 2
    assert work.params.max_tokens == 16
    assert work.model == "m"


def test_engine_parameters_by_their_names() -> None:
    body = {"prompt": "a", "top_k": 5, "min_p": 0.1, "logit_bias": {"7": -100}, "stop": "x", "seed": 3, "priority": 2}
    work = parse("completions", {**body, "deadline_s": 1, "temperature": None}, None)
    params = work.params
    assert (params.top_k, params.min_p, params.logit_bias, params.stop_strings) == (5, 0.1, {7: -100.0}, ("x",))
    assert (work.priority, work.deadline_s, params.temperature) == (2, 1.0, 1.0)


def test_log_probs_of_an_echo() -> None:
    work = parse("completions", {"prompt": "a", "echo": True, "logprobs": 2}, None)
    assert (work.params.logprobs, work.params.prompt_logprobs, work.top_logprobs) == (2, 2, 2)


def test_every_field_of_the_engine_is_read_or_refused() -> None:
    """A parameter that the engine gains later is in the schema, or somebody has decided against it."""
    known = set(schema_of("completions")["properties"])
    assert set(ENGINE_FIELDS) <= known
    assert {"prompt", "stream", "stream_options"} <= known
    json.dumps(schema_of("chat"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt is missing"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of is 3"),
    ({"prompt": "a", "max_tokns": 3}, "did you mean 'max_tokens'"),
    ({"prompt": "a", "max_tokens": "3"}, "max_tokens is '3'"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1"),
    ({"prompt": "a", "temperature": 10**400}, "temperature"),
    ({"prompt": "a", "n": 0}, "n is 0"),
    ({"prompt": "a", "stream": 1}, "stream is 1"),
    ({"prompt": "a", "stream_options": {}}, "without stream"),
    ({"prompt": "a", "stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"prompt": [1, "a"]}, "all its entries"),
    ({"prompt": []}, "prompt is []"),
    ({"prompt": [[1], ["a"]]}, "prompt[1] has 'a'"),
    ({"prompt": {"a": 1}}, "prompt is {'a': 1}"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
    ({"prompt": "a", "response_format": {"type": "json_object"}, "regex": "a"}, "one constraint"),
    ({"prompt": "a", "detokenize": False}, "detokenize"),
    ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "logprobs of an echo"),
    ({"prompt": "a", "functions": []}, "pass tools"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_completions_are_named(body: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse("completions", body, None)
    assert words in str(caught.value)


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages is []"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0] is 'image_url'"),
    ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0] 'mood'"),
    ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ({"messages": ["a"]}, "messages[0] is 'a'"),
    ({"top_logprobs": 2}, "without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "between 0 and 20"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "give one"),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tools": [{"type": "search"}]}, "tools[0].type"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "'sub'"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "beside tools"),
    ({"tools": [TOOL], "skip_special_tokens": False}, "beside tools"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"store": True}, "stored"),
    ({"chat_template_kwargs": {"thinking": True}}, "thinking"),
    ({"reasoning_effort": "low"}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_CHATS, ids=[words for _, words in BAD_CHATS])
def test_bad_chats_are_named(fields: dict[str, Any], words: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError) as caught:
        chat(tokenizer, **fields)
    assert words in str(caught.value)


def test_a_chat_is_rendered(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    work = parse("chat", {"messages": messages, "max_completion_tokens": 5}, tokenizer)
    text = tokenizer.decode(work.prompts[0]["prompt_token_ids"])
    assert text.startswith("system: be brief\nuser: a\nb\nassistant: ")
    assert '"arguments": {"a": 1}' in text
    assert work.params.max_tokens == 5
    assert chat(tokenizer).params.max_tokens is None


def test_tools_set_the_constraint(tokenizer: Tokenizer) -> None:
    work = chat(tokenizer, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "add"}})
    assert work.tools is not None
    assert work.params.structural_tag is not None
    assert work.one_call
    assert not work.params.skip_special_tokens
    assert chat(tokenizer, tools=[TOOL], tool_choice="none").tools is None
    single = chat(tokenizer, tools=[TOOL], parallel_tool_calls=False).params.structural_tag
    assert isinstance(single, dict)
    assert single["format"]["stop_after_first"]


def test_no_template_is_a_request_error() -> None:
    bare = Tokenizer.from_dir(BUNDLED_MODEL)
    with pytest.raises(RequestError, match="does not tell how the model writes tool calls"):
        chat(bare, tools=[TOOL])
    with pytest.raises(RequestError, match="does not read tools"):
        parse("chat", {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}, bare, tool_format="hermes")
    bare.chat_templates = ChatTemplates({}, {}, "the test")
    with pytest.raises(RequestError, match="no chat template"):
        chat(bare)
    with pytest.raises(RequestError, match="skip_tokenizer_init"):
        parse("chat", {"messages": []}, None)


def test_model_names() -> None:
    work = parse("completions", {"prompt": "a", "model": "sql"}, None)
    assert work.for_model(["base"], ["sql"]).params.adapter == "sql"
    assert work.for_model(["sql"], []).params.adapter is None
    with pytest.raises(UnknownModelError, match="'sql'"):
        work.for_model(["base"], ["other"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "double"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "levels deep"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_strict_json(data: bytes, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_json(data)
    assert words in str(caught.value)


def test_brackets_in_texts_are_no_depth() -> None:
    assert read_json(json.dumps({"a": "[{" * 500})) == {"a": "[{" * 500}
    assert read_json(b'"\\ud83d\\ude00"') == "\U0001f600"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


SEEN: Counter[str] = Counter()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    fields=st.dictionaries(st.sampled_from([*COMPLETIONS, *CHAT, *ENGINE_FIELDS]), VALUES, max_size=3),
    prompt=st.just("a") | VALUES,
)
def test_any_value_is_read_or_refused_in_words(fields: dict[str, Any], prompt: Any, tokenizer: Tokenizer) -> None:
    """Nothing but RequestError comes out, for any JSON value in any field."""
    for kind, extra in (("completions", {"prompt": prompt}), ("chat", {"messages": [{"role": "u", "content": "a"}]})):
        try:
            SEEN[kind] += len(parse(kind, {**extra, **fields}, tokenizer).prompts)  # type: ignore[arg-type]
        except RequestError as error:
            SEEN["refused in words"] += bool(str(error))


def test_that_property_met_both() -> None:
    print(dict(SEEN))
    assert all(SEEN[name] for name in ("completions", "chat", "refused in words"))
