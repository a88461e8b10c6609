"""A Llama-shaped decoder for training, with the arithmetic of transformers' `LlamaForCausalLM`.

RMSNorm (arXiv:1910.07467), rotary positions in the rotate-half form (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202), tied embeddings (arXiv:1608.05859). Parameter names are those of the
Hugging Face layout. Parameters stay float32; products run in the dtype given to `forward`.
Suffixes: B batch, T time, D hidden, H heads, K key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import ModelShape

INIT_STD = 0.02


class Linear(nn.Module):
    """A product without bias; the weight is cast to the activations' dtype at each use."""

    def __init__(self, rows: int, columns: int, std: float = INIT_STD) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns).normal_(std=std))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Scales to unit root-mean-square in float32, then by a learned gain in the activations' dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x_BTD.dtype) * (wide_BTD * scale_BT1).to(x_BTD.dtype)


def rope_tables(shape: ModelShape, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, E) of positions 0..length-1, computed in float32."""
    exponent = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angle_TF = torch.outer(torch.arange(length, device=device, dtype=torch.float32), shape.rope_theta**-exponent)
    angle_TE = torch.cat((angle_TF, angle_TF), dim=-1)
    return angle_TE.cos().to(dtype), angle_TE.sin().to(dtype)


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    low, high = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE + torch.cat((-high, low), dim=-1) * sin_TE


class Attention(nn.Module):
    """Causal grouped-query attention over the whole window; documents in one window may see each other."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        residual_std = INIT_STD / math.sqrt(2 * shape.num_hidden_layers)
        self.q_proj = Linear(self.heads * self.width, shape.hidden_size)
        self.k_proj = Linear(self.kv_heads * self.width, shape.hidden_size)
        self.v_proj = Linear(self.kv_heads * self.width, shape.hidden_size)
        self.o_proj = Linear(shape.hidden_size, self.heads * self.width, residual_std)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        batch, time, _ = x_BTD.shape
        q_BHTE = self.q_proj(x_BTD).view(batch, time, self.heads, self.width).transpose(1, 2)
        k_BKTE = self.k_proj(x_BTD).view(batch, time, self.kv_heads, self.width).transpose(1, 2)
        v_BKTE = self.v_proj(x_BTD).view(batch, time, self.kv_heads, self.width).transpose(1, 2)
        q_BHTE, k_BKTE = rotate(q_BHTE, cos_TE, sin_TE), rotate(k_BKTE, cos_TE, sin_TE)
        out_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=True)
        return self.o_proj(out_BHTE.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        residual_std = INIT_STD / math.sqrt(2 * shape.num_hidden_layers)
        self.gate_proj = Linear(shape.intermediate_size, shape.hidden_size)
        self.up_proj = Linear(shape.intermediate_size, shape.hidden_size)
        self.down_proj = Linear(shape.hidden_size, shape.intermediate_size, residual_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Layer(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class LlamaLM(nn.Module):
    """Token ids to next-token logits."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)

    def forward(self, ids_BT: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        embedding_VD = self.model.embed_tokens.weight
        # Looked up in float32, so that the gradients of a frequent token add up in float32.
        x_BTD = F.embedding(ids_BT, embedding_VD).to(dtype)
        cos_TE, sin_TE = rope_tables(self.shape, ids_BT.shape[1], ids_BT.device, dtype)
        for layer in self.model.layers:
            x_BTD = layer(x_BTD, cos_TE, sin_TE)
        return F.linear(self.model.norm(x_BTD), embedding_VD.to(dtype))

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def round_to_bf16(model: LlamaLM) -> LlamaLM:
    """Rounds every parameter to a bfloat16 value in place: the weights that are exported and evaluated."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model
