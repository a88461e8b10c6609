"""What is to be beaten on a GPU: the peer's figures and our goals, by geometry and figure."""

from __future__ import annotations

from typing import NamedTuple

PEER = "vLLM 0.25.1 (torch 2.11.0+cu130, FlashAttention 3, CUDA graphs, async scheduling)"
PEER_MACHINE = "NVIDIA H200"
PEER_DATE = "2026-11-22"


class Target(NamedTuple):
    """A peer's figure and the goals, nearest first, in the unit of the figure."""

    peer: float | None
    goals: tuple[float, ...]


TARGETS: dict[tuple[str, str], Target] = {
    # Milliseconds a token.
    ("llama-3.1-8b", "decode 1 x 1024"): Target(4.77, (3.9,)),
    ("llama-3.1-8b", "decode 8 x 1024"): Target(5.13, (4.2,)),
    ("llama-3.1-8b", "decode 32 x 1024"): Target(6.20, (5.2,)),
    ("llama-3.1-8b", "decode 64 x 1024"): Target(7.58, (6.5,)),
    ("llama-3.1-8b", "decode 128 x 1024"): Target(10.65, (9.3,)),
    ("llama-3.1-8b", "decode 256 x 1024"): Target(18.07, (15.2,)),
    ("llama-3.1-8b", "decode 32 x 15000"): Target(19.92, (19.3,)),
    ("qwen3-0.6b", "decode 1 x 1024"): Target(2.30, (1.0, 0.6)),
    ("qwen3-0.6b", "decode 8 x 1024"): Target(2.47, (1.1,)),
    ("qwen3-0.6b", "decode 32 x 1024"): Target(2.77, (1.7,)),
    ("qwen3-0.6b", "decode 64 x 1024"): Target(3.63, (2.7,)),
    ("qwen3-0.6b", "decode 128 x 1024"): Target(5.77, (4.7,)),
    ("qwen3-0.6b", "decode 256 x 1024"): Target(10.38, (8.6,)),
    ("qwen3-0.6b", "decode 32 x 15000"): Target(14.44, (13.9,)),
    # Output tokens a second; the peer's two runs were within 0.8 %.
    ("llama-3.1-8b", "mixed 256"): Target(9806.0, (11_500.0, 12_500.0)),
    ("qwen3-0.6b", "mixed 256"): Target(23_367.0, (30_000.0,)),
    # Prompt tokens a second.
    ("llama-3.1-8b", "prefill 16 x 8192"): Target(38_167.0, (42_000.0,)),
    ("qwen3-0.6b", "prefill 16 x 8192"): Target(275_831.0, (310_000.0,)),
    # Requests a second.
    ("llama-3.1-8b", "burst 256 x 2600 + 60"): Target(14.35, (16.5,)),
    ("qwen3-0.6b", "burst 256 x 2600 + 60"): Target(83.5, (105.0,)),
    # Seconds. The peer took 67 to 73 with cold caches, and was not timed with warm ones.
    ("llama-3.1-8b", "start, cold"): Target(67.0, ()),
    ("llama-3.1-8b", "start, warm"): Target(None, (10.0,)),
    ("qwen3-0.6b", "start, cold"): Target(67.0, ()),
    ("qwen3-0.6b", "start, warm"): Target(None, (10.0,)),
}
"""All in bfloat16 with random weights, one run each; absolute figures hold on PEER_MACHINE only."""
