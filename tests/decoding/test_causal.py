"""What a decoder says of its rows with `causal` holds: attention may take a faster way on its word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tenants
from test_chains import ALL, params_of
from tiny import make_engine, run_all

from headrace.parts import DECODERS


@pytest.fixture(autouse=True)
def _tenants() -> Iterator[None]:
    with tenants.registered(*tenants.TENANTS.items()):
        yield


@pytest.mark.parametrize("evictor", ["full", "streaming_llm"])
@pytest.mark.parametrize("name", ALL)
def test_rows_of_causal_decoders_see_all_before_them(
    name: str, evictor: str, drafter: str, events: Counter[str]
) -> None:
    engine = make_engine(
        decoder=name,
        draft_tokens=3,
        draft_model=drafter,
        max_num_batched_tokens=7,
        evictor=evictor,
        cache_budget=9 if evictor != "full" else None,
        cache_interval=4,
    )
    if not engine.decoders[name].causal or engine.decoders[name].tree:
        events["decoders that are not causal"] += 1
        return
    events.update({"chains": 0, "chains behind slots": 0})
    outs = engine.runner._outs

    def checked(granted: Any, rows: Any, segments: Any) -> Any:
        for group in engine.runner.target.groups:
            for first, size, committed in engine.runner.chains(granted, group):
                mine = slice(first, first + size)
                k = list(range(size))
                assert rows.dst[mine].tolist() == k
                assert rows.a[mine].tolist() == rows.b[mine].tolist() == [0] * size
                assert rows.c[mine].tolist() == [i + 1 for i in k]
                assert rows.bits[mine].tolist() == [-1] * size
                req = int(rows.req[first])
                assert rows.req[mine].tolist() == [req] * size
                assert int(engine.table.kv_len[group, req]) == committed
                events["chains"] += 1
                events["chains behind slots"] += committed > 0
        return outs(granted, rows, segments)

    engine.runner._outs = checked  # type: ignore[method-assign]
    for i in range(4):
        engine.add([5, 9, 7, 11, 4, 6, 8, 10 + i] * 3, params_of(i, max_tokens=12), request_id=str(i))
    run_all(engine)


def test_plain_decoding_and_chains_are_causal() -> None:
    """Their prompts are long, and the faster way is for them."""
    engine = make_engine(decoder=",".join(n for n in DECODERS.names() if n == "ngram"))
    assert all(decoder.causal for decoder in engine.decoders.values())
