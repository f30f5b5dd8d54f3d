"""FLUX.1 of Black Forest Labs (https://github.com/black-forest-labs/flux): dev, schnell, and Kontext for editing.

Kontext (Labs et al. 2025, https://arxiv.org/abs/2506.15742) sees a picture as further tokens of the sequence. The
attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Generator, Tensor, nn

from sgld.errors import ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, Schedule
from sgld.models.components import NO_NORMALIZATION, ComponentLoader, NativeModel
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.nn.attention import Backend
from sgld.nn.blocks import Denoiser, Embedder, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.mmdit import DualBlock, OutNorm, SingleBlock, TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.platform import Platform

Grid = tuple[int, int]  # tokens in height and width

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class FluxConfig:
    """Architecture numbers, as in transformer/config.json."""

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
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


@attrs.frozen
class BranchInputs:
    """What one guidance branch knows beside the noise."""

    text: Tensor  # [1, L, C], of T5
    pooled: Tensor  # [1, C], of CLIP
    guidance: float | None  # that the transformer was trained to follow by itself
    seen: Tensor | None  # latents [1, C, h, w] of the picture to edit


class TimeTextEmbed(nn.Module):
    """The embedding [1, C] of time, guidance and pooled text, which modulates every block."""

    frequencies = 256

    def __init__(self, c: FluxConfig):
        super().__init__()
        self.timestep_embedder = Embedder(self.frequencies, c.dim, F.silu)
        self.guidance_embedder = Embedder(self.frequencies, c.dim, F.silu) if c.guidance_embeds else None
        self.text_embedder = Embedder(c.pooled_projection_dim, c.dim, F.silu)

    def forward(self, t: Tensor, guidance: float | None, pooled: Tensor) -> Tensor:
        """t [1] in [0, 1000], pooled [1, P]"""
        emb: Tensor = self.timestep_embedder(sinusoid(t, self.frequencies).to(pooled)) + self.text_embedder(pooled)
        if self.guidance_embedder is not None:
            assert guidance is not None
            scale = torch.full_like(t, 1000 * guidance, dtype=torch.float32)
            emb = emb + self.guidance_embedder(sinusoid(scale, self.frequencies).to(pooled))
        return emb


class FluxTransformer(Denoiser):
    """Velocity of the tokens of a picture."""

    def __init__(self, c: FluxConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        among = SequenceAttention(mesh, backend)
        size = c.dim, c.num_attention_heads, c.attention_head_dim, among
        self.x_embedder = nn.Linear(c.in_channels, c.dim)
        self.context_embedder = nn.Linear(c.joint_attention_dim, c.dim)
        self.time_text_embed = TimeTextEmbed(c)
        self.transformer_blocks = nn.ModuleList(DualBlock(*size) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*size) for _ in range(c.num_single_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.in_channels)

    def forward(self, x: Tensor, grids: tuple[Grid, ...], t: Tensor, told: BranchInputs) -> Tensor:
        """x [1, S, C]: the tokens of these grids, one after the other; t in [0, 1000]; as x."""
        split, tokens = self.mesh.tokens, x.shape[1]
        place = TokenLayout(split.shard(rope(grids, self.config.axes_dims_rope, x.device), 0), None, tokens)
        emb = self.time_text_embed(t.view(1).to(x.device), told.guidance, told.pooled.to(self.dtype))
        h = self.x_embedder(split.shard(x.to(self.dtype), 1))
        text = self.context_embedder(told.text.to(self.dtype))
        for block in self.walk([*self.transformer_blocks, *self.single_transformer_blocks]):
            h, text = block(h, text, emb, place)
        return split.gather(self.proj_out(self.norm_out(h, emb)), 1, tokens)


@lru_cache(maxsize=4)
def rope(grids: tuple[Grid, ...], dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """Rotations [S, D/2] of tokens by their picture's number, row and column."""
    axes = ([torch.tensor([i]), torch.arange(h), torch.arange(w)] for i, (h, w) in enumerate(grids))
    return rope_at(torch.cat([torch.cartesian_prod(*axis) for axis in axes]), dims).to(device)


def pack(z: Tensor) -> Tensor:
    """Latents [1, C, 2h, 2w] to tokens [1, h*w, 4C]."""
    return F.pixel_unshuffle(z, 2).flatten(2).mT


def unpack(x: Tensor, grid: Grid) -> Tensor:
    """Tokens [1, h*w, 4C] to latents [1, C, 2h, 2w]."""
    return F.pixel_shuffle(x.mT.reshape(len(x), -1, *grid), 2)


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

FLUX_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors', and to XLabs'
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^(single_blocks\.\d+)\.norm\.linear$", r"\1.modulation.lin"),
    (r"^(single_blocks\.\d+)\.attn\.to_q$", r"\1.linear1#0|\1.processor.qkv_lora#0"),
    (r"^(single_blocks\.\d+)\.attn\.to_k$", r"\1.linear1#1|\1.processor.qkv_lora#1"),
    (r"^(single_blocks\.\d+)\.attn\.to_v$", r"\1.linear1#2|\1.processor.qkv_lora#2"),
    (r"^(single_blocks\.\d+)\.proj_mlp$", r"\1.linear1#3"),
    (r"^(single_blocks\.\d+)\.proj_out$", r"\1.linear2|\1.processor.proj_lora"),
    (r"^(single_blocks\.\d+)\.attn\.norm_q$", r"\1.norm.query_norm.scale"),
    (r"^(single_blocks\.\d+)\.attn\.norm_k$", r"\1.norm.key_norm.scale"),
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.norm1\.linear$", ".img_mod.lin"),
    (r"\.norm1_context\.linear$", ".txt_mod.lin"),
    (r"^(.*)\.attn\.to_q$", r"\1.img_attn.qkv#0|\1.processor.qkv_lora1#0"),
    (r"^(.*)\.attn\.to_k$", r"\1.img_attn.qkv#1|\1.processor.qkv_lora1#1"),
    (r"^(.*)\.attn\.to_v$", r"\1.img_attn.qkv#2|\1.processor.qkv_lora1#2"),
    (r"^(.*)\.attn\.add_q_proj$", r"\1.txt_attn.qkv#0|\1.processor.qkv_lora2#0"),
    (r"^(.*)\.attn\.add_k_proj$", r"\1.txt_attn.qkv#1|\1.processor.qkv_lora2#1"),
    (r"^(.*)\.attn\.add_v_proj$", r"\1.txt_attn.qkv#2|\1.processor.qkv_lora2#2"),
    (r"^(.*)\.attn\.to_out\.0$", r"\1.img_attn.proj|\1.processor.proj_lora1"),
    (r"^(.*)\.attn\.to_add_out$", r"\1.txt_attn.proj|\1.processor.proj_lora2"),
    (r"\.attn\.norm_q$", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k$", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q$", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k$", ".txt_attn.norm.key_norm.scale"),
    (r"\.ff\.net\.0\.proj$", ".img_mlp.0"),
    (r"\.ff\.net\.2$", ".img_mlp.2"),
    (r"\.ff_context\.net\.0\.proj$", ".txt_mlp.0"),
    (r"\.ff_context\.net\.2$", ".txt_mlp.2"),
    (r"^x_embedder$", "img_in"),
    (r"^context_embedder$", "txt_in"),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.", "vector_in."),
    (r"_in\.linear_1$", "_in.in_layer"),
    (r"_in\.linear_2$", "_in.out_layer"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
)


class Flux(NativeModel):
    """FluxPipeline checkpoints, with guidance as an input (dev) or without (schnell), and FluxKontextPipeline's."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, T5EncoderModel

        needs = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "scheduler", "transformer")
        self.parts = parts = ComponentLoader(load, mesh, platform, progress, needs)
        self.scheduler = parts.scheduler
        parts.needs_euler()
        self._edits = parts.index["_class_name"] == "FluxKontextPipeline"
        self._config = c = flux_config(parts.path("transformer") / "config.json")
        mesh = parts.share(c.num_attention_heads, guided=False)
        self._tokenizers = tokenizer(parts, "tokenizer"), tokenizer(parts, "tokenizer_2")
        self._clip = text_encoder(parts, "text_encoder", CLIPTextModel, "encoder")
        self._t5 = text_encoder(parts, "text_encoder_2", T5EncoderModel, "encoder")
        self._transformer = parts.transformer(
            "transformer",
            partial(FluxTransformer, c, mesh),
            c.attention_head_dim,
            ("transformer_blocks", "single_transformer_blocks"),
            crosses=False,
        )
        self.lora = parts.lora({"transformer": self._transformer}, FLUX_ORIGINAL)
        self._vae = Autoencoder(parts, AutoencoderKL, 8)
        self._scale, self._shift = (self._vae.module.config[name] for name in ("scaling_factor", "shift_factor"))
        self._side = 2 * self._vae.spatial  # pixels of a token
        self.parallel_decode = load.settings.parallel_decode
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c = self._config
        takes = c.in_channels // 4, c.pooled_projection_dim, c.joint_attention_dim
        has = self._vae.module.config["latent_channels"], self._clip.config.hidden_size, self._t5.config.d_model
        if takes != has:
            raise ModelError(
                f"the components do not fit: the transformer takes {takes[0]} latent channels and text of {takes[1]} "
                f"and {takes[2]}, the vae has {has[0]} channels, the text encoders make {has[1]} and {has[2]}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        guided = (params.true_cfg_scale or 1) > 1
        prompts = {"prompt": params.prompt} | ({"negative_prompt": params.negative_prompt or ""} if guided else {})
        notes = [] if guided else self.unguided(params)
        guidance = params.guidance_scale if self._config.guidance_embeds else None
        seen = self._see(pictures[0]) if pictures else None
        raise_if_cancelled()
        self.parts.offloader.need("text_encoder")
        pooled = [self._pool(name, prompt, notes) for name, prompt in prompts.items()]
        raise_if_cancelled()
        self.parts.offloader.need("text_encoder_2")
        length = params.max_sequence_length
        read = [self._read(name, prompt, length, notes) for name, prompt in prompts.items()]
        told = [BranchInputs(text, one, guidance, seen) for one, (text, _) in zip(pooled, read, strict=True)]
        counts = {"prompt_tokens": read[0][1], "latent_tokens": params.height * params.width // self._side**2}
        return Conditioning(told[0], told[1] if guided else None, **counts), notes

    def _pool(self, name: str, prompt: str, notes: list[str]) -> Tensor:
        """CLIP's one vector [1, C] for the prompt."""
        most = self._tokenizers[0].model_max_length
        ids, count = tokens(self._tokenizers[0], prompt, most)
        if count > most:
            notes.append(f"{name}: the first of two text encoders reads {most} of its {count} tokens")
        found: Tensor = self._clip(ids.to(self.mesh.device)).pooler_output
        return found

    def _read(self, name: str, prompt: str, length: int, notes: list[str]) -> tuple[Tensor, int]:
        """T5's states [1, L, C] of the prompt and its padding, which the transformer was trained to see."""
        ids, count = tokens(self._tokenizers[1], prompt, length)
        if count > length:
            notes.append(f"{name} cut from {count} to {length} tokens, the most this request allows")
        found: Tensor = self._t5(ids.to(self.mesh.device)).last_hidden_state
        return found, min(count, length)

    def _see(self, picture: Image) -> Tensor:
        """Latents of a picture to edit, at that of the sizes seen in training whose shape is nearest."""
        pixels = np.asarray(picture.resize(seen_size(picture.size, self._side), Resampling.LANCZOS), np.float32)
        return self.encode_frames(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None], lambda: None)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        z: Tensor = (self._vae.encode(frames) - self._shift) * self._scale
        return z

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        side = self._vae.spatial
        shape = (1, self._config.in_channels // 4, params.height // side, params.width // side)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, x.shape[-2] * x.shape[-1] // 4)

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        pictures = [x] if told.seen is None else [x, told.seen]
        grids = tuple((z.shape[-2] // 2, z.shape[-1] // 2) for z in pictures)
        packed = torch.cat([pack(z) for z in pictures], 1)
        v = self._transformer(packed, grids, t, told)
        return unpack(v[:, : grids[0][0] * grids[0][1]], grids[0])

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return params.true_cfg_scale or 1.0

    def frames(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x / self._scale + self._shift, raise_if_cancelled)

    def _describe(self) -> ModelInfo:
        known = KONTEXT if self._edits else DEV if self._config.guidance_embeds else SCHNELL
        lacks = NO_NORMALIZATION | ({} if self._config.guidance_embeds else {"guidance_scale": NO_EMBEDDING})
        takes_pictures = self.parts.settings.vae_config.load_encoder
        return self.describe(
            kind="image",
            defaults=self.parts.defaults(known),
            size_multiple=self._side,
            frame_multiple=1,
            pictures=PictureRule(max=int(takes_pictures), starts_denoising=not self._edits),
            unsupported=lacks,
            tasks=TASKS if takes_pictures else TASKS[:1],
            max_tokens=MAX_TOKENS,
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        """As `ComponentLoader.token_bytes` measured it; the text, and a picture that Kontext sees, are tokens too."""
        c, dtype = self._config, self._transformer.dtype
        token = self.parts.token_bytes(c.dim, 4 * c.dim, dtype) + 48 * c.in_channels
        seen = self._edits * max(w * h for w, h in KONTEXT_SIZES)  # pixels
        return self.parts.memory(
            self._vae.tiling,
            base=2**25 + MAX_TOKENS * token,
            text_pair=4 * self._t5.config.num_heads * self._t5.dtype.itemsize,
            token=token,
            picture=seen // self._side**2 * token,
            picture_pixels=seen,
            pixel=27,
            chunk_pixel=self._vae.pixel_bytes,
        )


def seen_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Of the widths and heights seen in training the nearest in shape, once both sides are cut to multiples."""
    width, height = (max(1, side // multiple) for side in size)
    return min(KONTEXT_SIZES, key=lambda known: (abs(width / height - known[0] / known[1]), known))


def tokens(tokenizer: Any, prompt: str, length: int) -> tuple[Tensor, int]:
    """The prompt's tokens [1, length], cut or padded, and how many it has."""
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids, len(tokenizer(prompt).input_ids)


def flux_config(file: Path) -> FluxConfig:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    config = read_json(file)
    if (name := config.get("_class_name")) != "FluxTransformer2DModel":
        raise ModelError(f"{file}: _class_name is {name!r}; only 'FluxTransformer2DModel' is supported")
    c: FluxConfig = pick(config, FluxConfig, file)
    if c.patch_size != 1 or c.out_channels not in (None, c.in_channels):
        raise ModelError(f"{file}: patch_size {c.patch_size} with out_channels {c.out_channels} is not supported")
    return c
