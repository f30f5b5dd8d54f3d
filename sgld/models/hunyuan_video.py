"""HunyuanVideo (Kong et al. 2024, https://arxiv.org/abs/2412.03603) and FastHunyuan, its six-step distillation.

The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from PIL.Image import Image
from tokenizers import Tokenizer
from torch import Generator, Tensor, nn

from sgld.errors import ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule
from sgld.models.components import NO_NORMALIZATION, ComponentLoader
from sgld.models.hf_components import Autoencoder, text_encoder, tokenizer
from sgld.models.text import load_tokenizer
from sgld.nn.attention import Attention, Backend
from sgld.nn.blocks import Denoiser, Embedder, FeedForward, sinusoid
from sgld.nn.lora_formats import Renames
from sgld.nn.mmdit import DualBlock, OutNorm, SingleBlock, TokenLayout
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_3d
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json, require
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer

TIME_DIM = 256  # of the sinusoids of time and guidance
Patch = tuple[int, int, int]  # in time, height and width


@attrs.frozen
class HunyuanVideoConfig:
    """Architecture numbers, as in transformer/config.json."""

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
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch(self) -> Patch:
        """Latent frames, rows and columns of a token."""
        return self.patch_size_t, self.patch_size, self.patch_size


@attrs.frozen
class BranchInputs:
    """One branch of the conditioning: text [1, n, C] and its summary [1, P], and the guidance it was embedded with."""

    text: Tensor
    pooled: Tensor
    guidance: Tensor  # [1], a thousand times the scale, in the precision of the weights as in training


class TimeText(nn.Module):
    """Time and a summary of the text, and with `guided` a guidance scale, as one embedding [1, C]."""

    def __init__(self, dim_text: int, dim: int, guided: bool = False):
        super().__init__()
        self.timestep_embedder = Embedder(TIME_DIM, dim, F.silu)
        self.text_embedder = Embedder(dim_text, dim, F.silu)
        self.guidance_embedder = Embedder(TIME_DIM, dim, F.silu) if guided else None

    def forward(self, t: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        emb: Tensor = self.timestep_embedder(sinusoid(t, TIME_DIM).to(pooled.dtype))
        if self.guidance_embedder is not None and guidance is not None:
            emb = emb + self.guidance_embedder(sinusoid(guidance, TIME_DIM).to(pooled.dtype))
        summary: Tensor = self.text_embedder(pooled)
        return emb + summary


class TextAttention(nn.Module):
    """Attention of the text to itself."""

    def __init__(self, dim: int, heads: int, attend: Attention):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))  # [B, L, H, D]
        y: Tensor = self.to_out[0](self.attend(q, k, v, None).flatten(2))
        return y


class Gates(nn.Module):
    """What the time lets through of each half of a refiner block; key `linear`."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(emb))[:, None].chunk(2, -1)  # type: ignore[no-any-return]


class RefinerBlock(nn.Module):
    """Attention and a feed-forward layer on text [1, n, C]."""

    def __init__(self, dim: int, heads: int, attend: Attention):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = TextAttention(dim, heads, attend)
        self.ff = FeedForward(dim, 4 * dim, F.silu)
        self.norm_out = Gates(dim)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        gate, ff_gate = self.norm_out(emb)
        x = x + gate * self.attn(self.norm1(x))
        y: Tensor = x + ff_gate * self.ff(self.norm2(x))
        return y


class Refiner(nn.Module):
    """Key `refiner_blocks`."""

    def __init__(self, dim: int, heads: int, layers: int, attend: Attention):
        super().__init__()
        self.refiner_blocks = nn.ModuleList(RefinerBlock(dim, heads, attend) for _ in range(layers))


class TokenRefiner(nn.Module):
    """The language model's text, causal so far, made bidirectional and told the time: [1, n, C_text] to [1, n, C]."""

    def __init__(self, dim_text: int, dim: int, heads: int, layers: int, attend: Attention):
        super().__init__()
        self.time_text_embed = TimeText(dim_text, dim)
        self.proj_in = nn.Linear(dim_text, dim)
        self.token_refiner = Refiner(dim, heads, layers, attend)

    def forward(self, text: Tensor, t: Tensor) -> Tensor:
        emb = self.time_text_embed(t, text.float().mean(1).type_as(text))
        x: Tensor = self.proj_in(text)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, emb)
        return x


class Patches(nn.Module):
    """Latents [1, C, T, H, W] to tokens [1, S, C]; key `proj`."""

    def __init__(self, channels: int, dim: int, patch: Patch):
        super().__init__()
        self.proj = nn.Conv3d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.flatten(2).mT.contiguous()


class HunyuanVideoTransformer(Denoiser):
    """Velocity of latents x [1, C, T, H, W] at one time, told one prompt."""

    def __init__(self, c: HunyuanVideoConfig, mesh: Mesh, backend: Backend, cross: Backend | None = None):
        super().__init__()
        self.config, self.mesh = c, mesh
        self.x_embedder = Patches(c.in_channels, c.dim, c.patch)
        self.context_embedder = TokenRefiner(
            c.text_embed_dim, c.dim, c.num_attention_heads, c.num_refiner_layers, (cross or backend).attend
        )
        self.time_text_embed = TimeText(c.pooled_projection_dim, c.dim, c.guidance_embeds)
        shape = c.dim, c.num_attention_heads, c.attention_head_dim, SequenceAttention(mesh, backend), c.mlp_ratio
        self.transformer_blocks = nn.ModuleList(DualBlock(*shape) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*shape) for _ in range(c.num_single_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, c.out_channels * math.prod(c.patch))

    def forward(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        c, split, grid = self.config, self.mesh.tokens, grid_of(x, self.config.patch)
        rope = rope_3d(grid, c.rope_axes_dim, x.device, c.rope_theta)
        place = TokenLayout(split.shard(rope, 0), None, math.prod(grid))
        t = t.view(1).to(x.device)
        emb = self.time_text_embed(t, told.pooled, told.guidance)
        text = self.context_embedder(told.text, t)
        h = split.shard(self.x_embedder(x.to(self.dtype)), 1)  # [1, S/n, C]
        for block in self.walk(itertools.chain(self.transformer_blocks, self.single_transformer_blocks)):
            h, text = block(h, text, emb, place)
        return unpatch(split.gather(self.proj_out(self.norm_out(h, emb)), 1, place.tokens), grid, c.patch)


def grid_of(x: Tensor, patch: Patch) -> Patch:
    """Tokens of latents [1, C, T, H, W] in time, height and width."""
    t, h, w = (n // p for n, p in zip(x.shape[2:], patch, strict=True))
    return t, h, w


def unpatch(h: Tensor, grid: Patch, patch: Patch) -> Tensor:
    """[1, S, C*pt*ph*pw] -> [1, C, T, H, W]"""
    h = h.view(h.shape[0], *grid, -1, *patch)
    return h.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


# --------------------------------------------------------------------------------------------------- prompts

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
UNREAD_LAYERS = 2  # the last ones of the Llama


@attrs.frozen
class Prompts:
    """A Llama's hidden states of a prompt, and CLIP's summary of it. Neither sees any padding."""

    tokenizer: Tokenizer
    llama: Any
    clip_tokenizer: Any
    clip: Any

    @classmethod
    def load(cls, parts: ComponentLoader) -> Prompts:
        """From the folders of the four components.

        The Llama's tokenizer is read without transformers, which would take the class that the checkpoint names for
        one with other pre-tokenization (https://github.com/huggingface/transformers/pull/45345).
        """
        from transformers import CLIPTextModel, LlamaModel

        return cls(
            load_tokenizer(parts.path("tokenizer") / "tokenizer.json"),
            text_encoder(parts, "text_encoder", LlamaModel, "layers", without_end),
            tokenizer(parts, "tokenizer_2"),
            text_encoder(parts, "text_encoder_2", CLIPTextModel, "encoder"),
        )

    def states(self, name: str, prompt: str, most: int, notes: list[str]) -> Tensor:
        """Hidden states [1, n, C] of at most so many tokens; a prompt that is cut is noted by its name."""
        ids = self.tokenizer.encode(TEMPLATE.format(prompt)).ids
        return states_after(SYSTEM_TOKENS, self.llama, ids, most, name, notes)

    def summary(self, name: str, prompt: str, notes: list[str]) -> Tensor:
        """CLIP's one vector [1, P]; that it does not read all of a long prompt is noted."""
        ids, most = self.clip_tokenizer(prompt).input_ids, self.clip.config.max_position_embeddings
        if len(ids) > most:
            notes.append(f"{name}: the second of two text encoders reads {most} of its {len(ids)} tokens")
            ids = [*ids[: most - 1], ids[-1]]
        found: Tensor = self.clip(torch.tensor([ids], device=self.clip.device)).pooler_output
        return found


def states_after(system: int, model: Any, ids: list[int], most: int, name: str, notes: list[str]) -> Tensor:
    """States [1, n, C] of the tokens after the first `system` ones, at most so many; that they are cut is noted."""
    if (count := len(ids) - system) > most:
        notes.append(f"{name} cut from {count} to {most} tokens, the most this request allows")
    tokens = torch.tensor([ids[: system + most]], device=model.device)
    found: Tensor = model(tokens, use_cache=False).last_hidden_state
    return found[:, system:]


def without_end(llama: Any) -> nn.Module:
    """A Llama without the layers that nothing reads, and without the norm after them."""
    llama.layers, llama.norm = llama.layers[:-UNREAD_LAYERS], nn.Identity()
    found: nn.Module = llama
    return found


# -------------------------------------------------------------------------------------------------- family

TASKS = ("text-to-video", "text-to-image", "image-to-video", "image-to-image")
NEEDS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "vae", "scheduler", "transformer")
LAYERS = ("transformer_blocks", "single_transformer_blocks")
HUNYUAN = {
    "negative_prompt": "", "max_sequence_length": 256, "width": 1280, "height": 720, "num_frames": 125, "fps": 24,
    "num_inference_steps": 50, "guidance_scale": 6.0, "true_cfg_scale": 1.0,
}  # fmt: skip
FAST = HUNYUAN | {"num_inference_steps": 6, "flow_shift": 17.0}
CHUNK_FRAMES = 17  # that the autoencoder decodes at once

HUNYUAN_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors'; then also to ComfyUI's
    (r"^transformer_blocks\.", "double_blocks."),
    (r"^single_transformer_blocks\.", "single_blocks."),
    (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.", "txt_in.t_embedder."),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^time_text_embed\.timestep_embedder\.", "time_in."),
    (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"^time_text_embed\.text_embedder\.linear_1$", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "vector_in.out_layer"),
    (r"^x_embedder\.", "img_in."),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1#1#0"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^(double.*)\.attn\.to_([qkv])$", r"\1.img_attn_qkv#\2"),
    (r"^(double.*)\.attn\.add_([qkv])_proj$", r"\1.txt_attn_qkv#\2"),
    (r"^(single.*)\.attn\.to_([qkv])$", r"\1.linear1#\2"),
    (r"^(txt_in.*)\.attn\.to_([qkv])$", r"\1.self_attn_qkv#\2"),
    (r"#q$", "#0"),
    (r"#k$", "#1"),
    (r"#v$", "#2"),
    (r"^(single.*)\.proj_mlp$", r"\1.linear1#3"),
    (r"^(single.*)\.proj_out$", r"\1.linear2"),
    (r"^(single.*)\.norm\.", r"\1.modulation."),
    (r"^(double.*)\.attn\.norm_([qk])$", r"\1.img_attn_\2_norm"),
    (r"^(double.*)\.attn\.norm_added_([qk])$", r"\1.txt_attn_\2_norm"),
    (r"^(single.*)\.attn\.norm_([qk])$", r"\1.\2_norm"),
    (r"^(double.*)\.norm1\.", r"\1.img_mod."),
    (r"^(double.*)\.norm1_context\.", r"\1.txt_mod."),
    (r"^(double.*)\.attn\.to_out\.0$", r"\1.img_attn_proj"),
    (r"^(double.*)\.attn\.to_add_out$", r"\1.txt_attn_proj"),
    (r"^(double.*)\.ff\.", r"\1.img_mlp."),
    (r"^(double.*)\.ff_context\.", r"\1.txt_mlp."),
    (r"^(txt_in.*)\.attn\.to_out\.0$", r"\1.self_attn_proj"),
    (r"^(txt_in.*)\.ff\.", r"\1.mlp."),
    (r"^(txt_in.*)\.norm_out\.linear$", r"\1.adaLN_modulation.1"),
    (r"^(time_in|guidance_in|.*t_embedder)\.linear_1$", r"\1.mlp.0|\1.in_layer"),
    (r"^(time_in|guidance_in|.*t_embedder)\.linear_2$", r"\1.mlp.2|\1.out_layer"),
    (r"^(.*c_embedder)\.linear_1$", r"\1.linear_1|\1.in_layer"),
    (r"^(.*c_embedder)\.linear_2$", r"\1.linear_2|\1.out_layer"),
    (r"^(.*)\.net\.0\.proj$", r"\1.fc1|\1.0"),
    (r"^(.*)\.net\.2$", r"\1.fc2|\1.2"),
    (r"^(.*_attn)_(qkv|proj)(.*)$", r"\1_\2\3|\1.\2\3"),
    (r"^(.*_mod|.*modulation)\.linear$", r"\1.linear|\1.lin"),
)


class HunyuanVideo(NativeModel):
    """HunyuanVideoPipeline checkpoints. `guidance_scale` is what the transformer is told; `true_cfg_scale` guides."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        from diffusers import AutoencoderKLHunyuanVideo

        self.parts = parts = ComponentLoader(load, mesh, platform, progress, NEEDS)
        parts.needs_euler()
        self.scheduler = parts.scheduler
        self._config = c = hunyuan_config(parts.path("transformer") / "config.json")
        self._defaults = parts.defaults(FAST if "fasthunyuan" in load.settings.model.model_path.lower() else HUNYUAN)
        mesh = parts.share(c.num_attention_heads, (self._defaults.get("true_cfg_scale") or 1) > 1)
        self._prompts = Prompts.load(parts)
        make = partial(HunyuanVideoTransformer, c, mesh)
        self._transformer = parts.transformer("transformer", make, c.attention_head_dim, LAYERS)
        self.lora = parts.lora({"transformer": self._transformer}, HUNYUAN_ORIGINAL)
        self._vae = Autoencoder(parts, AutoencoderKLHunyuanVideo, 8, 4, tiled=True)
        self._scaling: float = self._vae.config["scaling_factor"]
        if (tile := self._vae.tiling) is not None:  # for its encoder
            self._vae.module.enable_tiling(tile.height, tile.width, None, tile.stride_height, tile.stride_width)
        self.parallel_decode = load.settings.memory.parallel_decode
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c, text, pooled = self._config, self._prompts.llama.config.hidden_size, self._prompts.clip.config.hidden_size
        latent = self._vae.config["latent_channels"]
        if (latent, text, pooled) != (c.in_channels, c.text_embed_dim, c.pooled_projection_dim):
            raise ModelError(
                f"the components do not fit: the transformer takes {c.in_channels} latent channels and text of "
                f"{c.text_embed_dim} and {c.pooled_projection_dim}, the vae has {latent} channels, the text encoders "
                f"make {text} and {pooled}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        guided = (params.true_cfg_scale or 1) > 1
        prompts = {"prompt": params.prompt} | ({"negative_prompt": params.negative_prompt or ""} if guided else {})
        notes = [] if guided else self.unguided(params)
        self.parts.offloader.need("text_encoder")
        length, dtype = params.max_sequence_length, self._transformer.dtype
        states = [self._prompts.states(name, prompt, length, notes) for name, prompt in prompts.items()]
        raise_if_cancelled()
        self.parts.offloader.need("text_encoder_2")
        summaries = [self._prompts.summary(name, prompt, notes) for name, prompt in prompts.items()]
        guidance = torch.tensor([params.guidance_scale], dtype=dtype, device=self.mesh.device) * 1000
        told = [BranchInputs(s.to(dtype), p.to(dtype), guidance) for s, p in zip(states, summaries, strict=True)]
        tokens = math.prod(self._vae.grid(params)) // math.prod(self._config.patch)
        counts: dict[str, Any] = {"prompt_tokens": states[0].shape[1], "latent_tokens": tokens}
        return Conditioning(told[0], told[1] if guided else None, **counts), notes

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        shape = (1, self._config.in_channels, *self._vae.grid(params))
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        self.parts.offloader.need("vae")
        raise_if_cancelled()
        return self._scaling * self._vae.encode(frames.transpose(0, 1)[None]).float()

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return Schedule.even(params.num_inference_steps, params.flow_shift)

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        y: Tensor = self._transformer(x, t, told)
        return y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return params.true_cfg_scale or 1.0

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.decode(x0[:, :, :1], raise_if_cancelled)  # the first latent frame stands for the first frame alone

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x / self._scaling, raise_if_cancelled)

    def _describe(self) -> ModelInfo:
        c, pictures = self._config, int(self.parts.settings.memory.vae_config.load_encoder)
        lacks = dict(NO_NORMALIZATION)
        if not c.guidance_embeds:
            lacks["guidance_scale"] = "this checkpoint has no embedded guidance; use true_cfg_scale"
        return self.model_info(
            kind="video",
            defaults=self._defaults,
            size_multiple=self._vae.spatial * c.patch_size,
            frame_multiple=self._vae.temporal,
            pictures=PictureRule(max=pictures),
            unsupported=lacks,
            tasks=TASKS[: 2 + 2 * pictures],
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        c, tile, dtype = self._config, self._vae.tiling, self._transformer.dtype
        llama, hidden = self._prompts.llama.config, int(c.mlp_ratio * c.dim)
        return self.parts.memory(
            self._vae.tiling,
            base=2**25,
            text_pair=2 * llama.num_attention_heads * self._prompts.llama.dtype.itemsize,
            token=self.parts.token_bytes(c.dim, hidden, dtype) + 48 * c.in_channels * math.prod(c.patch),
            pixel=27,
            chunk_pixel=16 * self._vae.config["block_out_channels"][0] * self._vae.dtype.itemsize,
            chunk_pixels=CHUNK_FRAMES * (tile.height * tile.width if tile else 1280 * 720),
        )


def hunyuan_config(file: Path) -> HunyuanVideoConfig:
    """The numbers of a transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    given = read_json(file)
    require(given, file, {"qk_norm": "rms_norm", "image_condition_type": None, "patch_size_t": 1})
    config: HunyuanVideoConfig = pick(given, HunyuanVideoConfig, file)
    return config
