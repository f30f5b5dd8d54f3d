"""The two ends of HunyuanVideo's transformers: the token refiner of the text, and the patches of the latents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sgld.nn.attention import Attention
from sgld.nn.blocks import Embedder, FeedForward, TimestepEmbedder
from sgld.nn.mmdit import Modulation

FREQUENCIES = 256  # of the sinusoids of time and guidance
Patch = tuple[int, int, int]  # in time, height and width


class TimestepTextEmbedder(nn.Module):
    """The embedding [1, C] of a time, a summary of the text and, where `guided`, a guidance scale."""

    def __init__(self, dim_text: int, dim: int, guided: bool = False):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(FREQUENCIES, dim)
        self.text_embedder = Embedder(dim_text, dim, F.silu)
        self.guidance_embedder = TimestepEmbedder(FREQUENCIES, dim) if guided else None

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Embed t [1] in [0, 1000], pooled text [1, P], and a thousand times the guidance scale [1]."""
        emb: Tensor = self.timestep_embedder(t)
        if self.guidance_embedder is not None and guidance is not None:
            emb = emb + self.guidance_embedder(guidance)
        return emb + self.text_embedder(pooled)  # type: ignore[no-any-return]


class RefinerAttention(nn.Module):
    """Attention of text tokens to each other."""

    def __init__(self, dim: int, heads: int, attend: Attention):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))  # [B, L, H, D]
        return self.to_out[0](self.attend(q, k, v, None).flatten(2))  # type: ignore[no-any-return]


class RefinerBlock(nn.Module):
    """Attention and a feed-forward layer on text [1, n, C], both gated by the time."""

    def __init__(self, dim: int, heads: int, attend: Attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = RefinerAttention(dim, heads, attend)
        self.ff = FeedForward(dim, 4 * dim, F.silu)
        self.norm_out = Modulation(dim, 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        gate, ff_gate = self.norm_out(emb)
        x = x + gate * self.attn(self.norm1(x))
        return x + ff_gate * self.ff(self.norm2(x))  # type: ignore[no-any-return]


class TokenRefiner(nn.Module):
    """Bidirectional blocks over the causal states of a language model, modulated by the time."""

    def __init__(self, dim_text: int, dim: int, heads: int, layers: int, attend: Attention):
        super().__init__()
        self.time_text_embed = TimestepTextEmbedder(dim_text, dim)
        self.proj_in = nn.Linear(dim_text, dim)
        blocks = nn.ModuleList(RefinerBlock(dim, heads, attend) for _ in range(layers))
        self.token_refiner = nn.ModuleDict({"refiner_blocks": blocks})

    def forward(self, text: Tensor, t: Tensor) -> Tensor:
        """Refine text [1, n, C_text] to [1, n, C] at time t [1]."""
        emb = self.time_text_embed(t, text.float().mean(1).type_as(text))
        x: Tensor = self.proj_in(text)
        for block in self.token_refiner["refiner_blocks"].children():
            x = block(x, emb)
        return x


class PatchEmbed(nn.Module):
    """Latents as tokens; key `proj`."""

    def __init__(self, channels: int, dim: int, patch: Patch):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed latents [1, C, T, H, W] as tokens [1, S, D]."""
        return self.proj(x).flatten(2).mT.contiguous()  # type: ignore[no-any-return]


def token_grid(x: Tensor, patch: Patch) -> Patch:
    """Count the tokens of latents [1, C, T, H, W] in time, height and width."""
    t, h, w = (n // p for n, p in zip(x.shape[2:], patch, strict=True))
    return t, h, w


def unpatchify(h: Tensor, grid: Patch, patch: Patch) -> Tensor:
    """Join tokens [1, S, C*pt*ph*pw] to latents [1, C, T, H, W]."""
    h = h.view(h.shape[0], *grid, -1, *patch)
    return h.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
