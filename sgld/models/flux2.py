"""FLUX.2 (Black Forest Labs 2025, https://bfl.ai/blog/flux-2): dev, which embeds its guidance, and the small klein.

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from sgld import inputs
from sgld.errors import ModelError
from sgld.models import names
from sgld.models.base import Conditioning, DiffusionModel, EncodedText, EncodeRequest, Schedule, never_cancelled
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, Component
from sgld.models.flux2_text import READERS, ChatText
from sgld.models.flux2_vae import Flux2Autoencoder, Flux2Tiny, flux2_autoencoder
from sgld.nn.attention import Backend
from sgld.nn.blocks import DiffusionTransformer, TimestepEmbedder
from sgld.nn.mmdit import JointAttention, Modulation, OutNorm, TokenLayout, finite, modulate, turned
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class Flux2Config(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"patch_size": 1, "eps": 1e-6}

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
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Return the channels inside a feed-forward layer."""
        return int(self.dim * self.mlp_ratio)

    def fault(self) -> str | None:
        if self.out_channels in (None, self.in_channels):
            return None
        return f"out_channels: {self.out_channels!r} is not supported; only {self.in_channels!r}"


@attrs.frozen(eq=False)
class Flux2Inputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, L, T]
    layout: TokenLayout  # of the latents, and after them the reference pictures
    references: Tensor | None  # tokens [1, R, C] of the reference pictures
    guidance: float | None  # the scale, where it is embedded


@attrs.frozen
class Modulations:
    """Shifts, scales and gates [1, 1, C], which all blocks of a kind share."""

    picture: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]


class Flux2FeedForward(nn.Module):
    """SwiGLU, a feed-forward layer with a gate (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear_in, self.linear_out = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(gated(self.linear_in(x)))  # type: ignore[no-any-return]


def gated(x: Tensor) -> Tensor:
    """Gate one half of the channels [..., 2 C] by the other, to [..., C]."""
    gate, y = x.chunk(2, -1)
    return F.silu(gate) * y


class FusedAttention(nn.Module):
    """Attention of picture and text to both, beside a feed-forward layer whose matrices are part of its own."""

    def __init__(self, c: Flux2Config, attention: SequenceAttention):
        super().__init__()
        self.heads, self.attention, self.split = c.num_attention_heads, attention, (3 * c.dim, 2 * c.hidden)
        self.to_qkv_mlp_proj = nn.Linear(c.dim, sum(self.split), bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(c.attention_head_dim, c.eps), nn.RMSNorm(c.attention_head_dim, c.eps)
        self.to_out = nn.Linear(c.dim + c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor, text: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Attend from picture x [1, S/n, C] and text [1, L, C] to both."""
        qkv, hidden = self.to_qkv_mlp_proj(x).split(self.split, -1)
        text_qkv, text_hidden = self.to_qkv_mlp_proj(text).split(self.split, -1)
        text_heads = self._heads(text_qkv, layout.text_rope)
        y, z = self.attention.joint(*self._heads(qkv, layout.rope), layout.tokens, text_heads)
        return self._join(y, hidden), self._join(z, text_hidden)

    def _heads(self, qkv: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.view(*qkv.shape[:-1], 3, self.heads, -1).unbind(-3)
        return turned(self.norm_q(q), rope), turned(self.norm_k(k), rope), v

    def _join(self, y: Tensor, hidden: Tensor) -> Tensor:
        return self.to_out(torch.cat([y.flatten(2), gated(hidden)], -1))  # type: ignore[no-any-return]


class Flux2DoubleBlock(nn.Module):
    """Two streams, each with weights of its own, that attend to both."""

    def __init__(self, c: Flux2Config, attention: SequenceAttention):
        super().__init__()
        self.attn = JointAttention(c.dim, c.num_attention_heads, c.attention_head_dim, attention, bias=False, eps=c.eps)
        self.ff, self.ff_context = Flux2FeedForward(c.dim, c.hidden), Flux2FeedForward(c.dim, c.hidden)

    def forward(self, x: Tensor, text: Tensor, mod: Modulations, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Return picture x [1, S/n, C] and text [1, L, C] after the block."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate = mod.picture
        text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = mod.text
        y, z = self.attn(modulate(x, shift, scale), modulate(text, text_shift, text_scale), layout)
        x, text = x + gate * y, text + text_gate * z
        x = x + ff_gate * self.ff(modulate(x, ff_shift, ff_scale))
        text = text + text_ff_gate * self.ff_context(modulate(text, text_ff_shift, text_ff_scale))
        return finite(x), finite(text)


class Flux2SingleBlock(nn.Module):
    """One stream, with the same weights for picture and text."""

    def __init__(self, c: Flux2Config, attention: SequenceAttention):
        super().__init__()
        self.attn = FusedAttention(c, attention)

    def forward(self, x: Tensor, text: Tensor, mod: Modulations, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Return picture x [1, S/n, C] and text [1, L, C] after the block."""
        shift, scale, gate = mod.single
        y, z = self.attn(modulate(x, shift, scale), modulate(text, shift, scale), layout)
        return finite(x + gate * y), finite(text + gate * z)


class TimeGuidanceEmbed(nn.Module):
    """The embedding [1, C] of time, and of the guidance scale where the checkpoint embeds it."""

    def __init__(self, c: Flux2Config):
        super().__init__()
        size = c.timestep_guidance_channels, c.dim
        self.timestep_embedder = TimestepEmbedder(*size, bias=False)
        self.guidance_embedder = TimestepEmbedder(*size, bias=False) if c.guidance_embeds else None

    def forward(self, t: Tensor, guidance: float | None) -> Tensor:
        """Embed t [1] in [0, 1000], and a guidance scale."""
        emb: Tensor = self.timestep_embedder(t)
        if self.guidance_embedder is not None:
            assert guidance is not None
            emb = emb + self.guidance_embedder(torch.full_like(t, 1000 * guidance, dtype=torch.float32))
        return emb


class Flux2Transformer(DiffusionTransformer):
    """Predicts the velocity of latents x [1, C, h, w] at one time."""

    def __init__(self, c: Flux2Config, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        attention = SequenceAttention(mesh, backend)
        self.time_guidance_embed = TimeGuidanceEmbed(c)
        self.double_stream_modulation_img = Modulation(c.dim, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(c.dim, 6, bias=False)
        self.single_stream_modulation = Modulation(c.dim, 3, bias=False)
        self.x_embedder = nn.Linear(c.in_channels, c.dim, bias=False)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.dim, bias=False)
        self.transformer_blocks = nn.ModuleList(Flux2DoubleBlock(c, attention) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            Flux2SingleBlock(c, attention) for _ in range(c.num_single_layers)
        )
        self.norm_out = OutNorm(c.dim, bias=False)
        self.proj_out = nn.Linear(c.dim, c.in_channels, bias=False)

    def forward(self, x: Tensor, t: Tensor, branch: Flux2Inputs, step: StepContext) -> Tensor:
        """Predict for latents x [1, C, h, w] at time t in [0, 1000]."""
        split, own = self.mesh.tokens, x.flatten(2).mT  # [1, hw, C]
        emb = self.time_guidance_embed(t.view(1).to(x.device), branch.guidance)
        mod = Modulations(
            self.double_stream_modulation_img(emb),
            self.double_stream_modulation_txt(emb),
            self.single_stream_modulation(emb),
        )
        tokens = torch.cat([own] if branch.references is None else [own, branch.references], 1)
        h = self.x_embedder(split.shard(tokens.to(self.compute_dtype), 1))  # [1, S/n, D]
        text = self.context_embedder(branch.text.to(self.compute_dtype))  # [1, L, D]

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, mod, branch.layout)  # type: ignore[no-any-return]

        h, _ = self.runner.run([*self.transformer_blocks, *self.single_transformer_blocks], (h, text), call, step)
        y = split.gather(self.proj_out(self.norm_out(h, emb)), 1, branch.layout.tokens)
        return y[:, : own.shape[1]].mT.reshape(x.shape)


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


class Flux2(DiffusionModel):
    """Flux2Pipeline (dev) and Flux2KleinPipeline checkpoints; both see reference pictures."""

    architecture = Component(
        Flux2Transformer, Flux2Config, ("transformer_blocks", "single_transformer_blocks"), crosses=False
    )
    lora_names = names.FLUX2
    patch = (1, 1)

    config: Flux2Config
    vae: Flux2Autoencoder | Flux2Tiny

    @property
    def is_distilled(self) -> bool:
        """Return true for a model that needs neither guidance nor many steps."""
        return bool(self.parts.index.get("is_distilled"))

    def known_defaults(self) -> Mapping[str, object]:
        return DISTILLED if self.is_distilled else BASE

    def load_components(self) -> None:
        pipeline, embeds = self.parts.index["_class_name"], self.config.guidance_embeds
        if embeds != (pipeline == "Flux2Pipeline"):
            file = self.parts.path("transformer") / "config.json"
            raise ModelError(f"{file}: guidance_embeds: {embeds!r} is not supported; only {not embeds!r}")
        self.text = ChatText.load(self.parts, READERS[pipeline])
        self.text_encoders = (self.text,)
        self.vae = flux2_autoencoder(self.parts)

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        return (c.in_channels, self.vae.channels), ((c.joint_attention_dim, self.text.width),)

    def encode(
        self,
        params: SamplingParams,
        pictures: Sequence[Image],
        raise_if_cancelled: Callable[[], None] = never_cancelled,
    ) -> tuple[Conditioning, list[str]]:
        """Encode as the template does; reference pictures count among the latent tokens."""
        condition, notes = super().encode(params, pictures, raise_if_cancelled)
        if condition.negative is not None and self.is_distilled:
            notes.append(f"guidance_scale: {params.guidance_scale}: this checkpoint was distilled to need none above 1")
        return attrs.evolve(condition, latent_tokens=condition.positive.layout.tokens), notes

    def encode_pictures(self, request: EncodeRequest) -> list[Tensor]:
        """Encode reference pictures to latents [1, C, h, w] each."""
        references = [reference(picture, self.vae.multiple) for picture in request.pictures]
        self.parts.offloader.need("vae")
        latents = []
        for pixels in references:
            request.raise_if_cancelled()
            latents.append(self.vae.encode(pixels.to(self.mesh.device)))
        return latents

    def branch(
        self, texts: Sequence[EncodedText], pictures: Sequence[Tensor] | None, params: SamplingParams
    ) -> Flux2Inputs:
        c, text, latents = self.config, texts[0].states, pictures or ()
        tokens = torch.cat([z.flatten(2).mT for z in latents], 1) if latents else None
        return Flux2Inputs(
            text, self.layout(params, latents), tokens, params.guidance_scale if c.guidance_embeds else None
        )

    def layout(self, params: SamplingParams, references: Sequence[Tensor]) -> TokenLayout:
        """Lay tokens out by (time, row, column, word): the output at time 0, references after it, the text by words."""
        c, grids = self.config, [grid(0, *self.latent_shape(params)[2:])]
        grids += [grid(REFERENCE_TIME * i, *z.shape[2:]) for i, z in enumerate(references, 1)]
        positions = torch.cat(grids)
        words = F.pad(torch.arange(params.max_sequence_length)[:, None], (3, 0))
        rope, text_rope = (
            rope_at(at.to(self.mesh.device), c.axes_dims_rope, c.rope_theta) for at in (positions, words)
        )
        return TokenLayout(self.mesh.tokens.shard(rope, 0), text_rope, len(positions))

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        side = self.vae.multiple
        return 1, self.config.in_channels, params.height // side, params.width // side

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        steps = params.num_inference_steps
        return Schedule.even(steps, params.flow_shift, empirical_mu(self.latent_tokens(params), steps))

    def guidance_scale(self, params: SamplingParams) -> float:
        return (params.true_cfg_scale or 1.0) if self.config.guidance_embeds else params.guidance_scale

    def forward(self, x: Tensor, t: Tensor, branch: Flux2Inputs, step: StepContext) -> Tensor:
        return self.transformer(x, t, branch, step)  # type: ignore[no-any-return]

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        takes_pictures = self.parts.settings.memory.vae_config.load_encoder
        return self.model_info(
            kind="image",
            defaults=self.defaults,
            size_multiple=self.vae.multiple,
            frame_multiple=1,
            unsupported=NO_NORMALIZATION | ({} if self.config.guidance_embeds else NO_TRUE_CFG),
            tasks=("text-to-image", "image-to-image")[: 1 + takes_pictures],
            max_tokens=TEXT_TOKENS,
            memory=self.memory(),
            pictures=PictureRule(max=MAX_PICTURES * takes_pictures, starts_denoising=False, may_enlarge=False),
        )

    def memory(self) -> Memory:
        """Estimate; the text is always padded to its full length, and is states of all layers while it is read."""
        c, encoder = self.config, self.text.module
        token = self.parts.token_bytes(c.dim, 2 * c.hidden, self.transformer.compute_dtype) + 48 * c.in_channels
        text = TEXT_TOKENS * (self.text.reader.layers[-1] + 20) * encoder.config.hidden_size
        return self.parts.memory(
            self.vae.tiling,
            base=2**25 + TEXT_TOKENS * token + text * encoder.dtype.itemsize,
            token=token,
            picture=REFERENCE_PIXELS // self.vae.multiple**2 * token,
            pixel=27,
            picture_pixels=REFERENCE_PIXELS,
            chunk_pixel=self.vae.pixel_bytes,
        )


def grid(time: int, rows: int, columns: int) -> Tensor:
    """Return the positions [rows * columns, 4] of one picture's tokens."""
    axes = torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.tensor([0])
    return torch.cartesian_prod(*axes)


def reference(picture: Image, multiple: int) -> Tensor:
    """Scale a reference picture to a megapixel at most, and crop it to multiples: [1, 3, H, W] in [-1, 1].

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
    """Return the time shift that the authors found to suit so many tokens and steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)
