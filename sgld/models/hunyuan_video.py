"""HunyuanVideo (Kong et al. 2024, https://arxiv.org/abs/2412.03603) and FastHunyuan, its six-step distillation.

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import attrs
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sgld.models import names
from sgld.models.base import Conditioning, DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_NORMALIZATION, Component, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.models.text import load_tokenizer
from sgld.nn.attention import Backend
from sgld.nn.blocks import DiffusionTransformer
from sgld.nn.mmdit import DualBlock, OutNorm, SingleBlock, TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d
from sgld.nn.runner import StepContext
from sgld.nn.token_refiner import Patch, PatchEmbed, TimestepTextEmbedder, TokenRefiner, token_grid, unpatchify
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams

# ---------------------------------------------------------------------------------------------- transformer


@attrs.frozen
class HunyuanVideoConfig(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {"qk_norm": "rms_norm", "image_condition_type": None, "patch_size_t": 1}

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = attrs.field(default=(16, 56, 56), converter=tuple)
    image_condition_type: str | None = None

    @property
    def dim(self) -> int:
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Patch:
        """Return the latent frames, rows and columns of a token."""
        return self.patch_size_t, self.patch_size, self.patch_size


@attrs.frozen
class HunyuanInputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, n, C], of the Llama
    pooled: Tensor  # [1, P], of CLIP
    guidance: Tensor  # [1], a thousand times the scale, in the precision of the weights as in training


class HunyuanVideoTransformer(DiffusionTransformer):
    """Predicts the velocity of a clip's latents."""

    def __init__(self, c: HunyuanVideoConfig, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.x_embedder = PatchEmbed(c.in_channels, c.dim, c.patch)
        self.context_embedder = TokenRefiner(
            c.text_embed_dim, c.dim, c.num_attention_heads, c.num_refiner_layers, (cross or backend).attend
        )
        self.time_text_embed = TimestepTextEmbedder(c.pooled_projection_dim, c.dim, c.guidance_embeds)
        shape = c.dim, c.num_attention_heads, c.attention_head_dim, SequenceAttention(mesh, backend), c.mlp_ratio
        self.transformer_blocks = nn.ModuleList(DualBlock(*shape) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*shape) for _ in range(c.num_single_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch))

    def forward(self, x: Tensor, t: Tensor, branch: HunyuanInputs, step: StepContext) -> Tensor:
        """Predict for latents x [1, C, T, H, W]; t in [0, 1000]."""
        c, split, grid = self.config, self.mesh.tokens, token_grid(x, self.config.patch)
        rope = rope_3d(grid, c.rope_axes_dim, x.device, c.rope_theta)
        layout = TokenLayout(split.shard(rope, 0), None, math.prod(grid))
        t = t.view(1).to(x.device)
        emb = self.time_text_embed(t, branch.pooled.to(self.compute_dtype), branch.guidance)
        text = self.context_embedder(branch.text.to(self.compute_dtype), t)
        h = split.shard(self.x_embedder(x.to(self.compute_dtype)), 1)  # [1, S/n, C]

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, emb, layout)  # type: ignore[no-any-return]

        h, _ = self.runner.run([*self.transformer_blocks, *self.single_transformer_blocks], (h, text), call, step)
        return unpatchify(split.gather(self.proj_out(self.norm_out(h, emb)), 1, layout.tokens), grid, c.patch)


# ------------------------------------------------------------------------------------------- text encoders

TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)  # that the model was trained with
SYSTEM_TOKENS = 95  # of the template, before the prompt
UNREAD_LAYERS = 2  # the last ones of the language model


@attrs.frozen
class LlamaStates:
    """The Llama's states [1, n, C] of a prompt in its template, without padding."""

    tokenizer: Tokenizer
    module: Any
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> LlamaStates:
        """Load text_encoder and tokenizer.

        The tokenizer is read without transformers, which would take the class that the checkpoint names for one with
        other pre-tokenization (https://github.com/huggingface/transformers/pull/45345).
        """
        from transformers import LlamaModel

        words = load_tokenizer(parts.path("tokenizer") / "tokenizer.json")
        return cls(words, text_encoder(parts, cls.component, LlamaModel, "layers", without_unread_layers))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        ids = self.tokenizer.encode(TEMPLATE.format(prompt)).ids
        return encode_after_system(self.module, ids, SYSTEM_TOKENS, name, request)


@attrs.frozen
class ClipSummary:
    """CLIP's one vector [1, P] for a prompt, without padding."""

    tokenizer: Any
    module: Any
    component = "text_encoder_2"

    @classmethod
    def load(cls, parts: ComponentLoader) -> ClipSummary:
        """Load text_encoder_2 and tokenizer_2."""
        from transformers import CLIPTextModel

        return cls(tokenizer(parts, "tokenizer_2"), text_encoder(parts, cls.component, CLIPTextModel, "encoder"))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        ids, most = self.tokenizer(prompt).input_ids, self.module.config.max_position_embeddings
        if len(ids) > most:
            request.notes.append(f"{name}: the second of two text encoders reads {most} of its {len(ids)} tokens")
            ids = [*ids[: most - 1], ids[-1]]
        return EncodedText(self.module(torch.tensor([ids], device=self.module.device)).pooler_output, 0)


def encode_after_system(module: Any, ids: list[int], system: int, name: str, request: EncodeRequest) -> EncodedText:
    """Encode the tokens of a prompt that follow `system` tokens of its template, cut to `max_sequence_length`."""
    most = request.params.max_sequence_length
    if (count := len(ids) - system) > most:
        request.notes.append(f"{name} cut from {count} to {most} tokens, the most this request allows")
    tokens = torch.tensor([ids[: system + most]], device=module.device)
    states = module(tokens, use_cache=False).last_hidden_state[:, system:]
    return EncodedText(states, states.shape[1])


def without_unread_layers(module: Any) -> nn.Module:
    """Remove the last layers and the norm of a language model."""
    module.layers, module.norm = module.layers[:-UNREAD_LAYERS], nn.Identity()
    return module  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- family

TASKS = ("text-to-video", "text-to-image", "image-to-video", "image-to-image")
HUNYUAN = {
    "negative_prompt": "", "max_sequence_length": 256, "width": 1280, "height": 720, "num_frames": 125, "fps": 24,
    "num_inference_steps": 50, "guidance_scale": 6.0, "true_cfg_scale": 1.0,
}  # fmt: skip
FAST = HUNYUAN | {"num_inference_steps": 6, "flow_shift": 17.0}
CHUNK_FRAMES = 17  # that the autoencoder decodes at once

NO_EMBEDDING = "this checkpoint has no embedded guidance; use true_cfg_scale"


class HunyuanVideo(DiffusionModel):
    """HunyuanVideoPipeline checkpoints: `guidance_scale` is an input of the transformer, `true_cfg_scale` guides."""

    architecture = Component(
        HunyuanVideoTransformer, HunyuanVideoConfig, ("transformer_blocks", "single_transformer_blocks")
    )
    needs = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae", "scheduler", "transformer")
    lora_names = names.HUNYUAN_VIDEO

    config: HunyuanVideoConfig
    vae: Autoencoder

    def known_defaults(self) -> Mapping[str, Any]:
        return FAST if "fasthunyuan" in self.parts.settings.model.model_path.lower() else HUNYUAN

    def load_components(self) -> None:
        from diffusers import AutoencoderKLHunyuanVideo

        self.llama, self.clip = LlamaStates.load(self.parts), ClipSummary.load(self.parts)
        self.text_encoders = self.llama, self.clip
        self.vae = Autoencoder(self.parts, AutoencoderKLHunyuanVideo, 8, 4, tiled=True)
        self.scale: float = self.vae.config["scaling_factor"]
        if (tile := self.vae.tiling) is not None:  # for its encoder
            self.vae.module.enable_tiling(tile.height, tile.width, None, tile.stride_height, tile.stride_width)

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        texts = (
            (c.text_embed_dim, self.llama.module.config.hidden_size),
            (c.pooled_projection_dim, self.clip.module.config.hidden_size),
        )
        return (c.in_channels, self.vae.config["latent_channels"]), texts

    @property
    def patch(self) -> Sequence[int]:
        return self.config.patch

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        return 1, self.config.in_channels, *self.vae.grid(params)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        return self.scale * self.vae.encode(frames.transpose(0, 1)[None]).float()

    def branch(self, texts: Sequence[EncodedText], pictures: None, params: SamplingParams) -> HunyuanInputs:
        text, pooled = (encoded.states for encoded in texts)
        scale = torch.tensor([params.guidance_scale], dtype=self.transformer.compute_dtype, device=self.mesh.device)
        return HunyuanInputs(text, pooled, 1000 * scale)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return Schedule.even(params.num_inference_steps, params.flow_shift)

    def guidance_scale(self, params: SamplingParams) -> float:
        return params.true_cfg_scale or 1.0

    def forward(self, x: Tensor, t: Tensor, branch: HunyuanInputs, step: StepContext) -> Tensor:
        return self.transformer(x, t, branch, step)  # type: ignore[no-any-return]

    def preview_latents(self, x0: Tensor, condition: Conditioning) -> Tensor:
        return x0[:, :, :1]  # the first latent frame stands for the first frame alone

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x / self.scale, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        c, pictures = self.config, int(self.parts.settings.memory.vae_config.load_encoder)
        return self.model_info(
            kind="video",
            defaults=self.defaults,
            size_multiple=self.vae.spatial * c.patch_size,
            frame_multiple=self.vae.temporal,
            pictures=PictureRule(max=pictures),
            unsupported=NO_NORMALIZATION | ({} if c.guidance_embeds else {"guidance_scale": NO_EMBEDDING}),
            tasks=TASKS[: 2 + 2 * pictures],
            memory=self.memory(),
        )

    def memory(self) -> Memory:
        c, tile, llama = self.config, self.vae.tiling, self.llama.module
        block = self.parts.token_bytes(c.dim, int(c.mlp_ratio * c.dim), self.transformer.compute_dtype)
        return self.parts.memory(
            tile,
            base=2**25,
            text_pair=2 * llama.config.num_attention_heads * llama.dtype.itemsize,
            token=block + 48 * c.in_channels * math.prod(c.patch),
            pixel=27,
            chunk_pixel=16 * self.vae.config["block_out_channels"][0] * self.vae.dtype.itemsize,
            chunk_pixels=CHUNK_FRAMES * (tile.height * tile.width if tile else 1280 * 720),
        )
