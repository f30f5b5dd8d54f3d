"""The transformer of Wan (Wan Team 2025, https://arxiv.org/abs/2503.20314), with diffusers' names of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.models.wan_pictures import MASK_CHANNELS
from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import ComputeModule, DiffusionTransformer, Embedder, FeedForward, TimestepEmbedder, gelu_tanh
from sgld.nn.norm import LayerNorm32
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d, rotate
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture


@attrs.frozen
class WanConfig(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"qk_norm": "rms_norm_across_heads"}

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    patch_size: tuple[int, int, int] = attrs.field(default=(1, 2, 2), converter=tuple)
    eps: float = 1e-6
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    rope_max_seq_len: int = 1024
    added_kv_proj_dim: int | None = None
    image_dim: int | None = None
    pos_embed_seq_len: int | None = None

    @property
    def dim(self) -> int:
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def picture_channels(self) -> int:
        """Return the input channels of a picture, which follow the noisy latents."""
        return self.in_channels - self.out_channels

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Return the channels of a head that rotate with time, height and width."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    def fault(self) -> str | None:
        known = self.out_channels, 2 * self.out_channels + MASK_CHANNELS
        if self.in_channels in known:
            return None
        return f"in_channels: {self.in_channels} is not supported; only {known[0]}, or {known[1]} with a picture"


Pair = tuple[Tensor, Tensor]  # keys and values [B, L, H, D]


@attrs.frozen
class CrossAttentionKV:
    """Keys and values of text and picture for one block."""

    text: Pair
    picture: Pair | None

    def row(self, i: int) -> CrossAttentionKV:
        """Select one prompt of the batch; the picture belongs to all of them."""
        k, v = self.text
        return CrossAttentionKV((k[i : i + 1], v[i : i + 1]), self.picture)


@attrs.frozen
class TextKeys:
    """Keys and values for every block, the same at every step."""

    blocks: list[CrossAttentionKV]
    bias: Tensor | None  # [B, 1, 1, L], for the text

    def row(self, i: int) -> TextKeys:
        """Select one prompt of the batch."""
        return TextKeys([kv.row(i) for kv in self.blocks], None if self.bias is None else self.bias[i : i + 1])


@attrs.frozen
class TimeModulation:
    """Modulation by K times: one for all tokens, or for each token of this rank the one that `rows` names."""

    emb: Tensor  # [K, C]
    mod: Tensor  # [K, 6, C]
    rows: Tensor | None  # [S/n]

    def spread(self, x: Tensor) -> Tensor:
        """Spread [K, C] over the tokens: [1, 1 or S/n, C]."""
        return x[None] if self.rows is None else x[self.rows][None]


class WanAttention(nn.Module):
    """Queries from the latents; keys and values from the latents, or from the text and, with `added`, a picture."""

    def __init__(self, c: WanConfig, attend: Attention, among: SequenceAttention, added: int | None = None):
        super().__init__()
        self.heads, self.attend, self.among = c.num_attention_heads, attend, among
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)
        self.added = added is not None
        if added is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(added, c.dim), nn.Linear(added, c.dim)
            self.norm_added_k = nn.RMSNorm(c.dim, c.eps)

    def self_attention(self, x: Tensor, rope: Tensor, tokens: int) -> Tensor:
        q = rotate(self.split(self.norm_q(self.to_q(x))), rope)
        k = rotate(self.split(self.norm_k(self.to_k(x))), rope)
        return self.join(self.among(q, k, self.split(self.to_v(x)), tokens))

    def cross_attention(self, x: Tensor, kv: CrossAttentionKV, bias: Tensor | None) -> Tensor:
        q = self.split(self.norm_q(self.to_q(x)))
        y = self.attend(q, *kv.text, bias)
        if kv.picture is not None:
            k, v = (part.expand(len(q), -1, -1, -1) for part in kv.picture)
            y = y + self.attend(q, k, v, None)
        return self.join(y)

    def keys_and_values(self, text: Tensor, picture: Tensor | None) -> CrossAttentionKV:
        """Compute keys and values of text [B, L, C] and picture [1, M, C]."""
        own = self.split(self.norm_k(self.to_k(text))), self.split(self.to_v(text))
        if picture is None or not self.added:
            return CrossAttentionKV(own, None)
        k, v = self.norm_added_k(self.add_k_proj(picture)), self.add_v_proj(picture)
        return CrossAttentionKV(own, (self.split(k), self.split(v)))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)  # [B, S, H, D]

    def join(self, x: Tensor) -> Tensor:
        y: Tensor = self.to_out[0](x.flatten(2))
        return y


class WanBlock(nn.Module):
    """Attention to the latents, to the text, and a feed-forward layer, modulated by the time."""

    def __init__(self, c: WanConfig, attend: Attention, among: SequenceAttention):
        super().__init__()
        self.norm1 = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.norm2 = LayerNorm32(c.dim, c.eps) if c.cross_attn_norm else nn.Identity()
        self.norm3 = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.attn1 = WanAttention(c, attend, among)
        self.attn2 = WanAttention(c, attend, among, c.added_kv_proj_dim)
        self.ffn = FeedForward(c.dim, c.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, c.dim))

    def forward(
        self,
        x: Tensor,
        modulation: TimeModulation,
        rope: Tensor,
        tokens: int,
        kv: CrossAttentionKV,
        bias: Tensor | None,
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + modulation.mod).unbind(1)  # [K, C]
        at = modulation.spread
        y = self.attn1.self_attention(torch.addcmul(at(shift), self.norm1(x), at(1 + scale)).type_as(x), rope, tokens)
        x = torch.addcmul(x.float(), y.float(), at(gate)).type_as(x)
        x = x + self.attn2.cross_attention(self.norm2(x).type_as(x), kv, bias)
        y = self.ffn(torch.addcmul(at(ff_shift), self.norm3(x), at(1 + ff_scale)).type_as(x))
        return torch.addcmul(x.float(), y.float(), at(ff_gate)).type_as(x)


class ImageEmbedding(nn.Module):
    """Tokens of the image encoder [1, L, D] to the width of the blocks; two pictures are told apart by `pos_embed`."""

    def __init__(self, image_dim: int, dim: int, length: int | None):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm32(image_dim), LayerNorm32(dim)
        self.ff = FeedForward(image_dim, image_dim, F.gelu, dim)
        self.pos_embed = None if length is None else nn.Parameter(torch.empty(1, length, image_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pos_embed is None else x + self.pos_embed
        y: Tensor = self.norm2(self.ff(self.norm1(x).type_as(x))).type_as(x)
        return y


class ConditionEmbedder(ComputeModule):
    """Time, text and picture to the width of the blocks."""

    def __init__(self, c: WanConfig):
        super().__init__()
        self.time_embedder = TimestepEmbedder(c.freq_dim, c.dim)
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = Embedder(c.text_dim, c.dim, gelu_tanh)
        if c.image_dim is not None:
            self.image_embedder = ImageEmbedding(c.image_dim, c.dim, c.pos_embed_seq_len)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Embed t [K] as [K, C] and its modulation [K, 6, C]."""
        emb = self.time_embedder(t).to(self.compute_dtype)
        return emb, self.time_proj(F.silu(emb)).unflatten(1, (6, -1))


class WanTransformer(DiffusionTransformer):
    """Predicts the velocity of latents x [B, C, T, H, W] at one time from the keys and values of B prompts.

    The first latent frames may be without noise: their tokens' time is 0.
    """

    def __init__(self, c: WanConfig, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.patch_embedding = nn.Conv3d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.condition_embedder = ConditionEmbedder(c)
        among = SequenceAttention(mesh, backend)
        attend = (cross or backend).attend
        self.blocks = nn.ModuleList(WanBlock(c, attend, among) for _ in range(c.num_layers))
        self.norm_out = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, c.dim))

    def text_keys(self, text: Tensor, bias: Tensor | None = None, picture: Tensor | None = None) -> TextKeys:
        """Compute keys of text [B, L, C], with a bias [B, 1, 1, L] on the logits, and a picture [1, M, D]."""
        embed, dtype = self.condition_embedder, self.compute_dtype
        text = embed.text_embedder(text.to(dtype))
        if picture is not None:
            picture = embed.image_embedder(picture.to(dtype))
        visited: Iterator[Any] = self.runner.visit(self.blocks)
        blocks = [block.attn2.keys_and_values(text, picture) for block in visited]
        return TextKeys(blocks, None if bias is None else bias.to(text))

    def forward(
        self, x: Tensor, t: Tensor, keys: TextKeys, clean_frames: int = 0, step: StepContext | None = None
    ) -> Tensor:
        grid = self.grid(x)
        split, tokens = self.mesh.tokens, math.prod(grid)
        rope = split.shard(rope_3d(grid, self.config.rope_dims, x.device), 0)  # [S/n, D/2]
        modulation = self.modulation(t.view(1).to(x.device), grid, clean_frames)
        kv = dict(zip(self.blocks, keys.blocks, strict=True))
        h = split.shard(self.patch_embedding(x.to(self.compute_dtype)).flatten(2).mT.contiguous(), 1)  # [B, S/n, C]

        def call(block: nn.Module, h: Tensor) -> Tensor:
            return block(h, modulation, rope, tokens, kv[block], keys.bias)  # type: ignore[no-any-return]

        h = self.runner.run(self.blocks, h, call, step or StepContext())
        shift, scale = (modulation.spread(x) for x in (self.scale_shift_table + modulation.emb[:, None]).unbind(1))
        h = self.proj_out(torch.addcmul(shift.float(), self.norm_out(h), 1 + scale.float()).type_as(h))
        return self.unpatch(split.gather(h, 1, tokens), grid)

    def modulation(self, t: Tensor, grid: tuple[int, int, int], clean_frames: int) -> TimeModulation:
        """Modulate by time t [1] the tokens of a grid whose first `clean_frames` latent frames are at time 0."""
        rows = None
        if clean_frames:
            t = torch.cat([t, torch.zeros_like(t)])
            frame = torch.arange(math.prod(grid), device=t.device) // (grid[1] * grid[2])
            rows = self.mesh.tokens.shard((frame * self.config.patch_size[0] < clean_frames).long(), 0)  # [S/n]
        emb, mod = self.condition_embedder.time(t)
        return TimeModulation(emb, mod.float(), rows)

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Count patches in time, height and width."""
        t, h, w = (n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def unpatch(self, h: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Unpatch tokens [B, S, pt*ph*pw*C] to latents [B, C, T, H, W]."""
        h = h.view(-1, *grid, *self.config.patch_size, self.config.out_channels)
        return h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
