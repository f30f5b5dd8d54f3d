"""HunyuanVideo 1.5 from text (https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5).

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.models import names
from sgld.models.base import Conditioning, DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, Component, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.models.hunyuan_video import encode_after_system, without_unread_layers
from sgld.nn.attention import Backend
from sgld.nn.blocks import DiffusionTransformer, TimestepEmbedder
from sgld.nn.mmdit import DualBlock, OutNorm, TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d
from sgld.nn.runner import StepContext
from sgld.nn.token_refiner import FREQUENCIES, Patch, PatchEmbed, TokenRefiner, token_grid, unpatchify
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture, read_json, require
from sgld.params import Memory, ModelInfo, SamplingParams

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class HunyuanVideo15Config(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"qk_norm": "rms_norm", "use_meanflow": False, "patch_size_t": 1}

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
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Patch:
        """Return the latent frames, rows and columns of a token."""
        return self.patch_size_t, self.patch_size, self.patch_size


@attrs.frozen
class Hunyuan15Inputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, n, C], of the Qwen
    glyphs: Tensor | None  # [1, m, G], of ByT5; None: the prompt quotes no text


class GlyphProjection(nn.Module):
    """ByT5's states of quoted text, projected to the width of the blocks."""

    def __init__(self, dim_text: int, dim: int, hidden: int = 2048):
        super().__init__()
        self.norm = nn.LayerNorm(dim_text)
        self.linear_1, self.linear_2 = nn.Linear(dim_text, hidden), nn.Linear(hidden, hidden)
        self.linear_3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_3(F.gelu(self.linear_2(F.gelu(self.linear_1(self.norm(x))))))  # type: ignore[no-any-return]


class ImageProjection(nn.Module):
    """Weights that only a model with picture input uses."""

    def __init__(self, dim_image: int, dim: int):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim_image), nn.LayerNorm(dim)
        self.linear_1, self.linear_2 = nn.Linear(dim_image, dim_image), nn.Linear(dim_image, dim)


class HunyuanVideo15Transformer(DiffusionTransformer):
    """Predicts the velocity of a clip's latents."""

    def __init__(self, c: HunyuanVideo15Config, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.x_embedder = PatchEmbed(c.in_channels, c.dim, c.patch)
        self.image_embedder = ImageProjection(c.image_embed_dim, c.dim)
        self.context_embedder = TokenRefiner(
            c.text_embed_dim, c.dim, c.num_attention_heads, c.num_refiner_layers, (cross or backend).attend
        )
        self.context_embedder_2 = GlyphProjection(c.text_embed_2_dim, c.dim)
        self.time_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(FREQUENCIES, c.dim)})
        self.cond_type_embed = nn.Embedding(3, c.dim)  # text, glyphs, pictures
        shape = c.dim, c.num_attention_heads, c.attention_head_dim, SequenceAttention(mesh, backend), c.mlp_ratio
        self.transformer_blocks = nn.ModuleList(DualBlock(*shape) for _ in range(c.num_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch))

    def forward(self, x: Tensor, t: Tensor, branch: Hunyuan15Inputs, step: StepContext) -> Tensor:
        """Predict for latents x [1, C, T, H, W]; t in [0, 1000]."""
        c, split, grid = self.config, self.mesh.tokens, token_grid(x, self.config.patch)
        rope = rope_3d(grid, c.rope_axes_dim, x.device, c.rope_theta)
        layout = TokenLayout(split.shard(rope, 0), None, math.prod(grid))
        t = t.view(1).to(x.device)
        emb = self.time_embed["timestep_embedder"](t)
        text = self.embed_text(branch, t)
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, c.in_channels - x.shape[1]))  # no picture, and a mask that says so
        h = split.shard(self.x_embedder(x.to(self.compute_dtype)), 1)  # [1, S/n, C]

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, emb, layout)  # type: ignore[no-any-return]

        h, _ = self.runner.run(self.transformer_blocks, (h, text), call, step)
        return unpatchify(split.gather(self.proj_out(self.norm_out(h, emb)), 1, layout.tokens), grid, c.patch)

    def embed_text(self, branch: Hunyuan15Inputs, t: Tensor) -> Tensor:
        """Embed glyphs and text as one sequence [1, m + n, C]."""
        kinds = self.cond_type_embed.weight
        text: Tensor = self.context_embedder(branch.text.to(self.compute_dtype), t) + kinds[0]
        if branch.glyphs is None:
            return text
        return torch.cat([self.context_embedder_2(branch.glyphs.to(self.compute_dtype)) + kinds[1], text], 1)


# ------------------------------------------------------------------------------------------- text encoders

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
    """Return the texts in quotation marks, each once, in the words that ByT5 was trained to read."""
    found = dict.fromkeys(straight or curly for straight, curly in QUOTED.findall(prompt))
    return "".join(f'Text "{text}". ' for text in found)


@attrs.frozen
class QwenStates:
    """Qwen2.5-VL's states [1, n, C] of a prompt in its template, without padding."""

    tokenizer: Any
    module: Any
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> QwenStates:
        """Load text_encoder and tokenizer."""
        from transformers import Qwen2_5_VLTextModel

        module = text_encoder(parts, cls.component, Qwen2_5_VLTextModel, "layers", without_unread_layers)
        return cls(tokenizer(parts, "tokenizer"), module)

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        ids = self.tokenizer(TEMPLATE.format(prompt or " ")).input_ids
        return encode_after_system(self.module, ids, SYSTEM_TOKENS, name, request)


@attrs.frozen
class ByT5Glyphs:
    """ByT5's states [1, m, G] of the texts in quotation marks, without padding."""

    tokenizer: Any
    module: Any
    component = "text_encoder_2"

    @classmethod
    def load(cls, parts: ComponentLoader) -> ByT5Glyphs:
        """Load text_encoder_2 and tokenizer_2."""
        from transformers import T5EncoderModel

        return cls(tokenizer(parts, "tokenizer_2"), text_encoder(parts, cls.component, T5EncoderModel, "encoder"))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText | None:
        if not (text := glyphs(prompt)):
            return None
        ids = self.tokenizer(text).input_ids
        if len(ids) > MAX_GLYPHS:
            request.notes.append(f"{name}: its texts in quotation marks are cut from {len(ids)} to {MAX_GLYPHS} bytes")
            ids = [*ids[: MAX_GLYPHS - 1], ids[-1]]
        return EncodedText(self.module(torch.tensor([ids], device=self.module.device)).last_hidden_state, 0)


# -------------------------------------------------------------------------------------------------- family

SIZES = {640: (848, 480), 960: (1280, 720)}  # width and height by the side that a checkpoint is for
BASE = {"negative_prompt": "", "max_sequence_length": 1000, "num_frames": 121, "fps": 24, "num_inference_steps": 50}
GUIDER = {  # that we can follow
    "_class_name": "ClassifierFreeGuidance", "use_original_formulation": False, "guidance_rescale": 0.0, "start": 0.0,
    "stop": 1.0,
}  # fmt: skip


class HunyuanVideo15(DiffusionModel):
    """HunyuanVideo15Pipeline checkpoints."""

    architecture = Component(HunyuanVideo15Transformer, HunyuanVideo15Config, ("transformer_blocks",))
    needs = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae", "scheduler", "transformer", "guider")
    lora_names = names.HUNYUAN_VIDEO15

    config: HunyuanVideo15Config
    vae: Autoencoder

    def known_defaults(self) -> Mapping[str, Any]:
        scale = guider_scale(self.parts.path("guider") / "guider_config.json")
        width, height = SIZES.get(self.config.target_size, SIZES[640])
        return BASE | {"width": width, "height": height, "guidance_scale": scale}

    def load_components(self) -> None:
        from diffusers import AutoencoderKLHunyuanVideo15

        self.qwen, self.byt5 = QwenStates.load(self.parts), ByT5Glyphs.load(self.parts)
        self.text_encoders = self.qwen, self.byt5
        self.vae = Autoencoder(self.parts, AutoencoderKLHunyuanVideo15, 16, 4, tiled=True)
        self.scale: float = self.vae.config["scaling_factor"]

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        texts = (
            (c.text_embed_dim, self.qwen.module.config.hidden_size),
            (c.text_embed_2_dim, self.byt5.module.config.d_model),
        )
        return (c.out_channels, self.vae.config["latent_channels"]), texts

    @property
    def patch(self) -> Sequence[int]:
        return self.config.patch

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        return 1, self.config.out_channels, *self.vae.grid(params)

    def branch(self, texts: Sequence[EncodedText | None], pictures: None, params: SamplingParams) -> Hunyuan15Inputs:
        text, quoted = texts
        assert text is not None
        return Hunyuan15Inputs(text.states, None if quoted is None else quoted.states)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return Schedule.even(params.num_inference_steps, params.flow_shift)

    def forward(self, x: Tensor, t: Tensor, branch: Hunyuan15Inputs, step: StepContext) -> Tensor:
        return self.transformer(x, t, branch, step)  # type: ignore[no-any-return]

    def preview_latents(self, x0: Tensor, condition: Conditioning) -> Tensor:
        return x0[:, :, :1]  # the first latent frame stands for the first frame alone

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x / self.scale, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        return self.model_info(
            kind="video",
            defaults=self.defaults,
            size_multiple=self.vae.spatial * self.config.patch_size,
            frame_multiple=self.vae.temporal,
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=("text-to-video", "text-to-image"),
            memory=self.memory(),
        )

    def memory(self) -> Memory:
        c, qwen = self.config, self.qwen.module
        block = self.parts.token_bytes(c.dim, int(c.mlp_ratio * c.dim), self.transformer.compute_dtype)
        return self.parts.memory(
            self.vae.tiling,
            base=2**25,
            text_pair=2 * qwen.config.num_attention_heads * qwen.dtype.itemsize,
            token=block + 48 * c.in_channels * math.prod(c.patch),
            pixel=48,
            chunk_pixel=16 * self.vae.config["block_out_channels"][0] * self.vae.dtype.itemsize,
            chunk_pixels=2**40,  # all frames of a tile
        )


def guider_scale(file: Path) -> float:
    """Read the guidance scale of a guider_config.json.

    Raises:
        ModelError: guidance of another kind.
    """
    config = read_json(file)
    require(config, file, GUIDER)
    scale: float = config.get("guidance_scale", 7.5) if config.get("enabled", True) else 1.0
    return scale
