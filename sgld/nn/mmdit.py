"""Blocks of transformers that see picture and text as one sequence, with or without weights of their own for the text.

MM-DiT (Esser et al. 2024, https://arxiv.org/abs/2403.03206). Ranks share the picture's tokens; every rank has all
of the text's. Attribute names are the keys of diffusers.
"""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.nn.blocks import FeedForward, gelu_tanh
from sgld.nn.rope import rotate
from sgld.nn.usp import SequenceAttention


@attrs.frozen
class TokenLayout:
    """Where the tokens stand: rotations of this rank's picture tokens and of the text's; and the picture's length."""

    rope: Tensor  # [S/n, D/2]
    text_rope: Tensor | None  # [L, D/2]; None: the text is not turned
    tokens: int  # of the picture, on all ranks


class JointAttention(nn.Module):
    """Attention of picture and text to both; without `added`, one set of weights serves both streams."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head: int,
        among: SequenceAttention,
        *,
        added: bool = True,
        out: bool = True,
        bias: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.heads, self.among = heads, among
        inner = heads * head
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(head, eps), nn.RMSNorm(head, eps)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=bias)]) if out else None
        self.added = added
        if added:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
            self.norm_added_q, self.norm_added_k = nn.RMSNorm(head, eps), nn.RMSNorm(head, eps)
            self.to_add_out = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Tensor, text: Tensor, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """Attend from latents x [B, S/n, C] and text [B, L, C] to both; return both in their shapes."""
        q, k, v = self._picture(x, place.rope)
        text_qkv = self._text(text, place.text_rope) if self.added else self._picture(text, place.text_rope)
        y, z = (part.flatten(2) for part in self.among.joint(q, k, v, place.tokens, text_qkv))
        if self.to_out is None:
            return y, z
        return self.to_out[0](y), self.to_add_out(z) if self.added else self.to_out[0](z)

    def _picture(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        return turned(self.norm_q(q), rope), turned(self.norm_k(k), rope), v

    def _text(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return turned(self.norm_added_q(q), rope), turned(self.norm_added_k(k), rope), v


def turned(x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate x [B, S, H, D] by [S, D/2], if there are rotations."""
    return x if rope is None else rotate(x, rope)


class Modulation(nn.Module):
    """`parts` vectors [B, 1, C] each from an embedding [B, C] of the time; key `linear`."""

    def __init__(self, dim: int, parts: int, bias: bool = True):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim, bias=bias)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate, and the same again where there are six."""
        return self.linear(F.silu(emb))[:, None].chunk(self.parts, -1)  # type: ignore[no-any-return]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Apply layer norm without weights, then scale and shift; [B, S, C]."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def finite(x: Tensor) -> Tensor:
    """Clip to the range of half precision, which the activations of these models leave."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class DualBlock(nn.Module):
    """Two streams, each with weights of its own, that attend to both (FLUX.1, HunyuanVideo)."""

    def __init__(self, dim: int, heads: int, head: int, among: SequenceAttention, ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = JointAttention(dim, heads, head, among)
        self.ff, self.ff_context = FeedForward(dim, int(ratio * dim)), FeedForward(dim, int(ratio * dim))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """Transform x [B, S/n, C] and text [B, L, C], modulated by emb [B, C]."""
        mod, text_mod = self.norm1(emb), self.norm1_context(emb)
        y, z = self.attn(modulate(x, *mod[:2]), modulate(text, *text_mod[:2]), place)
        x, text = x + mod[2] * y, text + text_mod[2] * z
        x = x + mod[5] * self.ff(modulate(x, *mod[3:5]))
        text = text + text_mod[5] * self.ff_context(modulate(text, *text_mod[3:5]))
        return finite(x), finite(text)


class SingleBlock(nn.Module):
    """One stream: attention beside a feed-forward layer, with the same weights for picture and text."""

    def __init__(self, dim: int, heads: int, head: int, among: SequenceAttention, ratio: float = 4.0):
        super().__init__()
        hidden = int(ratio * dim)
        self.norm = Modulation(dim, 3)
        self.proj_mlp, self.proj_out = nn.Linear(dim, hidden), nn.Linear(dim + hidden, dim)
        self.attn = JointAttention(dim, heads, head, among, added=False, out=False)

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """Transform x [B, S/n, C] and text [B, L, C], modulated by emb [B, C]."""
        shift, scale, gate = self.norm(emb)
        x_norm, text_norm = modulate(x, shift, scale), modulate(text, shift, scale)
        y, z = self.attn(x_norm, text_norm, place)
        x = x + gate * self.proj_out(torch.cat([y, gelu_tanh(self.proj_mlp(x_norm))], -1))
        text = text + gate * self.proj_out(torch.cat([z, gelu_tanh(self.proj_mlp(text_norm))], -1))
        return finite(x), finite(text)


class OutNorm(nn.Module):
    """The last layer norm, which the time scales and shifts; key `linear`."""

    def __init__(self, dim: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim, bias=bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(emb))[:, None].chunk(2, -1)
        return modulate(x, shift, scale)


def pack(z: Tensor) -> Tensor:
    """Pack latents [1, C, 2h, 2w] to tokens [1, h*w, 4C]."""
    return F.pixel_unshuffle(z, 2).flatten(2).mT.contiguous()


def unpack(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Unpack tokens [1, h*w, 4C] to latents [1, C, 2h, 2w]; `grid` is (h, w)."""
    return F.pixel_shuffle(x.mT.reshape(len(x), -1, *grid), 2)
