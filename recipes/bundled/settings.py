"""Shapes, budgets and names of the bundled-model recipe, in one place."""

from __future__ import annotations

from dataclasses import dataclass

BOS = "<|endoftext|>"
PAD = "<|pad|>"
BOS_ID = 0
PAD_ID = 1
VOCAB_SIZE = 8192
MAX_POSITIONS = 2048
MAIN_NAME = "headrace-py-16m"
DRAFT_NAME = "headrace-py-draft"


@dataclass(frozen=True)
class ModelShape:
    """The hyper-parameters of a Llama-shaped decoder; the names are those of `transformers.LlamaConfig`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = VOCAB_SIZE
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = MAX_POSITIONS


MAIN_SHAPE = ModelShape(384, 8, 6, 2, 64, 1024)
DRAFT_SHAPE = ModelShape(128, 2, 4, 2, 32, 384)


@dataclass(frozen=True)
class Budget:
    """How long and how large one optimisation run is; `max_steps` (0: none) ends it before the time limit does."""

    seconds: float
    max_steps: int
    sequence_length: int
    micro_sequences: int
    accumulate: int
    muon_lr: float
    adam_lr: float
    compile: bool
    seed: int = 1

    @property
    def sequences_per_step(self) -> int:
        return self.micro_sequences * self.accumulate

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.sequence_length


@dataclass(frozen=True)
class EvalLimits:
    """How much of the held-out text is scored and how many functions are completed."""

    documents: int = 100_000
    functions: int = 256
    samples: int = 6
    new_tokens: int = 192
    prompt_tokens: int = 512
    window: int = MAX_POSITIONS
