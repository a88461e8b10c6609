"""The least time that work can take: bytes that must be read over bandwidth, operations over the matrix rate.

A step multiplies its rows with every weight, which takes the longer of reading the weights and of 2 operations a
weight and row; rows of a prompt need the head only at their end. Beside that, a row that decodes reads the keys and
values of its request (bytes / bandwidth), and rows of a prompt do 4 operations for each slot, query head and element,
half of them masked. Values are two bytes wide. Activations, norms, the embedding and the host count as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from headrace.bench.workload import Work

BYTES = 2
"""Of a weight, a key element or a value element, in bfloat16."""


class Device(NamedTuple):
    """What a GPU reached when it was measured."""

    name: str
    read_bytes_s: float
    flops_s: float


H200 = Device("NVIDIA H200", read_bytes_s=4.40e12, flops_s=791e12)
"""2026-11-22: reads, and a bfloat16 product of 8192^3."""


class Shape(NamedTuple):
    """What a geometry costs."""

    layer_weights: int
    """Weights of all layers that every row meets."""
    head_weights: int
    kv_bytes: int
    """Keys and values of a token in all layers."""
    query_elements: int
    """Elements of the queries of a token in all layers."""

    @property
    def weight_bytes(self) -> int:
        """Read by a decode step."""
        return BYTES * (self.layer_weights + self.head_weights)


def shape_of(config: dict[str, Any]) -> Shape:
    """The costs of a config.json of the Llama kind: grouped queries, gated MLP."""
    width, inner, depth = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = width * (queries + 2 * keys) + queries * width + 3 * width * inner
    return Shape(depth * layer, config["vocab_size"] * width, depth * 2 * keys * BYTES, depth * queries)


def decode_floor_s(shape: Shape, batch: int, context_tokens: int, output_tokens: int, device: Device = H200) -> float:
    """Seconds of a decode step of `batch` requests, at the middle of outputs behind equal contexts."""
    slots = batch * (context_tokens + (output_tokens - 1) / 2)
    linear_s = max(shape.weight_bytes / device.read_bytes_s, batch * shape.weight_bytes / BYTES * 2 / device.flops_s)
    return linear_s + slots * shape.kv_bytes / device.read_bytes_s


def work_floor_s(shape: Shape, works: Sequence[Work], device: Device = H200) -> float:
    """Seconds of requests that are all there at the start, as if prompt rows filled every step to the brim."""
    outputs = sum(work.output_tokens for work in works)
    steps = max(work.output_tokens for work in works)
    rows = sum(len(work.prompt_ids) for work in works) + outputs - len(works)
    linear_flops = 2.0 * (rows * shape.layer_weights + outputs * shape.head_weights)
    linear_s = max(steps * shape.weight_bytes / device.read_bytes_s, linear_flops / device.flops_s)
    prompt_flops = sum(2.0 * len(work.prompt_ids) ** 2 * shape.query_elements for work in works)
    slots = sum(sum(range(len(w.prompt_ids) + 1, len(w.prompt_ids) + w.output_tokens)) for w in works)
    return linear_s + prompt_flops / device.flops_s + slots * shape.kv_bytes / device.read_bytes_s
