"""Wan text-to-video (Wan Team 2025, https://arxiv.org/abs/2503.20314): Wan 2.1, and the two experts of Wan 2.2.

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor, nn

from sgld.config import TRANSFORMERS
from sgld.errors import ModelError, NotBuilt
from sgld.messages import Load
from sgld.models.family import Conditioning
from sgld.models.parts import NO_NORMALIZATION, NO_TRUE_CFG, Native, Parts
from sgld.models.text import PromptEncoder
from sgld.models.vae import CHUNK_PIXELS, Vae
from sgld.models.vae_encoder import VaeEncoder, has_encoder
from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import Denoiser, Embedder, FeedForward, gelu_tanh, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.norm import LayerNorm32
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d, rotate
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json
from sgld.params import Memory, ModelInfo, SamplingParams
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class WanConfig:
    """Architecture numbers, as in transformer/config.json."""

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
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Share of a head's channels that turn with time, height and width."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


@attrs.frozen
class TextKeys:
    """Keys and values of the text for every block: they are the same at every step."""

    layers: list[tuple[Tensor, Tensor]]  # [B, L, H, D] each
    bias: Tensor | None  # [B, 1, 1, L]

    def row(self, i: int) -> TextKeys:
        """Those of one prompt of the batch."""
        one = slice(i, i + 1)
        return TextKeys([(k[one], v[one]) for k, v in self.layers], None if self.bias is None else self.bias[one])


class WanAttention(nn.Module):
    """Queries from the picture; keys and values from the picture or from the text."""

    def __init__(self, c: WanConfig, attend: Attention, among: SequenceAttention):
        super().__init__()
        self.heads, self.attend, self.among = c.num_attention_heads, attend, among
        self.to_q, self.to_k, self.to_v = (nn.Linear(c.dim, c.dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c.dim, c.dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(c.dim, c.eps), nn.RMSNorm(c.dim, c.eps)

    def to_itself(self, x: Tensor, rope: Tensor, tokens: int) -> Tensor:
        q = rotate(self.split(self.norm_q(self.to_q(x))), rope)
        k = rotate(self.split(self.norm_k(self.to_k(x))), rope)
        return self.join(self.among(q, k, self.split(self.to_v(x)), tokens))

    def to_text(self, x: Tensor, keys: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        q = self.split(self.norm_q(self.to_q(x)))
        return self.join(self.attend(q, *keys, bias))

    def keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.to_k(text))), self.split(self.to_v(text))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)  # [B, S, H, D]

    def join(self, x: Tensor) -> Tensor:
        y: Tensor = self.to_out[0](x.flatten(2))
        return y


class WanBlock(nn.Module):
    """Attention to the picture, attention to the text, and a feed-forward layer, modulated by the time."""

    def __init__(self, c: WanConfig, attend: Attention, among: SequenceAttention):
        super().__init__()
        self.norm1 = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.norm2 = LayerNorm32(c.dim, c.eps) if c.cross_attn_norm else nn.Identity()
        self.norm3 = LayerNorm32(c.dim, c.eps, elementwise_affine=False)
        self.attn1, self.attn2 = WanAttention(c, attend, among), WanAttention(c, attend, among)
        self.ffn = FeedForward(c.dim, c.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, c.dim))

    def forward(
        self, x: Tensor, mod: Tensor, rope: Tensor, tokens: int, keys: tuple[Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + mod).chunk(6, 1)  # [1, 1, C]
        y = self.attn1.to_itself(torch.addcmul(shift, self.norm1(x), 1 + scale).type_as(x), rope, tokens)
        x = torch.addcmul(x.float(), y.float(), gate).type_as(x)
        x = x + self.attn2.to_text(self.norm2(x).type_as(x), keys, bias)
        y = self.ffn(torch.addcmul(ff_shift, self.norm3(x), 1 + ff_scale).type_as(x))
        return torch.addcmul(x.float(), y.float(), ff_gate).type_as(x)


class ConditionEmbedder(nn.Module):
    """Time and text to the width of the blocks."""

    def __init__(self, c: WanConfig):
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = Embedder(c.freq_dim, c.dim, F.silu)
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = Embedder(c.text_dim, c.dim, gelu_tanh)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [1] -> [1, C] and [1, 6, C]"""
        emb = self.time_embedder(sinusoid(t, self.freq_dim).to(self.time_proj.weight.dtype))
        return emb, self.time_proj(F.silu(emb)).unflatten(1, (6, -1))


class WanTransformer(Denoiser):
    """Velocity of latents x [B, C, T, H, W] at one time, told by the keys and values of B prompts."""

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

    def read(self, text: Tensor, bias: Tensor | None = None) -> TextKeys:
        """Keys and values of text [B, L, C], with a bias [B, 1, 1, L] on the logits."""
        text = self.condition_embedder.text_embedder(text.to(self.dtype))
        return TextKeys([block.attn2.keys(text) for block in self._blocks], None if bias is None else bias.to(text))

    def forward(self, x: Tensor, t: Tensor, text: TextKeys) -> Tensor:
        grid = self.grid(x)
        split, tokens = self.mesh.tokens, math.prod(grid)
        rope = split.shard(rope_3d(grid, self.config.rope_dims, x.device), 0)  # [S/n, D/2]
        emb, mod = self.condition_embedder.time(t.view(1).to(x.device))
        h = split.shard(self.patch_embedding(x.to(self.dtype)).flatten(2).mT.contiguous(), 1)  # [B, S/n, C]
        mod = mod.float()
        for block, keys in zip(self._blocks, text.layers, strict=True):
            h = block(h, mod, rope, tokens, keys, text.bias)
        shift, scale = (self.scale_shift_table + emb[:, None]).chunk(2, 1)
        h = self.proj_out(torch.addcmul(shift.float(), self.norm_out(h), 1 + scale.float()).type_as(h))
        return self.unpatch(split.gather(h, 1, tokens), grid)

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        t, h, w = (n // p for n, p in zip(x.shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def unpatch(self, h: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, S, pt*ph*pw*C] -> [B, C, T, H, W]"""
        h = h.view(-1, *grid, *self.config.patch_size, self.config.out_channels)
        return h.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    @property
    def _blocks(self) -> Iterator[WanBlock]:
        return self.walk(self.blocks)  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------- family

TEXT_TOKENS = 512  # the pipeline pads text to max_sequence_length with zeros, and nothing masks them
TEXT_TASKS, PICTURE_TASKS = ("text-to-video", "text-to-image"), ("image-to-video", "image-to-image")
BATCH_TOKENS = 4096  # up to so many tokens, guidance runs as one batch of two

BASE = {"negative_prompt": "", "max_sequence_length": TEXT_TOKENS, "num_frames": 81, "fps": 16}
WAN21_SMALL = BASE | {
    "width": 832, "height": 480, "num_inference_steps": 50, "guidance_scale": 3.0
}  # fmt: skip
WAN21_LARGE = BASE | {
    "width": 1280, "height": 720, "num_inference_steps": 50, "guidance_scale": 5.0
}  # fmt: skip
WAN22_A14B = BASE | {
    "width": 1280, "height": 720, "num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0,
}  # fmt: skip


WAN_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors'
    (r"^condition_embedder\.time_embedder\.linear_1$", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2$", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1$", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2$", "text_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.norm_added_([kq])$", r".norm_\1_img"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out$", "head.head"),
)


@attrs.frozen(eq=False)
class WanConditioning(Conditioning):
    """Text [1, n, C] of the prompt and the negative prompt, without padding."""

    length: int = attrs.field(kw_only=True)  # tokens with padding
    boundary: float | None = attrs.field(kw_only=True)  # time below which the second expert takes over
    keys: dict[WanTransformer, TextKeys] = attrs.field(factory=dict, init=False)  # of the expert at work


@attrs.frozen
class Experts:
    """One transformer, or the two of Wan 2.2: for high noise, and below the boundary for low noise."""

    high: WanTransformer
    low: WanTransformer | None

    def at(self, t: Tensor, boundary: float | None) -> WanTransformer:
        """The one in charge at time t."""
        return self.high if self.low is None or boundary is None or float(t) >= boundary else self.low


class Wan(Native):
    """WanPipeline checkpoints. Pictures are where denoising begins; no transformer here reads them."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        self.parts = parts = Parts(load, mesh, platform, progress)
        self._fold_padding = platform.biased_attention_is_fast
        refuse_variants(load.folder, parts.index)
        self._boundary: float | None = parts.index.get("boundary_ratio")
        self.scheduler = parts.scheduler
        self._config = wan_config(parts.path("transformer") / "config.json")
        self._defaults = self._read_defaults("transformer_2" in parts.names)
        guided = self._defaults.get("guidance_scale", SamplingParams().guidance_scale) > 1
        mesh = parts.share(self._config.num_attention_heads, guided)
        keep, s = parts.residency, load.settings
        parts.torch_only("text_encoder", "its attention adds a learned bias for each distance")
        parts.torch_only("vae", "its attention has a single head of many channels")
        text = PromptEncoder.load(
            parts.path("tokenizer"),
            parts.path("text_encoder"),
            parts.dtype("text_encoder"),
            mesh.device,
            keep.keeper("text_encoder"),
            mesh.axis(s.tp_size),
        )
        parts.loaded(text.encoder)
        self._text = text
        first, second = TRANSFORMERS
        low = self._transformer(second) if second in parts.names else None
        self._experts = Experts(self._transformer(first), low)
        self.lora = parts.lora({first: self._experts.high, second: low}, WAN_ORIGINAL)
        vae, rows = parts.dtype("vae"), mesh.all if s.parallel_decode else None
        self._vae = Vae(parts.path("vae"), s, vae, mesh.device, keep.keeper("vae"), rows)
        parts.loaded(self._vae.module)
        self.together = s.parallel_decode
        self._takes_pictures = s.vae_config.load_encoder and has_encoder(parts.path("vae"))
        self._load_encoder = partial(VaeEncoder, parts.path("vae"), s, vae, mesh.device, keep.keeper("vae_encoder"))
        self._encoder: VaeEncoder | None = None
        self._check_widths()
        mesh.meet()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _transformer(self, name: str) -> WanTransformer:
        config = wan_config(self.parts.path(name) / "config.json")
        make = partial(WanTransformer, config, self.mesh)
        return self.parts.transformer(name, make, config.attention_head_dim)

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        latent, text = self._vae.channels, self._text.encoder.shared.embedding_dim
        if (latent, text) != (self._config.in_channels, self._config.text_dim):
            raise ModelError(
                f"the components do not fit: the transformer takes {self._config.in_channels} latent channels and text "
                f"of {self._config.text_dim}, the vae has {latent} channels, the text encoder makes {text}"
            )

    def encode(self, params: SamplingParams, pictures: Sequence[Image]) -> tuple[WanConditioning, list[str]]:
        self.parts.residency.need("text_encoder")
        length = params.max_sequence_length
        positive, note = self._text.encode(params.prompt, length)
        notes: list[str | None] = [note]
        negative = None
        if params.guidance_scale > 1:
            negative, note = self._text.encode(params.negative_prompt or "", length)
            notes.append(note and f"negative {note}")
        else:
            notes += self.unguided()
        ratio = self._boundary if params.boundary_ratio is None else params.boundary_ratio
        boundary = None if ratio is None else ratio * self.parts.train_steps
        counts = {"prompt_tokens": positive.shape[1], "latent_tokens": math.prod(self._grid(params))}
        condition = WanConditioning(positive, negative, length=length, boundary=boundary, **counts)
        return condition, [n for n in notes if n]

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        latent = [n * p for n, p in zip(self._grid(params), self._config.patch_size, strict=True)]
        shape = (1, self._config.in_channels, *latent)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def encode_frames(self, frames: Tensor, pulse: Callable[[], None]) -> Tensor:
        if self._encoder is None:  # most requests bring no picture
            self._encoder = self._load_encoder()
        self.parts.residency.need("vae_encoder")
        return self._encoder.encode(frames, pulse)

    def velocities(self, x: Tensor, t: Tensor, condition: WanConditioning) -> tuple[Tensor, Tensor | None]:
        expert = self._experts.at(t, condition.boundary)
        self.parts.residency.need(TRANSFORMERS[expert is self._experts.low])
        keys = self._read(expert, condition)
        if condition.negative is None:
            return self.predict(x, t, (expert, keys)), None
        if self.mesh.cfg.size == 2:
            positive, negative = self.mesh.cfg.gather(self.predict(x, t, (expert, keys)), 0).chunk(2)
            return positive, negative
        if math.prod(expert.grid(x)) > BATCH_TOKENS:
            return self.predict(x, t, (expert, keys.row(0))), self.predict(x, t, (expert, keys.row(1)))
        positive, negative = self.predict(x.expand(2, -1, -1, -1, -1), t, (expert, keys)).chunk(2)
        return positive, negative

    def predict(self, x: Tensor, t: Tensor, told: tuple[WanTransformer, TextKeys]) -> Tensor:
        expert, keys = told
        y: Tensor = expert(x, t, keys)
        return y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        ratio = self._boundary if params.boundary_ratio is None else params.boundary_ratio
        if ratio is None or params.guidance_scale_2 is None or float(t) >= ratio * self.parts.train_steps:
            return params.guidance_scale
        return params.guidance_scale_2

    def preview(self, x0: Tensor, pulse: Callable[[], None]) -> Tensor:
        return self.decode(x0[:, :, :1], pulse)  # the decoder is causal: the first latent frame is the first frame

    def frames(self, x: Tensor, pulse: Callable[[], None]) -> Tensor:
        return self._vae.decode(x, pulse)

    def _grid(self, params: SamplingParams) -> tuple[int, int, int]:
        """Patches of one output in time, height and width."""
        pt, ph, pw = self._config.patch_size
        frames = (params.num_frames - 1) // self._vae.temporal + 1
        side = self._vae.spatial
        return frames // pt, params.height // (side * ph), params.width // (side * pw)

    def _read(self, expert: WanTransformer, condition: WanConditioning) -> TextKeys:
        """Keys and values of the text for that expert; computed at its first step and kept till another's."""
        if expert not in condition.keys:
            condition.keys.clear()
            texts = [condition.positive, condition.negative]
            if condition.negative is not None and self.mesh.cfg.size == 2:
                texts = [texts[self.mesh.cfg.index]]
            text, bias = pad(texts, condition.length, self._fold_padding)
            condition.keys[expert] = expert.read(text, bias)
        return condition.keys[expert]

    def _describe(self) -> ModelInfo:
        pt, ph, pw = self._config.patch_size
        lacks = NO_TRUE_CFG | NO_NORMALIZATION
        if self._experts.low is None:
            reason = "this checkpoint has no second expert (transformer_2)"
            lacks |= dict.fromkeys(("guidance_scale_2", "boundary_ratio"), reason)
        return ModelInfo(
            name=self.parts.index["_class_name"],
            kind="video",
            defaults=self._defaults,
            size_multiple=self._vae.spatial * math.lcm(ph, pw),
            frame_multiple=self._vae.temporal * pt,
            components=self.parts.names,
            max_pictures=int(self._takes_pictures),
            unsupported=lacks,
            lora_targets=tuple(self.lora),
            degrees=attrs.asdict(self.parts.degrees),
            tasks=TEXT_TASKS + (PICTURE_TASKS if self._takes_pictures else ()),
            max_tokens=TEXT_TOKENS,
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        """Measured in float32: 12 copies of the latents; 6 numbers a pixel while frames are joined, and its 3 bytes."""
        c, tile, dtype = self._config, self._vae.tiling, self._experts.high.dtype
        text = self._text.encoder
        return self.parts.memory(
            base=2**25 + 4 * c.num_layers * TEXT_TOKENS * c.dim * dtype.itemsize,
            text_pair=4 * text.heads * text.shared.weight.element_size(),
            token=self.parts.token_bytes(c.dim, c.ffn_dim, dtype) + 48 * c.in_channels * math.prod(c.patch_size),
            paired_tokens=0 if self.mesh.cfg.size == 2 else 2 * BATCH_TOKENS,
            pixel=27,
            chunk_pixel=self._vae.chunk_pixel_bytes,
            chunk_pixels=CHUNK_PIXELS,
            tile_pixels=tile.height * tile.width if tile else None,
        )

    def _read_defaults(self, two_experts: bool) -> dict[str, Any]:
        """The folder's generation_config.json, else those of the known size."""
        if two_experts:
            return self.parts.defaults(WAN22_A14B | {"boundary_ratio": self._boundary})
        return self.parts.defaults(WAN21_SMALL if self._config.num_layers <= 30 else WAN21_LARGE)


def pad(texts: list[Tensor | None], length: int, fold: bool) -> tuple[Tensor, Tensor | None]:
    """Texts [1, n, C] as one batch [B, L, C], padded as the pipeline does: with zeros that attention does see.

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


def wan_config(file: Path) -> WanConfig:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError, NotBuilt: another architecture.
    """
    config: WanConfig = pick(read_json(file), WanConfig, file)
    if config.added_kv_proj_dim or config.image_dim or config.in_channels != config.out_channels:
        raise NotBuilt(f"{file}: a transformer with picture input is not built yet in this version of sgld")
    if config.qk_norm != "rms_norm_across_heads":
        raise ModelError(f"{file}: qk_norm is {config.qk_norm!r}; only 'rms_norm_across_heads' is supported")
    return config


def refuse_variants(folder: Path, index: dict[str, Any]) -> None:
    """Raise for what WanPipeline can be beside plain text-to-video."""
    if index.get("expand_timesteps"):
        raise NotBuilt(f"{folder}: expand_timesteps (Wan 2.2 TI2V) is not built yet in this version of sgld")
