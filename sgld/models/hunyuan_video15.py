"""HunyuanVideo 1.5 from text (https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5).

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Generator, Tensor, nn

from sgld.errors import ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.models.hunyuan_video import (
    TIME_DIM,
    Patch,
    Patches,
    TokenRefiner,
    grid_of,
    states_after,
    unpatch,
    without_end,
)
from sgld.nn.attention import Backend
from sgld.nn.blocks import Denoiser, Embedder, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.mmdit import DualBlock, OutNorm, TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json, require
from sgld.params import Memory, ModelInfo, SamplingParams
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class HunyuanVideo15Config:
    """Architecture numbers, as in transformer/config.json."""

    in_channels: int = 65
    out_channels: int = 32
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    num_layers: int = 54
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 1
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = attrs.field(default=(16, 56, 56), converter=tuple)
    target_size: int = 640
    task_type: str = "i2v"
    use_meanflow: bool = False

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Patch:
        """Latent frames, rows and columns of a token."""
        return self.patch_size_t, self.patch_size, self.patch_size


@attrs.frozen
class BranchInputs:
    """One branch of the conditioning: text [1, n, C], and what is to be written in the picture [1, m, G]."""

    text: Tensor
    glyphs: Tensor | None


class Time(nn.Module):
    """t [1] to [1, C]; key `timestep_embedder`."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = Embedder(TIME_DIM, dim, F.silu)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        y: Tensor = self.timestep_embedder(sinusoid(t, TIME_DIM).to(dtype))
        return y


class Glyphs(nn.Module):
    """Bytes of a text, as the byte model reads them, to the width of the blocks."""

    def __init__(self, dim_text: int, dim: int, hidden: int = 2048):
        super().__init__()
        self.norm = nn.LayerNorm(dim_text)
        self.linear_1, self.linear_2 = nn.Linear(dim_text, hidden), nn.Linear(hidden, hidden)
        self.linear_3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_3(F.gelu(self.linear_2(F.gelu(self.linear_1(self.norm(x))))))
        return y


class Pictures(nn.Module):
    """Weights that only a model with picture input uses."""

    def __init__(self, dim_image: int, dim: int):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim_image), nn.LayerNorm(dim)
        self.linear_1, self.linear_2 = nn.Linear(dim_image, dim_image), nn.Linear(dim_image, dim)


class HunyuanVideo15Transformer(Denoiser):
    """Velocity of latents x [1, C, T, H, W] at one time, told one prompt."""

    def __init__(self, c: HunyuanVideo15Config, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.x_embedder = Patches(c.in_channels, c.dim, c.patch)
        self.image_embedder = Pictures(c.image_embed_dim, c.dim)
        self.context_embedder = TokenRefiner(
            c.text_embed_dim, c.dim, c.num_attention_heads, c.num_refiner_layers, (cross or backend).attend
        )
        self.context_embedder_2 = Glyphs(c.text_embed_2_dim, c.dim)
        self.time_embed = Time(c.dim)
        self.cond_type_embed = nn.Embedding(3, c.dim)  # text, glyphs, pictures
        shape = c.dim, c.num_attention_heads, c.attention_head_dim, SequenceAttention(mesh, backend), c.mlp_ratio
        self.transformer_blocks = nn.ModuleList(DualBlock(*shape) for _ in range(c.num_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch))

    def forward(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        c, split, grid = self.config, self.mesh.tokens, grid_of(x, self.config.patch)
        rope = rope_3d(grid, c.rope_axes_dim, x.device, c.rope_theta)
        place = TokenLayout(split.shard(rope, 0), None, math.prod(grid))
        t = t.view(1).to(x.device)
        emb = self.time_embed(t, self.dtype)
        text = self.read(told, t)
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, c.in_channels - x.shape[1]))  # no picture, and a mask that says so
        h = split.shard(self.x_embedder(x.to(self.dtype)), 1)  # [1, S/n, C]
        for block in self.walk(self.transformer_blocks):
            h, text = block(h, text, emb, place)
        return unpatch(split.gather(self.proj_out(self.norm_out(h, emb)), 1, place.tokens), grid, c.patch)

    def read(self, told: BranchInputs, t: Tensor) -> Tensor:
        """[1, m + n, C]"""
        kinds = self.cond_type_embed.weight
        text: Tensor = self.context_embedder(told.text, t) + kinds[0]
        if told.glyphs is None:
            return text
        return torch.cat([self.context_embedder_2(told.glyphs) + kinds[1], text], 1)


# --------------------------------------------------------------------------------------------------- prompts

ASPECTS = (
    "You are a helpful assistant. Describe the video by detailing the following aspects:",
    "1. The main content and theme of the video.",
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.",
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.",
    "4. background environment, light, style and atmosphere.",
    "5. camera angles, movements, and transitions used in the video.",
)  # that the model was trained with, indentation included
TEMPLATE = (
    f"<|im_start|>system\n{(' ' * 9).join(ASPECTS)}<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SYSTEM_TOKENS = 108  # of the template, before the prompt
QUOTED = re.compile('"(.*?)"|“(.*?)”')
MAX_GLYPHS = 256


def glyphs(prompt: str) -> str:
    """What the prompt has in quotation marks, each once, as the byte model was taught to read it."""
    found = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return "".join(f'Text "{text}". ' for text in found)


@attrs.frozen
class Prompts:
    """A Qwen's hidden states of a prompt, and those of ByT5 for the texts in it. Neither sees any padding."""

    tokenizer: Any
    qwen: Any
    byte_tokenizer: Any
    byte_model: Any

    @classmethod
    def load(cls, parts: ComponentLoader) -> Prompts:
        """From the folders of the four components."""
        from transformers import Qwen2_5_VLTextModel, T5EncoderModel

        return cls(
            tokenizer(parts, "tokenizer"),
            text_encoder(parts, "text_encoder", Qwen2_5_VLTextModel, "layers", without_end),
            tokenizer(parts, "tokenizer_2"),
            text_encoder(parts, "text_encoder_2", T5EncoderModel, "encoder"),
        )

    def states(self, name: str, prompt: str, most: int, notes: list[str]) -> Tensor:
        """Hidden states [1, n, C] of at most so many tokens; a prompt that is cut is noted by its name."""
        ids = self.tokenizer(TEMPLATE.format(prompt or " ")).input_ids
        return states_after(SYSTEM_TOKENS, self.qwen, ids, most, name, notes)

    def texts(self, name: str, prompt: str, notes: list[str]) -> Tensor | None:
        """ByT5's states [1, m, G] of the texts in the prompt, if it has any; that they are cut is noted."""
        if not (text := glyphs(prompt)):
            return None
        ids = self.byte_tokenizer(text).input_ids
        if len(ids) > MAX_GLYPHS:
            notes.append(f"{name}: its texts in quotation marks are cut from {len(ids)} to {MAX_GLYPHS} bytes")
            ids = [*ids[: MAX_GLYPHS - 1], ids[-1]]
        found: Tensor = self.byte_model(torch.tensor([ids], device=self.byte_model.device)).last_hidden_state
        return found


# -------------------------------------------------------------------------------------------------- family

NEEDS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae", "scheduler", "transformer", "guider")
SIZES = {640: (848, 480), 960: (1280, 720)}  # width and height by the side that a checkpoint is for
BASE = {"negative_prompt": "", "max_sequence_length": 1000, "num_frames": 121, "fps": 24, "num_inference_steps": 50}
GUIDER = {  # that we can follow
    "_class_name": "ClassifierFreeGuidance", "use_original_formulation": False, "guidance_rescale": 0.0, "start": 0.0,
    "stop": 1.0,
}  # fmt: skip

HUNYUAN15_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors'
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.", "txt_in.t_embedder."),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^time_embed\.timestep_embedder\.", "time_in."),
    (r"^(time_in|.*t_embedder)\.linear_1$", r"\1.mlp.0"),
    (r"^(time_in|.*t_embedder)\.linear_2$", r"\1.mlp.2"),
    (r"^context_embedder_2\.linear_", "byt5_in.fc"),
    (r"^image_embedder\.linear_1$", "vision_in.proj.1"),
    (r"^image_embedder\.linear_2$", "vision_in.proj.3"),
    (r"^x_embedder\.", "img_in."),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^(double.*)\.attn\.to_([qkv])$", r"\1.img_attn_\2"),
    (r"^(double.*)\.attn\.add_([qkv])_proj$", r"\1.txt_attn_\2"),
    (r"^(double.*)\.attn\.to_out\.0$", r"\1.img_attn_proj"),
    (r"^(double.*)\.attn\.to_add_out$", r"\1.txt_attn_proj"),
    (r"^(double.*)\.norm1\.", r"\1.img_mod."),
    (r"^(double.*)\.norm1_context\.", r"\1.txt_mod."),
    (r"^(double.*)\.ff\.", r"\1.img_mlp."),
    (r"^(double.*)\.ff_context\.", r"\1.txt_mlp."),
    (r"^(txt_in.*)\.attn\.to_q$", r"\1.self_attn_qkv#0"),
    (r"^(txt_in.*)\.attn\.to_k$", r"\1.self_attn_qkv#1"),
    (r"^(txt_in.*)\.attn\.to_v$", r"\1.self_attn_qkv#2"),
    (r"^(txt_in.*)\.attn\.to_out\.0$", r"\1.self_attn_proj"),
    (r"^(txt_in.*)\.ff\.", r"\1.mlp."),
    (r"^(txt_in.*)\.norm_out\.linear$", r"\1.adaLN_modulation.1"),
    (r"\.net\.0\.proj$", ".fc1"),
    (r"\.net\.2$", ".fc2"),
)


class HunyuanVideo15(NativeModel):
    """HunyuanVideo15Pipeline checkpoints."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        from diffusers import AutoencoderKLHunyuanVideo15

        self.parts = parts = ComponentLoader(load, mesh, platform, progress, NEEDS)
        parts.needs_euler()
        self.scheduler = parts.scheduler
        self._config = c = hunyuan15_config(parts.path("transformer") / "config.json")
        scale = guider_scale(parts.path("guider") / "guider_config.json")
        width, height = SIZES.get(c.target_size, SIZES[640])
        self._defaults = parts.defaults(BASE | {"width": width, "height": height, "guidance_scale": scale})
        guided = self._defaults.get("guidance_scale", SamplingParams().guidance_scale) > 1
        mesh = parts.share(c.num_attention_heads, guided)
        self._prompts = Prompts.load(parts)
        make = partial(HunyuanVideo15Transformer, c, mesh)
        self._transformer = parts.transformer("transformer", make, c.attention_head_dim, ("transformer_blocks",))
        self.lora = parts.lora({"transformer": self._transformer}, HUNYUAN15_ORIGINAL)
        self._vae = Autoencoder(parts, AutoencoderKLHunyuanVideo15, 16, 4, tiled=True)
        self._scaling: float = self._vae.config["scaling_factor"]
        self.parallel_decode = load.settings.memory.parallel_decode
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c, p = self._config, self._prompts
        takes = c.out_channels, c.text_embed_dim, c.text_embed_2_dim
        has = self._vae.config["latent_channels"], p.qwen.config.hidden_size, p.byte_model.config.d_model
        if takes != has:
            raise ModelError(
                f"the components do not fit: the transformer takes {takes[0]} latent channels and text of {takes[1]} "
                f"and {takes[2]}, the vae has {has[0]} channels, the text encoders make {has[1]} and {has[2]}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        guided = params.guidance_scale > 1
        prompts = {"prompt": params.prompt} | ({"negative_prompt": params.negative_prompt or ""} if guided else {})
        notes = [] if guided else self.unguided(params)
        self.parts.offloader.need("text_encoder")
        length, dtype = params.max_sequence_length, self._transformer.dtype
        states = [self._prompts.states(name, prompt, length, notes).to(dtype) for name, prompt in prompts.items()]
        raise_if_cancelled()
        self.parts.offloader.need("text_encoder_2")
        texts = [self._prompts.texts(name, prompt, notes) for name, prompt in prompts.items()]
        told = [BranchInputs(s, None if g is None else g.to(dtype)) for s, g in zip(states, texts, strict=True)]
        tokens = math.prod(self._vae.grid(params)) // math.prod(self._config.patch)
        counts: dict[str, Any] = {"prompt_tokens": states[0].shape[1], "latent_tokens": tokens}
        return Conditioning(told[0], told[1] if guided else None, **counts), notes

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        shape = (1, self._config.out_channels, *self._vae.grid(params))
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return Schedule.even(params.num_inference_steps, params.flow_shift)

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        y: Tensor = self._transformer(x, t, told)
        return y

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.decode(x0[:, :, :1], raise_if_cancelled)  # the first latent frame stands for the first frame alone

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x / self._scaling, raise_if_cancelled)

    def _describe(self) -> ModelInfo:
        c = self._config
        return self.model_info(
            kind="video",
            defaults=self._defaults,
            size_multiple=self._vae.spatial * c.patch_size,
            frame_multiple=self._vae.temporal,
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=("text-to-video", "text-to-image"),
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        c, dtype = self._config, self._transformer.dtype
        qwen = self._prompts.qwen
        return self.parts.memory(
            self._vae.tiling,
            base=2**25,
            text_pair=2 * qwen.config.num_attention_heads * qwen.dtype.itemsize,
            token=self.parts.token_bytes(c.dim, int(c.mlp_ratio * c.dim), dtype)
            + 48 * c.in_channels * math.prod(c.patch),
            pixel=48,
            chunk_pixel=16 * self._vae.config["block_out_channels"][0] * self._vae.dtype.itemsize,
            chunk_pixels=2**40,  # all frames of a tile
        )


def guider_scale(file: Path) -> float:
    """The guidance scale of a guider_config.json.

    Raises:
        ModelError: guidance of another kind.
    """
    config = read_json(file)
    require(config, file, GUIDER)
    scale: float = config.get("guidance_scale", 7.5) if config.get("enabled", True) else 1.0
    return scale


def hunyuan15_config(file: Path) -> HunyuanVideo15Config:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    given = read_json(file)
    require(given, file, {"qk_norm": "rms_norm", "use_meanflow": False, "patch_size_t": 1})
    config: HunyuanVideo15Config = pick(given, HunyuanVideo15Config, file)
    return config
