"""FLUX.1 of Black Forest Labs (https://github.com/black-forest-labs/flux): dev, schnell, and Kontext for editing.

Kontext (Labs et al. 2025, https://arxiv.org/abs/2506.15742) sees a picture as further tokens of the sequence. The
attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor, nn

from sgld.models import names
from sgld.models.base import DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_NORMALIZATION, Component, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenize, tokenizer
from sgld.nn.attention import Backend
from sgld.nn.blocks import DiffusionTransformer, Embedder, TimestepEmbedder
from sgld.nn.mmdit import DualBlock, OutNorm, SingleBlock, TokenLayout, pack, unpack
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams

Grid = tuple[int, int]  # tokens in height and width

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class FluxConfig(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, int, int] = attrs.field(default=(16, 56, 56), converter=tuple)
    patch_size: int = 1
    out_channels: int | None = None

    @property
    def dim(self) -> int:
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def fault(self) -> str | None:
        if self.out_channels in (None, self.in_channels):
            return None
        return f"out_channels {self.out_channels} is not supported with in_channels {self.in_channels}"


@attrs.frozen
class BranchInputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, L, C], of T5
    pooled: Tensor  # [1, C], of CLIP
    guidance: float | None  # that the transformer was trained to follow by itself
    reference: Tensor | None  # latents [1, C, h, w] of the picture to edit


class TimeTextEmbed(nn.Module):
    """The embedding [1, C] of time, guidance and pooled text, which modulates every block."""

    frequencies = 256

    def __init__(self, c: FluxConfig):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(self.frequencies, c.dim)
        self.guidance_embedder = TimestepEmbedder(self.frequencies, c.dim) if c.guidance_embeds else None
        self.text_embedder = Embedder(c.pooled_projection_dim, c.dim, F.silu)

    def forward(self, t: Tensor, guidance: float | None, pooled: Tensor) -> Tensor:
        """Embed t [1] in [0, 1000], a guidance scale, and pooled text [1, P]."""
        emb: Tensor = self.timestep_embedder(t) + self.text_embedder(pooled)
        if self.guidance_embedder is not None:
            assert guidance is not None
            emb = emb + self.guidance_embedder(torch.full_like(t, 1000 * guidance, dtype=torch.float32))
        return emb


class FluxTransformer(DiffusionTransformer):
    """Predicts the velocity of the tokens of a picture."""

    def __init__(self, c: FluxConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        attention = SequenceAttention(mesh, backend)
        size = c.dim, c.num_attention_heads, c.attention_head_dim, attention
        self.x_embedder = nn.Linear(c.in_channels, c.dim)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.dim)
        self.time_text_embed = TimeTextEmbed(c)
        self.transformer_blocks = nn.ModuleList(DualBlock(*size) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*size) for _ in range(c.num_single_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.in_channels)

    def forward(self, x: Tensor, grids: tuple[Grid, ...], t: Tensor, branch: BranchInputs, step: StepContext) -> Tensor:
        """Predict for x [1, S, C]: the tokens of these grids, one after the other; t in [0, 1000]."""
        split, tokens = self.mesh.tokens, x.shape[1]
        layout = TokenLayout(split.shard(rope(grids, self.config.axes_dims_rope, x.device), 0), None, tokens)
        emb = self.time_text_embed(t.view(1).to(x.device), branch.guidance, branch.pooled.to(self.compute_dtype))
        h = self.x_embedder(split.shard(x.to(self.compute_dtype), 1))  # [1, S/n, C]
        text = self.context_embedder(branch.text.to(self.compute_dtype))  # [1, L, C]

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, emb, layout)  # type: ignore[no-any-return]

        h, _ = self.runner.run([*self.transformer_blocks, *self.single_transformer_blocks], (h, text), call, step)
        return split.gather(self.proj_out(self.norm_out(h, emb)), 1, tokens)


@lru_cache(maxsize=4)
def rope(grids: tuple[Grid, ...], dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return rotations [S, D/2] of tokens by their picture's number, row and column."""
    axes = ([torch.tensor([i]), torch.arange(h), torch.arange(w)] for i, (h, w) in enumerate(grids))
    return rope_at(torch.cat([torch.cartesian_prod(*axis) for axis in axes]), dims).to(device)


# ------------------------------------------------------------------------------------------- text encoders


@attrs.frozen
class ClipPooled:
    """CLIP's one vector [1, C] for a prompt."""

    tokenizer: Any
    module: Any
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> ClipPooled:
        """Load text_encoder and tokenizer."""
        from transformers import CLIPTextModel

        return cls(tokenizer(parts, "tokenizer"), text_encoder(parts, cls.component, CLIPTextModel, "encoder"))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        most = self.tokenizer.model_max_length
        ids, count = tokenize(self.tokenizer, prompt, most)
        if count > most:
            request.notes.append(f"{name}: the first of two text encoders reads {most} of its {count} tokens")
        return EncodedText(self.module(ids.to(self.module.device)).pooler_output, 0)


@attrs.frozen
class T5States:
    """T5's states [1, L, C] of a prompt and its padding, which the transformer was trained to see."""

    tokenizer: Any
    module: Any
    component = "text_encoder_2"

    @classmethod
    def load(cls, parts: ComponentLoader) -> T5States:
        """Load text_encoder_2 and tokenizer_2."""
        from transformers import T5EncoderModel

        return cls(tokenizer(parts, "tokenizer_2"), text_encoder(parts, cls.component, T5EncoderModel, "encoder"))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        length = request.params.max_sequence_length
        ids, count = tokenize(self.tokenizer, prompt, length)
        if count > length:
            request.notes.append(f"{name} cut from {count} to {length} tokens, the most this request allows")
        return EncodedText(self.module(ids.to(self.module.device)).last_hidden_state, min(count, length))


# -------------------------------------------------------------------------------------------------- family

TASKS = ("text-to-image", "image-to-image")
MAX_TOKENS = 512
BASE = {"width": 1024, "height": 1024, "max_sequence_length": MAX_TOKENS}
DEV = BASE | {"num_inference_steps": 50, "guidance_scale": 3.5}
SCHNELL = BASE | {"num_inference_steps": 4, "max_sequence_length": 256}
KONTEXT = BASE | {"num_inference_steps": 28, "guidance_scale": 2.5}
KONTEXT_SIZES = [  # widths and heights of the pictures that it was trained to see
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
]  # fmt: skip
NO_EMBEDDING = "this checkpoint was trained without guidance; true_cfg_scale guides it all the same"


class Flux(DiffusionModel):
    """FluxPipeline checkpoints, with guidance as an input (dev) or without (schnell), and FluxKontextPipeline's."""

    architecture = Component(
        FluxTransformer, FluxConfig, ("transformer_blocks", "single_transformer_blocks"), crosses=False
    )
    needs = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "scheduler", "transformer")
    lora_names = names.FLUX
    patch = (2, 2)

    config: FluxConfig
    vae: Autoencoder

    @property
    def edits(self) -> bool:
        """Return true for a model that edits a picture. Others start denoising from the picture."""
        return bool(self.parts.index["_class_name"] == "FluxKontextPipeline")

    def known_defaults(self) -> Mapping[str, Any]:
        return KONTEXT if self.edits else DEV if self.config.guidance_embeds else SCHNELL

    def load_components(self) -> None:
        from diffusers import AutoencoderKL

        self.clip, self.t5 = ClipPooled.load(self.parts), T5States.load(self.parts)
        self.text_encoders = self.clip, self.t5
        self.vae = Autoencoder(self.parts, AutoencoderKL, 8)
        self.scale: float
        self.shift: float
        self.scale, self.shift = (self.vae.config[name] for name in ("scaling_factor", "shift_factor"))

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        texts = (
            (c.pooled_projection_dim, self.clip.module.config.hidden_size),
            (c.joint_attention_dim, self.t5.module.config.d_model),
        )
        return (c.in_channels // 4, self.vae.config["latent_channels"]), texts

    @property
    def side(self) -> int:
        """Return the side of a token in pixels."""
        return self.patch[0] * self.vae.spatial

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        return 1, self.config.in_channels // 4, params.height // self.vae.spatial, params.width // self.vae.spatial

    def encode_pictures(self, request: EncodeRequest) -> Tensor:
        """Encode the picture to edit, at the size seen in training whose shape is nearest."""
        size = seen_size(request.pictures[0].size, self.side)
        pixels = np.asarray(request.pictures[0].resize(size, Resampling.LANCZOS), np.float32)
        return self.encode_frames(
            torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None], request.raise_if_cancelled
        )

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        return (self.vae.encode(frames) - self.shift) * self.scale

    def branch(self, texts: Sequence[EncodedText], pictures: Tensor | None, params: SamplingParams) -> BranchInputs:
        pooled, text = (encoded.states for encoded in texts)
        return BranchInputs(text, pooled, params.guidance_scale if self.config.guidance_embeds else None, pictures)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self.latent_tokens(params))

    def guidance_scale(self, params: SamplingParams) -> float:
        return params.true_cfg_scale or 1.0

    def forward(self, x: Tensor, t: Tensor, branch: BranchInputs, step: StepContext) -> Tensor:
        pictures = [x] if branch.reference is None else [x, branch.reference]
        grids = tuple((z.shape[-2] // 2, z.shape[-1] // 2) for z in pictures)
        v = self.transformer(torch.cat([pack(z) for z in pictures], 1), grids, t, branch, step)
        return unpack(v[:, : grids[0][0] * grids[0][1]], grids[0])

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x / self.scale + self.shift, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        takes_pictures = self.parts.settings.memory.vae_config.load_encoder
        return self.model_info(
            kind="image",
            defaults=self.defaults,
            size_multiple=self.side,
            frame_multiple=1,
            pictures=PictureRule(max=int(takes_pictures), starts_denoising=not self.edits),
            unsupported=NO_NORMALIZATION | ({} if self.config.guidance_embeds else {"guidance_scale": NO_EMBEDDING}),
            tasks=TASKS if takes_pictures else TASKS[:1],
            max_tokens=MAX_TOKENS,
            memory=self.memory(),
        )

    def memory(self) -> Memory:
        """Estimate by `ComponentLoader.token_bytes`; the text, and a picture that Kontext sees, are tokens too."""
        c, t5 = self.config, self.t5.module
        token = self.parts.token_bytes(c.dim, 4 * c.dim, self.transformer.compute_dtype) + 48 * c.in_channels
        seen = self.edits * max(w * h for w, h in KONTEXT_SIZES)  # pixels
        return self.parts.memory(
            self.vae.tiling,
            base=2**25 + MAX_TOKENS * token,
            text_pair=4 * t5.config.num_heads * t5.dtype.itemsize,
            token=token,
            picture=seen // self.side**2 * token,
            picture_pixels=seen,
            pixel=27,
            chunk_pixel=self.vae.pixel_bytes,
        )


def seen_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the size seen in training of the nearest shape, once both sides are cut to multiples."""
    width, height = (max(1, side // multiple) for side in size)
    return min(KONTEXT_SIZES, key=lambda known: (abs(width / height - known[0] / known[1]), known))
