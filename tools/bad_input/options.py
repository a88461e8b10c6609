"""What the options of an engine can have wrong, and what only looks wrong; and the command line."""

from __future__ import annotations

import json
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from headrace import AsyncLLM, SamplingParams
from headrace.config import EngineConfig
from headrace.errors import (
    CapacityError,
    ConfigError,
    HeadraceError,
    RequestError,
    TokenizerError,
)
from tools.bad_input.bench import MODEL_LEN, NAN, SMALL, Bench
from tools.bad_input.cases import Allowed, Case, Command


def _engine(name: str, error: type[HeadraceError] = ConfigError, **given: Any) -> Case:
    return Case(name, error, lambda b: b.start(**given))


ENGINE = [
    _engine("an unknown option", max_num_sequences=3),
    _engine("an unknown scheduler", scheduler="splitfuze"),
    _engine("an unknown decoder", decoder="autoregressive,n-gram"),
    _engine("an unknown evictor", evictor="keynorm"),
    _engine("an unknown codec", codec="int3"),
    _engine("an unknown selector", selector="qest"),
    _engine("an unknown device", device="gpu"),
    _engine("an unknown type", dtype="fp16"),
    _engine("an unknown load_format", load_format="dummy"),
    _engine("an unknown way of preemption", preemption="swp"),
    _engine("max_num_seqs 0", max_num_seqs=0),
    _engine("max_num_seqs a text", max_num_seqs="8"),
    _engine("page_size a fraction", page_size=4.5),
    _engine("page_size None", page_size=None),
    _engine("num_pages 1", num_pages=1),
    _engine("kv_cache_gib 0", kv_cache_gib=0, num_pages=None),
    _engine("kv_cache_gib NaN", kv_cache_gib=NAN, num_pages=None),
    _engine("gpu_memory_utilization above 1", gpu_memory_utilization=1.5),
    _engine("seed of more than 64 bits", seed=2**64),
    _engine("an empty model name", model=""),
    _engine("a model that is a number", model=5),
    _engine("two sizes of the cache", kv_cache_gib=1.0),
    _engine("max_model_len beyond the model", max_model_len=MODEL_LEN + 1),
    _engine("max_model_len beyond the cache", num_pages=3, max_model_len=MODEL_LEN),
    _engine("an evictor without a budget", evictor="key_norm"),
    _engine("a budget without an evictor", cache_budget=16),
    _engine("a budget below the evictor's least", evictor="key_norm", cache_budget=4),
    _engine("a selector without a budget", selector="quest"),
    _engine("a selector's budget without one", selector_budget=16),
    _engine("a selector beside an evictor", selector="quest", selector_budget=16, evictor="key_norm", cache_budget=16),
    _engine("swap space without swaps", preemption="recompute", swap_space_gib=1.0),
    _engine("swaps without space", preemption="swap", swap_space_gib=0),
    _engine("a drafting decoder without a model", decoder="draft_model"),
    _engine("a drafting model without its decoder", draft_model="somewhere"),
    _engine("a tokenizer and none", tokenizer="somewhere", skip_tokenizer_init=True),
    _engine("a revision of a directory", revision="main"),
    Case("max_queue 0", ConfigError, lambda b: AsyncLLM(str(b.model), max_queue=0, **SMALL)),
    Case("an unknown option of the configuration", ConfigError, lambda b: cast("Any", EngineConfig)(decoders="ngram")),
    Case("a text without a tokenizer", RequestError, lambda b: b.start(skip_tokenizer_init=True).generate("ab")),
    Case("chat without a tokenizer", TokenizerError, lambda b: b.start(skip_tokenizer_init=True).chat([])),
]
MEMORY = [
    _engine("kv_cache_gib beyond the machine", CapacityError, kv_cache_gib=100, num_pages=None),
    _engine("kv_cache_gib too small for a page", CapacityError, kv_cache_gib=1e-7, num_pages=None),
    _engine("swap_space_gib beyond the machine", CapacityError, swap_space_gib=100),
    _engine("num_pages beyond the machine", CapacityError, num_pages=10**9),
    _engine("page_size beyond the machine", CapacityError, page_size=10**9),
    _engine("max_num_seqs beyond the machine", CapacityError, max_num_seqs=10**9),
    Case(
        "a model bigger than the memory",
        CapacityError,
        lambda b: b.load(b.copy(hidden_size=10**6, intermediate_size=10**6), load_format="random"),
    ),
    Case("a cache too large to count", ConfigError, lambda b: b.start(num_pages=2**40)),
]
GOOD = b'{"prompt": "ab", "params": {"max_tokens": 2}}\n'
COMMANDS = [
    Command("an unknown command", 2, "genrate"),
    Command("an unknown flag", 2, "generate -p x --temprature 1"),
    Command("a value of the wrong type", 2, "generate -p x --max-tokens many"),
    Command("a value out of range", 2, "generate -p x --top-p 2"),
    Command("no prompt", 2, "generate"),
    Command("no such input", 2, "generate {dir}/none.jsonl"),
    Command("a line that is not JSON", 2, "generate {dir}/in.jsonl", GOOD + b"oops\n" + GOOD),
    Command("a line that is not UTF-8", 2, "generate {dir}/in.jsonl", b"\xff\n"),
    Command("a line nested too deeply", 2, "generate {dir}/in.jsonl", b"[" * 100_000),
    Command("a line without a prompt", 2, "generate {dir}/in.jsonl", b'{"text": "x"}\n'),
    Command(
        "a line with an unknown parameter", 2, "generate {dir}/in.jsonl", b'{"prompt": "a", "params": {"temp": 1}}\n'
    ),
    Command("two bad lines", 2, "generate {dir}/in.jsonl", b"1\n" + GOOD + b"2\n"),
    Command(
        "a line that the model refuses",
        2,
        "generate {dir}/in.jsonl {model}",
        GOOD + b'{"prompt_token_ids": [5, 999]}\n' + b'{"prompt": null}\n',
    ),
    Command("an output below a file", 2, "generate -p x -o {dir}/tiny/config.json/out"),
    Command("the input as the output", 2, "generate {dir}/in.jsonl -o {dir}/in.jsonl", GOOD),
    Command("a full device", 1, "generate -p x -o /dev/full {model}"),
    Command(
        "a request that fails",
        1,
        "generate {dir}/in.jsonl -o {dir}/out.jsonl {model}",
        b'{"prompt_token_ids": [263]}\n',
    ),
]


def _capped(bench: Bench) -> str:
    (output,) = bench.generate("ab", max_tokens=1000, ignore_eos=True)
    sample = output.outputs[0]
    whole = len(output.prompt_token_ids) + len(sample.token_ids)
    return f"the output ends where the model's {whole} tokens do, with the reason {sample.finish_reason!r}"


def _greedy(bench: Bench) -> str:
    llm = bench.start()
    with mock.patch("headrace.engine.engine.log.warning") as warning:
        for _ in range(2):
            (output,) = llm.generate("ab", SamplingParams(n=2, temperature=0.0, max_tokens=4))
    first, second = (sample.token_ids for sample in output.outputs)
    assert first == second
    assert warning.call_count == 1
    said = warning.call_args.args
    return f"it runs, and the log says once: {said[0] % said[1:]}"


def _nothing(bench: Bench) -> str:
    (output,) = bench.generate("ab", max_tokens=0)
    return f"{len(output.outputs[0].token_ids)} tokens, with the reason {output.outputs[0].finish_reason!r}"


def _foreign(bench: Bench) -> str:
    plain = bench.generate([5, 6, 7], seed=1)[0].outputs[0].token_ids
    array = np.array([5, 6, 7])
    for ids in (array, list(array), torch.tensor([5, 6, 7]), {"prompt_token_ids": array}):
        assert bench.generate(ids, seed=np.uint64(1), max_tokens=np.int32(4))[0].outputs[0].token_ids == plain
    return "they are whole numbers like Python's own"


def _aborts(bench: Bench) -> str:
    return f"nothing: {bench.llm.engine.abort('unknown')}"


def _larger(bench: Bench) -> str:
    path = bench.copy()
    more = [f"<{letter}>" for letter in "abcdefg"]
    (path / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": more}))
    with mock.patch("headrace.llm.log.warning") as warning:
        llm = bench.load(path)
    said = warning.call_args.args
    assert llm.generate("ab", SamplingParams(max_tokens=1))[0].finished
    try:
        llm.generate("<g>", SamplingParams(max_tokens=1))
    except RequestError as error:
        return f"it runs, and the log says: {said[0] % said[1:]}; such a prompt: {error}"
    raise AssertionError("a token beyond the model's vocabulary was taken")


ALLOWED = [
    Allowed("prompt and max_tokens together longer than the model", _capped),
    Allowed("max_tokens 0", _nothing),
    Allowed("n above 1 with temperature 0", _greedy),
    Allowed("no prompts: an empty list", lambda b: f"no outputs: {b.llm.generate([])}"),
    Allowed("numbers and arrays of numpy and torch", _foreign),
    Allowed("the abort of an id that nobody has", _aborts),
    Allowed("a tokenizer that knows more tokens than the model", _larger),
]
