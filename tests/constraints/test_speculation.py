"""Speculation under a constraint equals plain decoding under it, token for token, whatever is drafted."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import tenants
from tiny import SPELLINGS, VOCAB, make_engine, run_all
from torch import Tensor

from headrace import LLM
from headrace.params import SamplingParams
from headrace.sampling import constraints
from headrace.step import Commit

GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[a-m]{3,12}(:[0-9]{1,3}){0,3}"},
    {"regex": "(ab|cd|12)+\\."},
    {"grammar": 'root ::= "[" item ("," item)* "]"\nitem ::= root | [a-f] | "null"'},
    {"json_schema": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]}}},
    {"choice": ["abcabcabc", "abab", "cd12", "null"]},
]
DECODERS = ["ngram", *(name for name in tenants.TENANTS if name != "test_soft")]


def requests() -> list[tuple[tuple[int, ...], SamplingParams]]:
    rng = random.Random(1)
    return [
        (
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))),
            SamplingParams(temperature=temperature, seed=seed, max_tokens=24, n=1 + seed % 2, **given),
        )
        for given in GRAMMARS
        for temperature in (0.0, 0.8)
        for seed in range(3)
    ]


@pytest.mark.parametrize("decoder", DECODERS)
def test_equals_plain(decoder: str, events: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = ["behind a draft", "draft accepted", "stopped"]
    events.update(dict.fromkeys([*counted, "draft refused by the grammar"], 0))
    fill = constraints._Trial.fill

    def counting(self: Any, mask: Tensor, row: int, path: Sequence[int]) -> None:
        fill(self, mask, row, path)
        events["behind a draft"] += bool(path)
        events["draft refused by the grammar"] += len(self._ahead) < len(path)

    with tenants.registered(*tenants.TENANTS.items()):
        plain = make_engine(decoder="autoregressive", num_pages=2000)
        work = requests()
        expected = [plain.add(p, params, request_id=str(i)) for i, (p, params) in enumerate(work)]
        run_all(plain)
        for (prompt, _), samples in zip(work, expected, strict=True):
            tenants.teach(prompt, tuple(samples[0].output_ids))
        monkeypatch.setattr(constraints._Trial, "fill", counting)
        engine = make_engine(decoder=decoder, num_pages=40, max_num_seqs=6, draft_tokens=4)
        chain = engine.decoders[decoder]
        resolve = chain.resolve

        def resolving(*args: Any) -> Commit:
            commit = resolve(*args)
            events["draft accepted"] += int((commit.n_emit - 1).clamp(min=0).sum())
            return commit

        monkeypatch.setattr(chain, "resolve", resolving)
        got = [engine.add(p, params, request_id=str(i)) for i, (p, params) in enumerate(work)]
        run_all(engine)
        engine.check_idle()
    if decoder in ("test_always_wrong",):
        events.pop("draft accepted")
    for one, other in zip(expected, got, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.output_ids, a.finish, a.stop_reason) == (b.output_ids, b.finish, b.stop_reason)
            assert b.error is None
            events["stopped"] += b.finish.reason == "stop"
            if a.finish.reason == "stop" and a.params.json_schema:
                json.loads(b"".join(SPELLINGS[token] for token in b.output_ids))


def test_the_bundled_draft_model(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    for temperature in (0.0, 0.8):
        params = [
            SamplingParams(json_schema=schema, temperature=temperature, seed=seed, max_tokens=60) for seed in range(6)
        ]
        prompts = ["import json\n\nconfig = "] * len(params)
        tokens = [
            [o.outputs[0].token_ids for o in llm.generate(prompts, [dataclasses.replace(p, decoder=d) for p in params])]
            for d in ("autoregressive", "draft_model", "ngram")
        ]
        assert tokens[0] == tokens[1] == tokens[2]
