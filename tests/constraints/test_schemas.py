"""200 random schemas through the bundled model: every output comes to its end and validates."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from typing import Any

import jsonschema
from random_schemas import random_schema

from headrace import LLM, SamplingParams

SCHEMAS = 200
PROMPT = "def load(path):\n    return "


def _nodes(schema: Any) -> list[dict[str, Any]]:
    found = [schema] if isinstance(schema, dict) else []
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return found + [node for part in parts for node in _nodes(part)]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name came twice"
    return dict(pairs)


def test_outputs_validate(llm: LLM, events: Counter[str]) -> None:
    kinds = "$ref anyOf oneOf enum const pattern maxLength minItems prefixItems minProperties exclusiveMinimum".split()
    events.update(dict.fromkeys([*kinds, "greedy", "sampled", "speculated", "nested object"], 0))
    rng = random.Random(0)
    assert llm.tokenizer is not None
    blank = [token for token, text in enumerate(llm.tokenizer.spellings()) if text and not text.strip()]
    schemas = [random_schema(rng) for _ in range(SCHEMAS)]
    params = [
        SamplingParams(
            json_schema=schema if i % 2 else json.dumps(schema),
            temperature=[0.0, 1.0][rng.random() < 0.7],
            max_tokens=400,
            seed=i,
            # A small model likes to fill the room between two parts, which takes long.
            logit_bias=dict.fromkeys(blank, -20.0),
            decoder=["autoregressive", "autoregressive", "ngram"][i % 3],
        )
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate([PROMPT] * SCHEMAS, params)
    for schema, one, output in zip(schemas, params, outputs, strict=True):
        (sample,) = output.outputs
        assert sample.finish_reason == "stop", (schema, sample.text)
        jsonschema.Draft202012Validator(schema).validate(json.loads(sample.text, object_pairs_hook=_distinct))
        events["greedy" if one.greedy else "sampled"] += 1
        events["speculated"] += one.decoder == "ngram"
        nodes = _nodes(schema)
        events["nested object"] += sum(node.get("type") == "object" for node in nodes) > 1
        for kind in kinds:
            events[kind] += any(kind in node for node in nodes)
    llm.engine.check_idle()
    # The same alone, and from a mixed batch.
    for i in range(0, SCHEMAS, 40):
        alone = llm.generate(PROMPT, dataclasses.replace(params[i], decoder="draft_model"))[0].outputs[0]
        assert alone.token_ids == outputs[i].outputs[0].token_ids
