"""FLUX.2 (Black Forest Labs 2025, https://bfl.ai/blog/flux-2): dev, which is told its guidance, and the small klein.

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Generator, Tensor, nn

from sgld import inputs
from sgld.errors import ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, ComponentLoader
from sgld.models.flux2_text import READERS, PromptEncoder
from sgld.models.flux2_vae import flux2_autoencoder
from sgld.nn.attention import Backend
from sgld.nn.blocks import Denoiser, Embedder, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.mmdit import JointAttention, Modulation, OutNorm, TokenLayout, finite, modulate, turned
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class Flux2Config:
    """Architecture numbers, as in transformer/config.json."""

    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    in_channels: int = 128
    out_channels: int | None = None
    patch_size: int = 1
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, int, int, int] = attrs.field(default=(32, 32, 32, 32), converter=tuple)
    rope_theta: int = 2000
    eps: float = 1e-6
    guidance_embeds: bool = True

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Channels inside a feed-forward layer."""
        return int(self.dim * self.mlp_ratio)


@attrs.frozen(eq=False)
class BranchInputs:
    """What one branch of guidance is told: a text [1, L, T], reference pictures as tokens [1, R, C], and the scale."""

    text: Tensor
    place: TokenLayout  # of the picture's tokens, and after them the references'
    references: Tensor
    guidance: float | None  # where it is embedded


@attrs.frozen
class Modulations:
    """Shifts, scales and gates [1, 1, C], which all blocks of a kind share."""

    picture: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


class SwiGLU(nn.Module):
    """Feed-forward layer with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_out(gated(self.linear_in(x)))
        return y


def gated(x: Tensor) -> Tensor:
    """[..., 2 C] -> [..., C]"""
    gate, y = x.chunk(2, -1)
    return F.silu(gate) * y


class FusedAttention(nn.Module):
    """Attention of picture and text to both, beside a feed-forward layer whose matrices are part of its own."""

    def __init__(self, c: Flux2Config, among: SequenceAttention):
        super().__init__()
        self.heads, self.among, self.split = c.num_attention_heads, among, (3 * c.dim, 2 * c.hidden)
        self.to_qkv_mlp_proj = nn.Linear(c.dim, sum(self.split), bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(c.attention_head_dim, c.eps), nn.RMSNorm(c.attention_head_dim, c.eps)
        self.to_out = nn.Linear(c.dim + c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor, text: Tensor, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """x [1, S/n, C] and text [1, L, C] to as much of both."""
        qkv, hidden = self.to_qkv_mlp_proj(x).split(self.split, -1)
        text_qkv, text_hidden = self.to_qkv_mlp_proj(text).split(self.split, -1)
        told = self._heads(text_qkv, place.text_rope)
        y, z = self.among.joint(*self._heads(qkv, place.rope), place.tokens, told)
        return self._join(y, hidden), self._join(z, text_hidden)

    def _heads(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(*qkv.shape[:-1], 3, self.heads, -1).unbind(-3)
        return turned(self.norm_q(q), rope), turned(self.norm_k(k), rope), v

    def _join(self, y: Tensor, hidden: Tensor) -> Tensor:
        joined: Tensor = self.to_out(torch.cat([y.flatten(2), gated(hidden)], -1))
        return joined


class DoubleBlock(nn.Module):
    """Two streams, each with weights of its own, that attend to both."""

    def __init__(self, c: Flux2Config, among: SequenceAttention):
        super().__init__()
        self.attn = JointAttention(c.dim, c.num_attention_heads, c.attention_head_dim, among, bias=False, eps=c.eps)
        self.ff, self.ff_context = SwiGLU(c.dim, c.hidden), SwiGLU(c.dim, c.hidden)

    def forward(self, x: Tensor, text: Tensor, mod: Modulations, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """x [1, S/n, C], text [1, L, C]"""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = mod.picture
        text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = mod.text
        y, z = self.attn(modulate(x, shift, scale), modulate(text, text_shift, text_scale), place)
        x, text = x + gate * y, text + text_gate * z
        x = x + ff_gate * self.ff(modulate(x, ff_shift, ff_scale))
        text = text + text_ff_gate * self.ff_context(modulate(text, text_ff_shift, text_ff_scale))
        return finite(x), finite(text)


class SingleBlock(nn.Module):
    """The same weights for picture and text."""

    def __init__(self, c: Flux2Config, among: SequenceAttention):
        super().__init__()
        self.attn = FusedAttention(c, among)

    def forward(self, x: Tensor, text: Tensor, mod: Modulations, place: TokenLayout) -> tuple[Tensor, Tensor]:
        """x [1, S/n, C], text [1, L, C]"""
        shift, scale, gate = mod.single
        y, z = self.attn(modulate(x, shift, scale), modulate(text, shift, scale), place)
        return finite(x + gate * y), finite(text + gate * z)


class TimeGuidanceEmbed(nn.Module):
    """Time in [0, 1000], and the guidance scale where it is embedded, to an embedding [1, C]."""

    def __init__(self, c: Flux2Config):
        super().__init__()
        self.channels = c.timestep_guidance_channels
        self.timestep_embedder = Embedder(self.channels, c.dim, F.silu, bias=False)
        if c.guidance_embeds:
            self.guidance_embedder = Embedder(self.channels, c.dim, F.silu, bias=False)

    def forward(self, t: Tensor, guidance: float | None) -> Tensor:
        dtype = self.timestep_embedder.linear_1.weight.dtype
        emb: Tensor = self.timestep_embedder(sinusoid(t.view(1), self.channels).to(dtype))
        if guidance is None:
            return emb
        scale = torch.tensor([1000 * guidance], device=t.device)
        return emb + self.guidance_embedder(sinusoid(scale, self.channels).to(dtype))  # type: ignore[no-any-return]


class Flux2Transformer(Denoiser):
    """Velocity of latents x [1, C, h, w] at one time."""

    def __init__(self, c: Flux2Config, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        among = SequenceAttention(mesh, backend)
        self.time_guidance_embed = TimeGuidanceEmbed(c)
        self.double_stream_modulation_img = Modulation(c.dim, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(c.dim, 6, bias=False)
        self.single_stream_modulation = Modulation(c.dim, 3, bias=False)
        self.x_embedder = nn.Linear(c.in_channels, c.dim, bias=False)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.dim, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(c, among) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(c, among) for _ in range(c.num_single_layers))
        self.norm_out = OutNorm(c.dim, bias=False)
        self.proj_out = nn.Linear(c.dim, c.in_channels, bias=False)

    def forward(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        split, own = self.mesh.tokens, x.flatten(2).mT  # [1, hw, C]
        emb = self.time_guidance_embed(t.to(x.device), told.guidance)
        mod = Modulations(
            self.double_stream_modulation_img(emb),
            self.double_stream_modulation_txt(emb),
            self.single_stream_modulation(emb),
        )
        y = self.x_embedder(split.shard(torch.cat([own, told.references], 1).to(self.dtype), 1))  # [1, S/n, D]
        text = self.context_embedder(told.text.to(self.dtype))  # [1, L, D]
        for block in self.walk(itertools.chain(self.transformer_blocks, self.single_transformer_blocks)):
            y, text = block(y, text, mod, told.place)
        y = split.gather(self.proj_out(self.norm_out(y, emb)), 1, told.place.tokens)
        return y[:, : own.shape[1]].mT.reshape(x.shape)


BLOCKS = ("transformer_blocks", "single_transformer_blocks")

FLUX2_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors'
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_guidance_embed\.timestep_embedder\.", "time_in."),
    (r"^time_guidance_embed\.guidance_embedder\.", "guidance_in."),
    (r"_in\.linear_1$", "_in.in_layer"),
    (r"_in\.linear_2$", "_in.out_layer"),
    (r"^((?:double|single)_stream_modulation\w*)\.linear$", r"\1.lin"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj$", r"single_blocks.\1.linear1"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.to_out$", r"single_blocks.\1.linear2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm_"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.attn\.to_q$", ".img_attn.qkv#0"),
    (r"\.attn\.to_k$", ".img_attn.qkv#1"),
    (r"\.attn\.to_v$", ".img_attn.qkv#2"),
    (r"\.attn\.add_q_proj$", ".txt_attn.qkv#0"),
    (r"\.attn\.add_k_proj$", ".txt_attn.qkv#1"),
    (r"\.attn\.add_v_proj$", ".txt_attn.qkv#2"),
    (r"\.attn\.to_out\.0$", ".img_attn.proj"),
    (r"\.attn\.to_add_out$", ".txt_attn.proj"),
    (r"\.attn\.norm_added_", ".txt_attn.norm_"),
    (r"\.attn\.norm_", ".img_attn.norm_"),
    (r"\.norm_q$", ".norm.query_norm.scale"),
    (r"\.norm_k$", ".norm.key_norm.scale"),
    (r"\.ff\.", ".img_mlp."),
    (r"\.ff_context\.", ".txt_mlp."),
    (r"_mlp\.linear_in$", "_mlp.0"),
    (r"_mlp\.linear_out$", "_mlp.2"),
)

# -------------------------------------------------------------------------------------------------- family

TEXT_TOKENS = 512
MAX_PICTURES = 10
REFERENCE_PIXELS, REFERENCE_SIDE, REFERENCE_ASPECT = 1024**2, 64, 8
REFERENCE_TIME = 10  # between one picture and the next

BASE = {
    "negative_prompt": "", "max_sequence_length": TEXT_TOKENS, "width": 1024, "height": 1024, "num_inference_steps": 50,
    "guidance_scale": 4.0,
}  # fmt: skip
DISTILLED = BASE | {"num_inference_steps": 4, "guidance_scale": 1.0}


class Flux2(NativeModel):
    """Flux2Pipeline (dev) and Flux2KleinPipeline checkpoints; both look at reference pictures."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        self.parts = parts = ComponentLoader(load, mesh, platform, progress)
        self.scheduler = parts.scheduler
        parts.needs_euler()
        name = parts.index["_class_name"]
        self._config = c = flux2_config(parts.path("transformer") / "config.json", name == "Flux2Pipeline")
        self._distilled = bool(parts.index.get("is_distilled"))
        self._defaults = parts.defaults(DISTILLED if self._distilled else BASE)
        guided = not c.guidance_embeds and self._defaults.get("guidance_scale", 1.0) > 1
        mesh = parts.share(c.num_attention_heads, guided)
        self._text = PromptEncoder(parts, READERS[name])
        make = partial(Flux2Transformer, c, mesh)
        self._transformer = parts.transformer("transformer", make, c.attention_head_dim, BLOCKS, crosses=False)
        self.lora = parts.lora({"transformer": self._transformer}, FLUX2_ORIGINAL)
        self._vae = flux2_autoencoder(parts)
        self.parallel_decode = load.settings.parallel_decode
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c = self._config
        takes, has = (c.in_channels, c.joint_attention_dim), (self._vae.channels, self._text.width)
        if takes != has:
            raise ModelError(
                f"the components do not fit: the transformer takes {takes[0]} latent channels and text of {takes[1]}, "
                f"the vae has {has[0]} channels, the text encoder makes {has[1]}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        clips = [reference(picture, self._vae.multiple) for picture in pictures]
        self.parts.offloader.need("text_encoder")
        text, note = self._text.encode(params.prompt, params.max_sequence_length)
        notes, guided = [note], self._scale(params) > 1
        negative = None
        if guided:
            raise_if_cancelled()
            negative, note = self._text.encode(params.negative_prompt or "", params.max_sequence_length)
            notes.append(note and f"negative {note}")
        else:
            notes += self.unguided(params)
        if guided and self._distilled:
            notes.append(f"guidance_scale: {params.guidance_scale}: this checkpoint was distilled to need none above 1")
        if clips:
            self.parts.offloader.need("vae")
        latents = []  # [1, C, h, w] each
        for clip in clips:
            raise_if_cancelled()
            latents.append(self._vae.encode(clip.to(self.mesh.device)))
        place = self._place(params, latents)
        tokens = torch.cat([text.new_empty(1, 0, self._vae.channels), *(z.flatten(2).mT for z in latents)], 1)
        told = BranchInputs(text, place, tokens, params.guidance_scale if self._config.guidance_embeds else None)
        condition = Conditioning(
            told,
            None if negative is None else attrs.evolve(told, text=negative),
            prompt_tokens=self._text.count(params.prompt),
            latent_tokens=place.tokens,
        )
        return condition, [n for n in notes if n]

    def _place(self, params: SamplingParams, references: Iterable[Tensor]) -> TokenLayout:
        """Tokens stand at (time, row, column, word): the picture at time 0, references after it, the text at words."""
        grids = [grid(0, params.height // self._vae.multiple, params.width // self._vae.multiple)]
        grids += [grid(REFERENCE_TIME * i, *z.shape[2:]) for i, z in enumerate(references, 1)]
        positions = torch.cat(grids)
        words = F.pad(torch.arange(params.max_sequence_length)[:, None], (3, 0))
        rope, text_rope = (
            rope_at(at.to(self.mesh.device), self._config.axes_dims_rope, self._config.rope_theta)
            for at in (positions, words)
        )
        return TokenLayout(self.mesh.tokens.shard(rope, 0), text_rope, len(positions))

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        multiple = self._vae.multiple
        shape = (1, self._config.in_channels, params.height // multiple, params.width // multiple)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        steps = params.num_inference_steps
        mu = empirical_mu(math.prod(x.shape[2:]), steps)
        return Schedule(params.flow_shift, mu, np.linspace(1, 1 / steps, steps).tolist())

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        y: Tensor = self._transformer(x, t, told)
        return y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return self._scale(params)

    def _scale(self, params: SamplingParams) -> float:
        """Of classifier-free guidance."""
        return (params.true_cfg_scale or 1.0) if self._config.guidance_embeds else params.guidance_scale

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x, raise_if_cancelled)

    def _describe(self) -> ModelInfo:
        takes_pictures = self.parts.settings.vae_config.load_encoder
        return self.model_info(
            kind="image",
            defaults=self._defaults,
            size_multiple=self._vae.multiple,
            frame_multiple=1,
            unsupported=NO_NORMALIZATION | ({} if self._config.guidance_embeds else NO_TRUE_CFG),
            tasks=("text-to-image", "image-to-image")[: 1 + takes_pictures],
            max_tokens=TEXT_TOKENS,
            memory=self._memory(),
            pictures=PictureRule(max=MAX_PICTURES * takes_pictures, starts_denoising=False, may_enlarge=False),
        )

    def _memory(self) -> Memory:
        """The text is always padded to its full length, and is hidden states of all layers while it is read."""
        c, dtype = self._config, self._transformer.dtype
        token = self.parts.token_bytes(c.dim, 2 * c.hidden, dtype) + 48 * c.in_channels
        text = TEXT_TOKENS * (self._text.reader.layers[-1] + 20) * self._text.model.config.hidden_size
        return self.parts.memory(
            self._vae.tiling,
            base=2**25 + TEXT_TOKENS * token + text * self._text.model.dtype.itemsize,
            token=token,
            picture=REFERENCE_PIXELS // self._vae.multiple**2 * token,
            pixel=27,
            picture_pixels=REFERENCE_PIXELS,
            chunk_pixel=self._vae.pixel_bytes,
        )


def grid(time: int, rows: int, columns: int) -> Tensor:
    """Positions [rows * columns, 4] of one picture's tokens."""
    one = torch.zeros(1, dtype=torch.int64)
    return torch.cartesian_prod(one + time, torch.arange(rows), torch.arange(columns), one)


def reference(picture: Image, multiple: int) -> Tensor:
    """A reference picture [1, 3, H, W] in [-1, 1], scaled to a megapixel at most and cut to multiples.

    Raises:
        BadRequest: too small, or too long.
    """
    width, height = picture.size
    if min(width, height) < REFERENCE_SIDE:
        raise inputs.refused(picture, f"is too small; each side needs {REFERENCE_SIDE} or more")
    if max(width, height) > REFERENCE_ASPECT * min(width, height):
        raise inputs.refused(picture, f"is too long; one side may be {REFERENCE_ASPECT} times the other")
    if width * height > REFERENCE_PIXELS:
        scale = math.sqrt(REFERENCE_PIXELS / (width * height))
        picture = picture.resize((int(width * scale), int(height * scale)), Resampling.LANCZOS)
    width, height = (side // multiple * multiple for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = torch.from_numpy(np.array(picture.crop((left, top, left + width, top + height))))  # [H, W, 3]
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def empirical_mu(tokens: int, steps: int) -> float:
    """The time shift that the authors found to suit so many tokens and steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def flux2_config(file: Path, embeds: bool) -> Flux2Config:
    """The numbers of a transformer's config.json; `embeds` says whether the pipeline embeds guidance.

    Raises:
        ModelError: another architecture.
    """
    c: Flux2Config = pick(read_json(file), Flux2Config, file)
    only = {"patch_size": 1, "out_channels": c.in_channels, "eps": 1e-6, "guidance_embeds": embeds}
    for key, needed in only.items():
        if (value := getattr(c, key)) not in (needed, None):
            raise ModelError(f"{file}: {key}: {value!r} is not supported; only {needed!r}")
    return c
