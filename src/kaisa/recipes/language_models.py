"""Transformers of the published shapes, for planning and for training from scratch: BERT, GPT-2 and Llama.

    BERT    (Devlin et al. 2019, arXiv 1810.04805)   encoder, with the two heads of pre-training
    GPT-2   (Radford et al. 2019)                    decoder; queries, keys and values are one projection
    Llama   (Grattafiori et al. 2024, 2407.21783)    decoder; grouped queries, gated feed-forward, no biases

Each has the parameters of the original, so that its layers have the original's factors. Attention runs through
``scaled_dot_product_attention``; dropout, which has no part in what is planned, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Width:
    """How large a transformer is.

    Attributes:
        blocks: how many.
        features: of the residual stream.
        heads: of attention.
        hidden: features of the feed-forward part.
        tokens: in the vocabulary.
        positions: the longest sequence.
        shared_heads: heads of keys and values; as many as ``heads`` unless queries are grouped.
        is_tied: whether the prediction shares the weight of the embedding.
    """

    blocks: int
    features: int
    heads: int
    hidden: int
    tokens: int
    positions: int
    shared_heads: int = 0
    is_tied: bool = True


BERT_BASE = Width(12, 768, 12, 3072, 30_522, 512)
BERT_LARGE = Width(24, 1024, 16, 4096, 30_522, 512)
GPT2 = Width(12, 768, 12, 3072, 50_257, 1024)
GPT2_XL = Width(48, 1600, 25, 6400, 50_257, 1024)
LLAMA_1B = Width(16, 2048, 32, 8192, 128_256, 8192, shared_heads=8)
LLAMA_8B = Width(32, 4096, 32, 14_336, 128_256, 8192, shared_heads=8, is_tied=False)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, *, is_causal: bool) -> Tensor:
    """Return attention of (batch, positions, features), keys and values perhaps of fewer heads."""
    size = queries.shape[-1] // heads
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (queries, keys, values))
    repeats = heads // k.shape[1]
    k, v = (part.repeat_interleave(repeats, 1) if repeats > 1 else part for part in (k, v))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


class BertBlock(nn.Module):
    """Attention and feed-forward, each normalised after its input is added."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.heads = width.heads
        self.query, self.key, self.value, self.output = (nn.Linear(width.features, width.features) for _ in range(4))
        self.attention_norm = nn.LayerNorm(width.features)
        self.widen = nn.Linear(width.features, width.hidden)
        self.narrow = nn.Linear(width.hidden, width.features)
        self.norm = nn.LayerNorm(width.features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (batch, positions, features)."""
        attended = _attend(self.query(x), self.key(x), self.value(x), self.heads, is_causal=False)
        x = self.attention_norm(x + self.output(attended))
        y: Tensor = self.norm(x + self.narrow(functional.gelu(self.widen(x))))
        return y


class Bert(nn.Module):
    """BERT with the heads of pre-training: hidden tokens, and whether two sentences follow each other."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        features = width.features
        self.tokens = nn.Embedding(width.tokens, features)
        self.positions = nn.Embedding(width.positions, features)
        self.segments = nn.Embedding(2, features)
        self.norm = nn.LayerNorm(features)
        self.blocks = nn.ModuleList(BertBlock(width) for _ in range(width.blocks))
        self.pooler = nn.Linear(features, features)
        self.transform = nn.Linear(features, features)
        self.transform_norm = nn.LayerNorm(features)
        self.prediction = nn.Linear(features, width.tokens)
        self.prediction.weight = self.tokens.weight
        self.next_sentence = nn.Linear(features, 2)

    def forward(self, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of tokens (batch, positions, tokens) and of the order of sentences (batch, 2)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.norm(self.tokens(tokens) + self.positions(places) + self.segments(segments))
        for block in self.blocks:
            x = block(x)
        hidden = self.transform_norm(functional.gelu(self.transform(x)))
        return self.prediction(hidden), self.next_sentence(torch.tanh(self.pooler(x[:, 0])))


class Gpt2Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to it."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.heads = width.heads
        self.ln_1 = nn.LayerNorm(width.features)
        self.c_attn = nn.Linear(width.features, 3 * width.features)
        self.attention_output = nn.Linear(width.features, width.features)
        self.ln_2 = nn.LayerNorm(width.features)
        self.c_fc = nn.Linear(width.features, width.hidden)
        self.c_proj = nn.Linear(width.hidden, width.features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (batch, positions, features)."""
        queries, keys, values = self.c_attn(self.ln_1(x)).chunk(3, -1)
        x = x + self.attention_output(_attend(queries, keys, values, self.heads, is_causal=True))
        y: Tensor = x + self.c_proj(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return y


class Gpt2(nn.Module):
    """GPT-2, whose prediction shares the weight of the embedding."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.wte = nn.Embedding(width.tokens, width.features)
        self.wpe = nn.Embedding(width.positions, width.features)
        self.blocks = nn.ModuleList(Gpt2Block(width) for _ in range(width.blocks))
        self.ln_f = nn.LayerNorm(width.features)
        self.prediction = nn.Linear(width.features, width.tokens, bias=False)
        self.prediction.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores (batch, positions, tokens) of the next token."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.wte(tokens) + self.wpe(places)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.prediction(self.ln_f(x))
        return scores


class LlamaBlock(nn.Module):
    """Attention of grouped queries and a gated feed-forward part, each on a normalised input and added to it."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.heads, self.shared_heads = width.heads, width.shared_heads or width.heads
        shared = width.features // width.heads * self.shared_heads
        self.attention_norm = nn.RMSNorm(width.features, eps=1e-5)
        self.q_proj = nn.Linear(width.features, width.features, bias=False)
        self.k_proj = nn.Linear(width.features, shared, bias=False)
        self.v_proj = nn.Linear(width.features, shared, bias=False)
        self.o_proj = nn.Linear(width.features, width.features, bias=False)
        self.norm = nn.RMSNorm(width.features, eps=1e-5)
        self.gate_proj = nn.Linear(width.features, width.hidden, bias=False)
        self.up_proj = nn.Linear(width.features, width.hidden, bias=False)
        self.down_proj = nn.Linear(width.hidden, width.features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (batch, positions, features)."""
        y = self.attention_norm(x)
        queries, keys = _rotated(self.q_proj(y), self.heads), _rotated(self.k_proj(y), self.shared_heads)
        x = x + self.o_proj(_attend(queries, keys, self.v_proj(y), self.heads, is_causal=True))
        y = self.norm(x)
        z: Tensor = x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return z


def _rotated(x: Tensor, heads: int) -> Tensor:
    """Turn pairs of features of each head by an angle that grows with the position (Su et al. 2021, 2104.09864)."""
    parts = x.unflatten(-1, (heads, -1))
    half = parts.shape[-1] // 2
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    speeds = 500_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (places[:, None] * speeds)[:, None, :]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = parts[..., :half], parts[..., half:]
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, -1).flatten(-2)


class Llama(nn.Module):
    """A decoder of the Llama 3 family."""

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(width.tokens, width.features)
        self.blocks = nn.ModuleList(LlamaBlock(width) for _ in range(width.blocks))
        self.norm = nn.RMSNorm(width.features, eps=1e-5)
        self.prediction = nn.Linear(width.features, width.tokens, bias=False)
        if width.is_tied:
            self.prediction.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores (batch, positions, tokens) of the next token."""
        x = self.embed_tokens(tokens)
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.prediction(self.norm(x))
        return scores
