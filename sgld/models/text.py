"""UMT5 prompts: cleaning, tokens, and the encoder (Chung et al. 2023, https://arxiv.org/abs/2304.09151)."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path

import attrs
import ftfy
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sgld.errors import BadRequest, ModelError
from sgld.nn.blocks import gelu_tanh
from sgld.nn.formats import WHOLE, Share
from sgld.nn.parallel import Axis
from sgld.nn.weights import Keeper, load_module, pick, read_json


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
    """Unscaled attention with a learned bias for each distance. Each rank of `axis` has some of the heads."""

    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.axis = axis
        self.heads, self.max_distance = c.num_heads // axis.size, c.relative_attention_max_distance
        inner = self.heads * c.d_kv
        self.q, self.k, self.v = (nn.Linear(c.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, c.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, self.heads)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, C]
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT + self.bias(x.shape[1])).softmax(-1)  # [B, H, S, S]
        return self.axis.total(self.o((weights @ v).transpose(1, 2).flatten(2)))

    def bias(self, length: int) -> Tensor:
        """Return the bias [H, S, S]."""
        table = self.relative_attention_bias
        position = torch.arange(length, device=table.weight.device)
        buckets = distance_buckets(position[None, :] - position[:, None], table.num_embeddings, self.max_distance)
        y: Tensor = table(buckets).permute(2, 0, 1)
        return y


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Return T5's buckets: half for each direction, near distances one by one, far ones logarithmically."""
    half = buckets // 2
    near = half // 2
    far = distance.abs().clamp(min=1).float()
    log_bucket = near + (torch.log(far / near) / math.log(max_distance / near) * (half - near)).long()
    bucket = torch.where(distance.abs() < near, distance.abs(), log_bucket.clamp(max=half - 1))
    return bucket + half * (distance > 0)


class AttentionLayer(nn.Module):
    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.SelfAttention = SelfAttention(c, axis)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.SelfAttention(self.layer_norm(x))
        return y


class GatedDense(nn.Module):
    """Each rank of `axis` has some of the hidden channels."""

    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.axis = axis
        self.wi_0, self.wi_1 = (nn.Linear(c.d_model, c.d_ff // axis.size, bias=False) for _ in range(2))
        self.wo = nn.Linear(c.d_ff // axis.size, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gelu_tanh(self.wi_0(x)) * self.wi_1(x)
        return self.axis.total(self.wo(hidden.to(self.wo.weight.dtype)))


class FeedForwardLayer(nn.Module):
    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.DenseReluDense = GatedDense(c, axis)
        self.layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return y


class Block(nn.Module):
    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.layer = nn.Sequential(AttentionLayer(c, axis), FeedForwardLayer(c, axis))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Stack(nn.Module):
    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.block = nn.Sequential(*(Block(c, axis) for _ in range(c.num_layers)))
        self.final_layer_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.final_layer_norm(self.block(x))
        return y


class UMT5Encoder(nn.Module):
    """Tokens [B, S], without padding, to hidden states [B, S, C].

    The ranks of `axis` share the heads and the hidden channels of every block (tensor parallelism, Shoeybi et al.
    2019, https://arxiv.org/abs/1909.08053).
    """

    def __init__(self, c: UMT5Config, axis: Axis):
        super().__init__()
        self.heads = c.num_heads
        self.shared = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = Stack(c, axis)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.encoder(self.shared(tokens))
        return y


@attrs.frozen
class PromptEncoder:
    """Prompts to hidden states, without the zeros that the pipeline pads them with."""

    tokenizer: Tokenizer
    encoder: UMT5Encoder

    @classmethod
    def load(
        cls,
        tokenizer: Path,
        encoder: Path,
        dtype: torch.dtype,
        device: torch.device,
        offload: Keeper | None = None,
        axis: Axis | None = None,
    ) -> PromptEncoder:
        """Load from the folders of the two components. The weights go to `offload`, where there is one.

        Raises:
            ModelError: a missing or broken file, or another architecture.
            BadRequest: the ranks of `axis` cannot share it evenly.
        """
        config = umt5_config(encoder / "config.json")
        axis = axis or Axis()
        check_shares(config, axis.size)
        module = load_module(
            lambda: UMT5Encoder(config, axis),
            encoder,
            dtype,
            device,
            tied={"encoder.embed_tokens.weight": "shared.weight"},
            offload=offload,
            share=Share(axis, shared_dim) if axis.size > 1 else WHOLE,
            precise=("wo",) if dtype == torch.float16 else (),  # whose sums fp16 cannot hold
        )
        return cls(load_tokenizer(tokenizer / "tokenizer.json"), module)

    def encode(self, prompt: str, max_tokens: int) -> tuple[Tensor, str | None]:
        """Encode a prompt to states [1, n, C] of at most `max_tokens` tokens, and warn when it was cut."""
        text = clean(prompt)
        tokens = self.tokenizer.encode(text).ids
        note = None
        if len(tokens) > max_tokens:
            note = f"prompt cut from {len(tokens)} to {max_tokens} tokens, the most this request allows"
            tokens = self._cut(text, max_tokens)
        return self.encoder(torch.tensor([tokens], device=self.encoder.shared.weight.device)), note

    def _cut(self, text: str, max_tokens: int) -> list[int]:
        """Keep the first tokens and the closing ones, as the tokenizer cuts."""
        self.tokenizer.enable_truncation(max_tokens)
        tokens: list[int] = self.tokenizer.encode(text).ids
        self.tokenizer.no_truncation()
        return tokens


def pad(texts: list[Tensor | None], length: int, fold: bool) -> tuple[Tensor, Tensor | None]:
    """Pad texts [1, n, C] to one batch [B, L, C] as the pipeline does: with zeros that attention does see.

    m equal keys weigh as much as one with log m added to its logit; so with `fold` one zero token stands for all
    the padding, and the second value is the bias [B, 1, 1, L] that says so.
    """
    rows = [text[0] for text in texts if text is not None]
    if not fold:
        return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]), None
    longest = max(len(row) for row in rows) + 1
    text = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    bias = torch.full((len(rows), 1, 1, longest), -math.inf, device=text.device)
    for i, row in enumerate(rows):
        bias[i, ..., : len(row)] = 0
        if len(row) < length:
            bias[i, ..., len(row)] = math.log(length - len(row))
    return text, bias


def shared_dim(name: str) -> int | None:
    """Return the dimension of a weight along which ranks share it."""
    layer = name.rsplit(".", 2)[-2]
    if layer in ("q", "k", "v", "wi_0", "wi_1"):
        return 0
    return 1 if layer in ("o", "wo", "relative_attention_bias") else None


def check_shares(c: UMT5Config, ranks: int) -> None:
    """Raise BadRequest unless that many ranks can share heads and hidden channels evenly."""
    both = math.gcd(c.num_heads, c.d_ff)
    if both % ranks:
        allowed = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise BadRequest(
            f"{ranks} workers cannot share the {c.num_heads} heads and {c.d_ff} hidden channels of the text "
            f"encoder evenly; allowed: {allowed}",
            field="tp_size",
        )


def load_tokenizer(file: Path) -> Tokenizer:
    """Load a file of tokenizers, without its own padding and truncation."""
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
    """Read the numbers of a config.json.

    Raises:
        ModelError: another architecture than UMT5 with a gated GELU.
    """
    config = read_json(file)
    for key, needed in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
        if config.get(key) != needed:
            raise ModelError(f"{file}: {key} is {config.get(key)!r}; only {needed!r} is supported")
    c: UMT5Config = pick(config, UMT5Config, file)
    return c
