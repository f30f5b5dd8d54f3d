"""Wan (Wan Team 2025, https://arxiv.org/abs/2503.20314): video from text and from a picture.

Wan 2.1; the two experts of Wan 2.2; TI2V-5B, whose tokens have times of their own; few-step models such as FastWan.
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
from sgld.errors import BadRequest, ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, Schedule
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, ComponentLoader, NativeModel
from sgld.models.text import PromptEncoder, pad
from sgld.models.vae import CHUNK_PIXELS, Vae, vae_config
from sgld.models.vae_encoder import VaeEncoder, has_encoder
from sgld.models.wan_defaults import SHIFT, TEXT_TOKENS, Form, defaults, few_steps, levels_of
from sgld.models.wan_pictures import MASK_CHANNELS, NOTHING, ImageConditioning, ImageEncoder, channels_of, clip_of, cut
from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import Denoiser, Embedder, FeedForward, gelu_tanh, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.norm import LayerNorm32
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d, rotate
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json, require
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
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
    def beside(self) -> int:
        """Channels of a picture that come beside the latents'."""
        return self.in_channels - self.out_channels

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Share of a head's channels that turn with time, height and width."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side


Pair = tuple[Tensor, Tensor]  # keys and values [B, L, H, D]


@attrs.frozen
class CrossAttentionKV:
    """Keys and values of text and picture for one block."""

    text: Pair
    picture: Pair | None

    def row(self, i: int) -> CrossAttentionKV:
        """Of one prompt of the batch; the picture is that of all."""
        k, v = self.text
        return CrossAttentionKV((k[i : i + 1], v[i : i + 1]), self.picture)


@attrs.frozen
class TextKeys:
    """What every block is told: it is the same at every step."""

    layers: list[CrossAttentionKV]
    bias: Tensor | None  # [B, 1, 1, L], for the text

    def row(self, i: int) -> TextKeys:
        """That of one prompt of the batch."""
        return TextKeys([told.row(i) for told in self.layers], None if self.bias is None else self.bias[i : i + 1])


@attrs.frozen
class TimeModulation:
    """What K times say: to all tokens the same, or to each token of this rank what its row of `rows` says."""

    emb: Tensor  # [K, C]
    mod: Tensor  # [K, 6, C]
    rows: Tensor | None  # [S/n]

    def spread(self, x: Tensor) -> Tensor:
        """[K, C] -> [1, 1 or S/n, C]"""
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

    def to_itself(self, x: Tensor, rope: Tensor, tokens: int) -> Tensor:
        q = rotate(self.split(self.norm_q(self.to_q(x))), rope)
        k = rotate(self.split(self.norm_k(self.to_k(x))), rope)
        return self.join(self.among(q, k, self.split(self.to_v(x)), tokens))

    def to_condition(self, x: Tensor, told: CrossAttentionKV, bias: Tensor | None) -> Tensor:
        q = self.split(self.norm_q(self.to_q(x)))
        y = self.attend(q, *told.text, bias)
        if told.picture is not None:
            k, v = (part.expand(len(q), -1, -1, -1) for part in told.picture)
            y = y + self.attend(q, k, v, None)
        return self.join(y)

    def read(self, text: Tensor, picture: Tensor | None) -> CrossAttentionKV:
        """Keys and values of text [B, L, C] and picture [1, M, C]."""
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
        told: CrossAttentionKV,
        bias: Tensor | None,
    ) -> Tensor:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (self.scale_shift_table + modulation.mod).unbind(1)  # [K, C]
        at = modulation.spread
        y = self.attn1.to_itself(torch.addcmul(at(shift), self.norm1(x), at(1 + scale)).type_as(x), rope, tokens)
        x = torch.addcmul(x.float(), y.float(), at(gate)).type_as(x)
        x = x + self.attn2.to_condition(self.norm2(x).type_as(x), told, bias)
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


class ConditionEmbedder(nn.Module):
    """Time, text and picture to the width of the blocks."""

    def __init__(self, c: WanConfig):
        super().__init__()
        self.freq_dim = c.freq_dim
        self.time_embedder = Embedder(c.freq_dim, c.dim, F.silu)
        self.time_proj = nn.Linear(c.dim, 6 * c.dim)
        self.text_embedder = Embedder(c.text_dim, c.dim, gelu_tanh)
        if c.image_dim is not None:
            self.image_embedder = ImageEmbedding(c.image_dim, c.dim, c.pos_embed_seq_len)

    def time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [K] -> [K, C] and [K, 6, C]"""
        emb = self.time_embedder(sinusoid(t, self.freq_dim).to(self.time_embedder.linear_1.weight))
        emb = emb.to(self.time_proj.weight)
        return emb, self.time_proj(F.silu(emb)).unflatten(1, (6, -1))


class WanTransformer(Denoiser):
    """Velocity of latents x [B, C, T, H, W] at one time, told by the keys and values of B prompts.

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

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def read(self, text: Tensor, bias: Tensor | None = None, picture: Tensor | None = None) -> TextKeys:
        """What text [B, L, C], with a bias [B, 1, 1, L] on the logits, and a picture [1, M, D] tell every block."""
        embed = self.condition_embedder
        text = embed.text_embedder(text.to(self.dtype))
        if picture is not None:
            picture = embed.image_embedder(picture.to(self.dtype))
        told = [block.attn2.read(text, picture) for block in self._blocks]
        return TextKeys(told, None if bias is None else bias.to(text))

    def forward(self, x: Tensor, t: Tensor, text: TextKeys, clean_frames: int = 0) -> Tensor:
        grid = self.grid(x)
        split, tokens = self.mesh.tokens, math.prod(grid)
        rope = split.shard(rope_3d(grid, self.config.rope_dims, x.device), 0)  # [S/n, D/2]
        modulation = self.modulation(t.view(1).to(x.device), grid, clean_frames)
        h = split.shard(self.patch_embedding(x.to(self.dtype)).flatten(2).mT.contiguous(), 1)  # [B, S/n, C]
        for block, told in zip(self._blocks, text.layers, strict=True):
            h = block(h, modulation, rope, tokens, told, text.bias)
        shift, scale = (modulation.spread(x) for x in (self.scale_shift_table + modulation.emb[:, None]).unbind(1))
        h = self.proj_out(torch.addcmul(shift.float(), self.norm_out(h), 1 + scale.float()).type_as(h))
        return self.unpatch(split.gather(h, 1, tokens), grid)

    def modulation(self, t: Tensor, grid: tuple[int, int, int], clean_frames: int) -> TimeModulation:
        """What time t [1] says to the tokens of a grid whose first `clean_frames` latent frames are at time 0."""
        rows = None
        if clean_frames:
            t = torch.cat([t, torch.zeros_like(t)])
            frame = torch.arange(math.prod(grid), device=t.device) // (grid[1] * grid[2])
            rows = self.mesh.tokens.shard((frame * self.config.patch_size[0] < clean_frames).long(), 0)  # [S/n]
        emb, mod = self.condition_embedder.time(t)
        return TimeModulation(emb, mod.float(), rows)

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

TEXT_TASKS, PICTURE_TASKS = ("text-to-video", "text-to-image"), ("image-to-video", "image-to-image")
UNUSED = ("attn2.norm_added_q", "to_gate_compress")  # of a block: what nothing reads, and a sparse kernel's gate
PRECISE = ("time_embedder", "scale_shift_table", "norm1", "norm2")  # float32 in every precision, as with diffusers
FEW_STEP_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}
BATCH_TOKENS = 4096  # up to so many tokens, guidance runs as one batch of two

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
    """Text [1, n, C] of the prompt and the negative prompt, without padding; and what is shown of a picture."""

    length: int = attrs.field(kw_only=True)  # tokens with padding
    boundary: float | None = attrs.field(kw_only=True)  # time below which the second expert takes over
    shown: ImageConditioning = attrs.field(kw_only=True)
    keys: dict[WanTransformer, TextKeys] = attrs.field(factory=dict, init=False)  # of the expert at work


@attrs.frozen
class Experts:
    """One transformer, or the two of Wan 2.2: for high noise, and below the boundary for low noise."""

    high: WanTransformer
    low: WanTransformer | None

    def at(self, t: Tensor, boundary: float | None) -> WanTransformer:
        """The one in charge at time t."""
        return self.high if self.low is None or boundary is None or float(t) >= boundary else self.low


class Wan(NativeModel):
    """Wan checkpoints, of four kinds of pipeline.

    To a transformer with text input a picture is where denoising begins; others look at it.
    """

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        self.parts = parts = ComponentLoader(load, mesh, platform, progress, few_steps=True)
        self._fold_padding = platform.biased_attention_is_fast
        s, index = load.settings, parts.index
        self._boundary: float | None = index.get("boundary_ratio")
        self._steps = few_steps(s.model_path, index["_class_name"], s.dmd_denoising_steps)
        self.scheduler = parts.scheduler if self._steps is None else FEW_STEP_SCHEDULER
        self._config = wan_config(parts.path("transformer") / "config.json")
        self._expands = bool(index.get("expand_timesteps", vae_config(parts.path("vae") / "config.json").is_residual))
        self._defaults = self._read_defaults()
        guided = self._defaults.get("guidance_scale", SamplingParams().guidance_scale) > 1
        mesh = parts.share(self._config.num_attention_heads, guided)
        keep = parts.offloader
        parts.torch_only("text_encoder", "its attention adds a learned bias for each distance")
        parts.torch_only("vae", "its attention has a single head of many channels")
        name, axis = "text_encoder", mesh.axis(s.tp_size)
        self._text = PromptEncoder.load(
            parts.path("tokenizer"), parts.path(name), parts.dtype(name), mesh.device, keep.keeper(name), axis
        )
        parts.loaded(self._text.encoder)
        first, second = TRANSFORMERS
        low = self._transformer(second) if second in parts.names else None
        self._experts = Experts(self._transformer(first), low)
        self.lora = parts.lora({first: self._experts.high, second: low}, WAN_ORIGINAL)
        vae, rows = parts.dtype("vae"), mesh.all if s.parallel_decode else None
        self._vae = Vae(parts.path("vae"), s, vae, mesh.device, keep.keeper("vae"), rows)
        parts.loaded(self._vae.module)
        self.parallel_decode = s.parallel_decode
        self._takes_pictures = s.vae_config.load_encoder and has_encoder(parts.path("vae"))
        self._load_encoder = partial(VaeEncoder, parts.path("vae"), s, vae, mesh.device, keep.keeper("vae_encoder"))
        self._encoder: VaeEncoder | None = None
        self._check_widths()
        self._image_encoder = self._load_image_encoder()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _transformer(self, name: str) -> WanTransformer:
        config = wan_config(self.parts.path(name) / "config.json")
        make = partial(WanTransformer, config, self.mesh)
        unused = [f"blocks.{i}.{layer}." for i in range(config.num_layers) for layer in UNUSED]
        return self.parts.transformer(name, make, config.attention_head_dim, unused=unused, precise=PRECISE)

    def _load_image_encoder(self) -> ImageEncoder | None:
        """The one that the transformer has an input for.

        Raises:
            ModelError: the model lacks it, or the VAE's encoder, which a transformer that looks at pictures needs.
        """
        if self._config.beside and not self._takes_pictures:
            raise ModelError(
                f"{self.parts.path('vae')}: this model cannot work without the VAE's encoder; it is missing, or "
                "vae_config.load_encoder leaves it out"
            )
        if self._config.image_dim is None:
            return None
        for name in ("image_encoder", "image_processor"):
            if name not in self.parts.names:
                raise ModelError(f"{self.parts.folder / 'model_index.json'}: lacks {name}")
        return ImageEncoder(self.parts)

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c, latent, text = self._config, self._vae.channels, self._text.encoder.shared.embedding_dim
        if (latent, text) != (c.out_channels, c.text_dim):
            raise ModelError(
                f"the components do not fit: the transformer takes {c.out_channels} latent channels and text "
                f"of {c.text_dim}, the vae has {latent} channels, the text encoder makes {text}"
            )

    @property
    def _looks(self) -> bool:
        """Whether the transformer is shown pictures."""
        return bool(self._config.beside) or self._expands

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[WanConditioning, list[str]]:
        self.parts.offloader.need("text_encoder")
        length = params.max_sequence_length
        positive, note = self._text.encode(params.prompt, length)
        notes: list[str | None] = [note]
        negative = None
        if params.guidance_scale > 1:
            raise_if_cancelled()
            negative, note = self._text.encode(params.negative_prompt or "", length)
            notes.append(note and f"negative {note}")
        else:
            notes += self.unguided(params)
        boundary = self._boundary_time(params)
        counts = {"prompt_tokens": positive.shape[1], "latent_tokens": math.prod(self._grid(params))}
        shown = self._look(pictures, params, raise_if_cancelled) if pictures else NOTHING
        condition = WanConditioning(positive, negative, length=length, boundary=boundary, shown=shown, **counts)
        return condition, [n for n in notes if n]

    def _look(
        self, pictures: Sequence[Image], params: SamplingParams, raise_if_cancelled: Callable[[], None]
    ) -> ImageConditioning:
        """What the transformer is shown of pictures, which are cut to the size of the output."""
        pictures, frames, encode = cut(pictures, params.width, params.height), params.num_frames, self.encode_frames
        if self._expands:
            return ImageConditioning(first=encode(clip_of(pictures, 1), raise_if_cancelled))
        if frames < len(pictures):
            raise BadRequest(f"num_frames: {frames}: it is too few for {len(pictures)} pictures", "num_frames")
        tokens = None if self._image_encoder is None else self._image_encoder.encode(pictures)
        return ImageConditioning(
            channels_of(pictures, frames, partial(encode, raise_if_cancelled=raise_if_cancelled)), tokens=tokens
        )

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        latent = [n * p for n, p in zip(self._grid(params), self._config.patch_size, strict=True)]
        shape = (1, self._vae.channels, *latent)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        if self._steps is None:
            return Schedule(params.flow_shift)
        sigmas = levels_of(self._steps, self.parts.train_steps, params.flow_shift or SHIFT)
        return Schedule(sigmas=sigmas, exact=True, times=self._steps)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        if self._encoder is None:  # most requests bring no picture
            self._encoder = self._load_encoder()
        self.parts.offloader.need("vae_encoder")
        return self._encoder.encode(frames, raise_if_cancelled)

    def velocities(self, x: Tensor, t: Tensor, condition: WanConditioning) -> tuple[Tensor, Tensor | None]:
        expert = self._experts.at(t, condition.boundary)
        self.parts.offloader.need(TRANSFORMERS[expert is self._experts.low])
        keys, clean_frames = self._read(expert, condition), condition.shown.clean_frames
        x = condition.shown.beside(x)
        if condition.negative is None:
            return self.predict(x, t, (expert, keys, clean_frames)), None
        if self.mesh.cfg.size == 2:
            positive, negative = self.mesh.cfg.gather(self.predict(x, t, (expert, keys, clean_frames)), 0).chunk(2)
            return positive, negative
        if math.prod(expert.grid(x)) > BATCH_TOKENS:
            return self.predict(x, t, (expert, keys.row(0), clean_frames)), self.predict(
                x, t, (expert, keys.row(1), clean_frames)
            )
        positive, negative = self.predict(x.expand(2, -1, -1, -1, -1), t, (expert, keys, clean_frames)).chunk(2)
        return positive, negative

    def predict(self, x: Tensor, t: Tensor, told: tuple[WanTransformer, TextKeys, int]) -> Tensor:
        expert, keys, clean_frames = told
        y: Tensor = expert(x, t, keys, clean_frames)
        return y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        boundary = self._boundary_time(params)
        if boundary is None or params.guidance_scale_2 is None or float(t) >= boundary:
            return params.guidance_scale
        return params.guidance_scale_2

    def _boundary_time(self, params: SamplingParams) -> float | None:
        """Where the second expert takes over."""
        ratio = self._boundary if params.boundary_ratio is None else params.boundary_ratio
        return None if ratio is None else ratio * self.parts.train_steps

    def finalize_latents(self, x: Tensor, condition: WanConditioning) -> Tensor:
        return condition.shown.finalize_latents(x)

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        shown = 2 if self._looks else 1  # the first frame would be the picture; the decoder is causal
        return self.decode(x0[:, :, :shown], raise_if_cancelled)[-1:]

    def frames(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x, raise_if_cancelled)

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
            condition.keys[expert] = expert.read(text, bias, condition.shown.tokens)
        return condition.keys[expert]

    def _describe(self) -> ModelInfo:
        pt, ph, pw = self._config.patch_size
        least, most = self._pictures()
        return self.describe(
            kind="video",
            defaults=self._defaults,
            size_multiple=self._vae.spatial * math.lcm(ph, pw),
            frame_multiple=self._vae.temporal * pt,
            pictures=PictureRule(least, most, starts_denoising=not self._looks),
            fixed_steps=None if self._steps is None else len(self._steps),
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=(() if least else TEXT_TASKS) + (PICTURE_TASKS[: 1 if self._looks else 2] if most else ()),
            max_tokens=TEXT_TOKENS,
            memory=self._memory(),
        )

    def _pictures(self) -> tuple[int, int]:
        """How many it takes, at least and at most: without CLIP a second one may be the last frame."""
        c = self._config
        if not c.beside:
            return 0, int(self._takes_pictures)
        return (2, 2) if c.pos_embed_seq_len else (1, 1 if c.image_dim else 2)

    def _memory(self) -> Memory:
        """Measured in float32: 12 copies of the latents; 6 numbers a pixel while frames are joined, and its 3 bytes.

        Times of their own take two vectors for each token.
        """
        c, dtype = self._config, self._experts.high.dtype
        text = self._text.encoder
        return self.parts.memory(
            self._vae.tiling,
            base=2**25 + 4 * c.num_layers * TEXT_TOKENS * c.dim * dtype.itemsize,
            text_pair=4 * text.heads * text.shared.weight.element_size(),
            token=self.parts.token_bytes(c.dim, c.ffn_dim, dtype)
            + 48 * c.in_channels * math.prod(c.patch_size)
            + 8 * c.dim * self._expands,
            paired_tokens=0 if self.mesh.cfg.size == 2 else 2 * BATCH_TOKENS,
            pixel=27,
            chunk_pixel=self._vae.chunk_pixel_bytes,
            chunk_pixels=CHUNK_PIXELS,
        )

    def _read_defaults(self) -> dict[str, Any]:
        """The folder's generation_config.json, else those of the name, or of what it is made of."""
        experts = 1 + ("transformer_2" in self.parts.names)
        form = Form(self._config.num_layers, experts, bool(self._config.beside), self._expands, self._steps)
        known = defaults(self.parts.settings.model_path, form)
        return self.parts.defaults(known | ({"boundary_ratio": self._boundary} if experts == 2 else {}))


def wan_config(file: Path) -> WanConfig:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    given = read_json(file)
    require(given, file, {"qk_norm": "rms_norm_across_heads"})
    config: WanConfig = pick(given, WanConfig, file)
    known = config.out_channels, 2 * config.out_channels + MASK_CHANNELS
    if config.in_channels not in known:
        raise ModelError(
            f"{file}: in_channels: {config.in_channels} is not supported; only {known[0]}, or {known[1]} with a picture"
        )
    return config
