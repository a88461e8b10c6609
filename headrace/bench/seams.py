"""`headrace bench seams`: the price of the seams, plain decoding through the engine against a loop written by hand.

The loop knows one method, one kind of cache and a batch that never changes: it fills the rows, runs the same model over
the same kernels, draws, and appends; on a GPU its step is one recorded graph, and it reads the tokens of a step while
the next one runs. What the engine needs beyond it is what schedulers, decoders, policies and books cost a step. Both
decode the same requests in turn, a block of steps each; the figure is the median of paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.bench.report import headline, machine, table
from headrace.bench.workload import uniform
from headrace.engine.engine import Engine
from headrace.kernels.attention import AttentionRows, attend, plan_attention, write_kv
from headrace.kernels.draw import DrawParams, draw
from headrace.kernels.place import place
from headrace.kernels.turn import turn as turn_and_write
from headrace.llm import LLM
from headrace.params import SamplingParams
from headrace.step import Turn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="requests that decode together")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt (default: 128)")
    parser.add_argument("--steps", type=int, default=12, help="steps of a block (default: 12)")
    parser.add_argument("--repeats", type=int, default=20, help="pairs of blocks (default: 20)")
    parser.add_argument("--device", default="auto", help="where to run (default: auto)")
    parser.add_argument("--model", help="directory or hub id of a checkpoint (default: the bundled model)")
    parser.add_argument("--load-format", default="auto", help="random: random weights of the right shapes")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="cache of each of the two (default: 1)")
    parser.add_argument("--markdown", type=Path, help="also write the report to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status."""
    rows = []
    for size in arguments.batch_sizes:
        print(f"[{size} requests]", file=sys.stderr, flush=True)
        # The loop takes over where nothing is running.
        ours, theirs = _prefilled(arguments, size, None), Loop(_prefilled(arguments, size, False))
        blocks = range(arguments.repeats + 1)
        pairs = [(_seconds(ours.step, arguments.steps), _seconds(theirs.step, arguments.steps)) for _ in blocks]
        pairs = pairs[1:]  # the first pair warms up
        known = [r.output_ids for r in ours.running]  # on a GPU one step is still running
        if [tokens[: len(mine)] for tokens, mine in zip(theirs.outputs(), known, strict=True)] != known:
            raise RuntimeError("engine and loop decoded different tokens; the figure would mean nothing")
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append(
            {
                "requests": size,
                "engine, ms a step": 1e3 * statistics.median(a for a, _ in pairs) / arguments.steps,
                "loop, ms a step": 1e3 * statistics.median(b for _, b in pairs) / arguments.steps,
                "price of the seams": f"{ratio - 1:+.1%}",
            }
        )
    text = (
        f"{headline(machine())}\n\nPlain decoding, {arguments.model or 'bundled model'}, greedy, prompts of "
        f"{arguments.prompt} tokens; median "
        f"of {arguments.repeats} pairs of {arguments.steps} steps.\n\n{table(rows)}"
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(f"# Price of the seams: `headrace bench seams`\n\n{text}\n", encoding="utf-8")
    return 0


def _seconds(step: object, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        step()  # type: ignore[operator]
    return time.perf_counter() - start


def _prefilled(arguments: argparse.Namespace, size: int, ahead: bool | None) -> Engine:
    """An engine whose requests have their prompts behind them and one new token each."""
    length = arguments.prompt + (arguments.repeats + 2) * arguments.steps
    llm = LLM(
        model=arguments.model,
        load_format=arguments.load_format,
        device=arguments.device,
        kv_cache_gib=arguments.kv_cache_gib,
        async_scheduling=ahead,
        skip_tokenizer_init=True,
        max_num_seqs=size,
        max_model_len=length + 8,
        max_num_batched_tokens=2048,
    )
    engine = llm.engine
    engine.on_token = None
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True, detokenize=False)
    for i, work in enumerate(uniform(size, arguments.prompt, arguments.prompt, engine.vocab_size)):
        engine.add(work.prompt_ids, params, request_id=str(i))
    while not all(r.pending == 1 for r in engine.running) or engine.n_waiting:
        engine.step()
    return engine


class Loop:
    """Plain decoding by hand, over the tables and pages of an engine that is left alone from now on."""

    def __init__(self, engine: Engine) -> None:
        self.model, self.cache, self.table = engine.model, engine.cache, engine.table
        self.requests = engine.running
        for request in self.requests:
            engine.cache.reserve(request, engine.max_model_len - request.n_done)
        engine.cache.flush()
        device = engine.device
        count = len(self.requests)
        self.reqs_B = torch.tensor([r.index for r in self.requests], device=device)
        self.tok_B = torch.tensor([r.tokens[-1] for r in self.requests], device=device)
        self.t_B = torch.tensor([r.n_done for r in self.requests], dtype=torch.int32, device=device)
        self.n_done = [r.n_done for r in self.requests]
        zero_B = torch.zeros(count, dtype=torch.int32, device=device)
        self.rows = AttentionRows(
            self.reqs_B.int(),
            self.t_B,
            zero_B,
            zero_B,
            zero_B + 1,
            torch.arange(count + 1, dtype=torch.int32, device=device),
            self.reqs_B.int(),
            joined=True,
            few=True,
        )
        table = self.table
        self.params = DrawParams(*(x[self.reqs_B] for x in (table.temperature, table.top_k, table.top_p, table.min_p)))
        self.stream_B2 = table.stream[self.reqs_B]
        self.page_table_BP = self.cache.page_table_GBP[0]
        self.kv_len_B = table.kv_len[0]
        self.soft_SE = None
        self.turns = device.type == "cuda"
        self.out: list[list[int]] = [list(r.output_ids) for r in self.requests]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._landing: tuple[Tensor, torch.cuda.Event] | None = None

    @property
    def pos_AR(self) -> Tensor:
        """One axis."""
        return self.t_B[None]

    def attend(
        self, layer: int, q_RHD: Tensor, k_RKD: Tensor, v_RKD: Tensor, *, turn: Turn | None = None, **options: Any
    ) -> Tensor:
        """What the layers call; `options` are those of the kernel."""
        k_KPSD, v_KPSD = self.cache.layer_pools(layer)
        if turn is None:
            write_kv(k_RKD, v_RKD, k_KPSD, v_KPSD, self.place_B)
        else:
            turn_and_write(turn, k_KPSD, v_KPSD, self.place_B)
        tables = self.page_table_BP, self.kv_len_B
        out_RHD, _ = attend(q_RHD, self.rows, k_KPSD, v_KPSD, *tables, plan=self.plan, **options)
        return out_RHD

    @torch.inference_mode()
    def step(self) -> None:
        """One token for everybody."""
        if self.t_B.device.type == "cpu":
            self._device_step()
            self._append(self.tok_B)
            return
        if self._graph is None:
            self._device_step()
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._device_step()
        else:
            self._graph.replay()
        before = self._landing
        landed = torch.empty(self.tok_B.shape, dtype=self.tok_B.dtype, pin_memory=True)
        landed.copy_(self.tok_B, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._landing = landed, event
        self._land(before)

    def _land(self, landing: tuple[Tensor, torch.cuda.Event] | None) -> None:
        if landing is not None:
            landing[1].synchronize()
            self._append(landing[0])

    def _append(self, tok_B: Tensor) -> None:
        for out, token in zip(self.out, tok_B.tolist(), strict=True):
            out.append(token)

    def _device_step(self) -> None:
        size = self.cache.page_size
        self.place_B = place(self.rows.req_R, self.rows.b_R, self.kv_len_B, self.page_table_BP, size)
        lens = [(i, 1, n + 1) for i, n in enumerate(self.n_done)]
        self.plan = plan_attention(self.rows, self.page_table_BP, self.kv_len_B, size, lens)
        hidden_BE = self.model(self.tok_B, self)
        logits_BV = self.model.logits(hidden_BE)
        drawn = draw(logits_BV if logits_BV.is_cuda else logits_BV.float(), self.params, self.stream_B2, self.t_B + 1)
        self.tok_B.copy_(drawn.id_M)
        self.t_B += 1
        self.kv_len_B[self.reqs_B] += 1
        self.n_done = [n + 1 for n in self.n_done]

    def outputs(self) -> list[list[int]]:
        """Tokens after the prompts."""
        self._land(self._landing)
        self._landing = None
        return self.out
