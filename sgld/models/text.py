"""UMT5 prompts: cleaning, tokens, and the encoder (Chung et al. 2023, https://arxiv.org/abs/2304.09151)."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import attrs
import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.nn.blocks import gelu_tanh
from sgld.nn.weights import load_module, pick, read_json


def clean(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes (twice), and join white space to single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


@attrs.frozen
class UMT5Config:
    """Architecture numbers, as in text_encoder/config.json."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rms = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * rms).to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Unscaled attention with a learned bias for each distance."""

    def __init__(self, c: UMT5Config):
        super().__init__()
        inner = c.num_heads * c.d_kv
        self.heads, self.max_distance = c.num_heads, c.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(c.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, C]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT + self.bias(x.shape[1])).softmax(-1)  # [B, H, S, S]
        y: Tensor = self.o((weights @ v).transpose(1, 2).flatten(2))
        return y

    def bias(self, length: int) -> Tensor:
        """[H, S, S]"""
        table = self.relative_attention_bias
        position = torch.arange(length, device=table.weight.device)
        buckets = distance_buckets(position[None, :] - position[:, None], table.num_embeddings, self.max_distance)
        y: Tensor = table(buckets).permute(2, 0, 1)
        return y


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """T5's buckets: half for each direction, near distances one by one, far ones logarithmically."""
    half = buckets // 2
    near = half // 2
    far = distance.abs().clamp(min=1).float()
    log_bucket = near + (torch.log(far / near) / math.log(max_distance / near) * (half - near)).long()
    bucket = torch.where(distance.abs() < near, distance.abs(), log_bucket.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class AttentionLayer(nn.Module):
    def __init__(self, c: UMT5Config):
        super().__init__()
        self.SelfAttention = SelfAttention(c)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.SelfAttention(self.layer_norm(x))
        return y


class GatedDense(nn.Module):
    def __init__(self, c: UMT5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(c.d_model, c.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(gelu_tanh(self.wi_0(x)) * self.wi_1(x))
        return y


class FeedForwardLayer(nn.Module):
    def __init__(self, c: UMT5Config):
        super().__init__()
        self.DenseReluDense = GatedDense(c)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return y


class Block(nn.Module):
    def __init__(self, c: UMT5Config):
        super().__init__()
        self.layer = nn.Sequential(AttentionLayer(c), FeedForwardLayer(c))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Stack(nn.Module):
    def __init__(self, c: UMT5Config):
        super().__init__()
        self.block = nn.Sequential(*(Block(c) for _ in range(c.num_layers)))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.final_layer_norm(self.block(x))
        return y


class UMT5Encoder(nn.Module):
    """Tokens [B, S], without padding, to hidden states [B, S, C]."""

    def __init__(self, c: UMT5Config):
        super().__init__()
        self.heads = c.num_heads
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = Stack(c)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.shared(tokens))
        return y


@attrs.frozen
class PromptEncoder:
    """Prompts to hidden states, without the zeros that the pipeline pads them with."""

    tokenizer: Tokenizer
    encoder: UMT5Encoder

    @classmethod
    def load(cls, tokenizer: Path, encoder: Path, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
        """From the folders of the two components.

        Raises:
            ModelError: a missing or broken file, or another architecture.
        """
        config = umt5_config(encoder / "config.json")
        module = load_module(
            lambda: UMT5Encoder(config),
            encoder,
            dtype,
            device,
            tied={"encoder.embed_tokens.weight": "shared.weight"},
        )
        return cls(load_tokenizer(tokenizer / "tokenizer.json"), module)

    def encode(self, prompt: str, max_tokens: int) -> tuple[Tensor, str | None]:
        """Hidden states [1, n, C] of at most `max_tokens` tokens, and a warning when the prompt was cut."""
        text = clean(prompt)
        tokens = self.tokenizer.encode(text).ids
        note = None
        if len(tokens) > max_tokens:
            note = f"prompt cut from {len(tokens)} to {max_tokens} tokens, the most this request allows"
            tokens = self._cut(text, max_tokens)
        return self.encoder(torch.tensor([tokens], device=self.encoder.shared.weight.device)), note

    def _cut(self, text: str, max_tokens: int) -> list[int]:
        """The first tokens and the closing ones, as the tokenizer cuts."""
        self.tokenizer.enable_truncation(max_tokens)
        tokens: list[int] = self.tokenizer.encode(text).ids
        self.tokenizer.no_truncation()
        return tokens


def load_tokenizer(file: Path) -> Tokenizer:
    """A tokenizers file, without its own padding and truncation."""
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the binding raises nothing narrower
        raise ModelError(f"{file}: cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def umt5_config(file: Path) -> UMT5Config:
    """The numbers of a config.json.

    Raises:
        ModelError: another architecture than UMT5 with a gated GELU.
    """
    config = read_json(file)
    for key, needed in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
        if config.get(key) != needed:
            raise ModelError(f"{file}: {key} is {config.get(key)!r}; only {needed!r} is supported")
    c: UMT5Config = pick(config, UMT5Config, file)
    return c
