"""Qwen-Image (Qwen Team 2025, https://arxiv.org/abs/2508.02324): pictures from text, and from pictures and text.

The attribute names of the transformer are the keys of the diffusers checkpoint. Its autoencoder is that of Wan 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Generator, Tensor, nn

from sgld import inputs
from sgld.errors import BadRequest, ModelError
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule
from sgld.models.components import NO_NORMALIZATION, ComponentLoader
from sgld.models.hf_components import text_encoder, tokenizer
from sgld.models.vae import CHUNK_PIXELS, Vae
from sgld.models.vae_encoder import VaeEncoder, has_encoder
from sgld.nn.attention import Backend
from sgld.nn.blocks import Denoiser, Embedder, FeedForward, sinusoid
from sgld.nn.mmdit import JointAttention, OutNorm, TokenLayout, finite, modulate
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import pick, read_json
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams, near
from sgld.platform import Platform

# ---------------------------------------------------------------------------------------------- transformer

PATCH = 2  # latent pixels of a token's side
TIME_CHANNELS = 256


@attrs.frozen
class QwenImageConfig:
    """Architecture numbers, as in transformer/config.json."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    joint_attention_dim: int
    num_layers: int
    patch_size: int = PATCH
    axes_dims_rope: tuple[int, int, int] = attrs.field(default=(16, 56, 56), converter=tuple)
    zero_cond_t: bool = False  # to the input pictures it is always time 0
    guidance_embeds: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False
    pooled_projection_dim: int | None = None  # of early files; nothing has ever read it

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim


@attrs.frozen(eq=False)
class BranchInputs:
    """One branch of the conditioning: text [1, L, C], and the input pictures' tokens [1, S', 4C], if there are any."""

    text: Tensor
    pictures: Tensor | None
    place: TokenLayout
    still: Tensor | None  # [S/n], 1 for tokens that are always at time 0, else 0; None: there are none


class TimeEmbedding(nn.Module):
    """The embedding of the time; key `timestep_embedder`."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = Embedder(TIME_CHANNELS, dim, F.silu)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t [B] in [0, 1000] -> [B, C]"""
        y: Tensor = self.timestep_embedder(sinusoid(t, TIME_CHANNELS).to(dtype))
        return y


class QwenImageBlock(nn.Module):
    """Two streams, each with weights of its own, that attend to both."""

    def __init__(self, c: QwenImageConfig, among: SequenceAttention):
        super().__init__()
        self.img_mod, self.txt_mod = (nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim)) for _ in range(2))
        self.attn = JointAttention(c.dim, c.num_attention_heads, c.attention_head_dim, among)
        self.img_mlp, self.txt_mlp = (FeedForward(c.dim, 4 * c.dim) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, told: BranchInputs) -> tuple[Tensor, Tensor]:
        """x [1, S/n, C] and text [1, L, C] at the embeddings [1 or 2, C] of the time, and of time 0."""
        mod, own = self.img_mod(emb).chunk(6, -1), self.txt_mod(emb[:1])[:, None].chunk(6, -1)
        each = partial(spread, told.still)
        y, z = self.attn(modulate(x, each(mod[0]), each(mod[1])), modulate(text, *own[:2]), told.place)
        x, text = x + each(mod[2]) * y, text + own[2] * z
        x = x + each(mod[5]) * self.img_mlp(modulate(x, each(mod[3]), each(mod[4])))
        text = text + own[5] * self.txt_mlp(modulate(text, *own[3:5]))
        return finite(x), finite(text)


def spread(still: Tensor | None, mod: Tensor) -> Tensor:
    """What modulates each token: [1, 1, C] of one time, or [1, S/n, C] of two, picked by 0 and 1."""
    return mod[:, None] if still is None else mod[still][None]


class QwenImageTransformer(Denoiser):
    """Velocity of latents x [1, C, 1, h, w] at one time."""

    def __init__(self, c: QwenImageConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        among = SequenceAttention(mesh, backend)
        self.time_text_embed = TimeEmbedding(c.dim)
        self.txt_norm = nn.RMSNorm(c.joint_attention_dim, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(c.in_channels, c.dim), nn.Linear(c.joint_attention_dim, c.dim)
        self.transformer_blocks = nn.ModuleList(QwenImageBlock(c, among) for _ in range(c.num_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, PATCH**2 * c.out_channels)

    def forward(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        split, tokens = self.mesh.tokens, pack(x)
        sequence = tokens if told.pictures is None else torch.cat([tokens, told.pictures], 1)
        h = self.img_in(split.shard(sequence.to(self.dtype), 1))
        text = self.txt_in(self.txt_norm(told.text.to(self.dtype)))
        times = t.view(1) if told.still is None else torch.stack([t, torch.zeros_like(t)])
        emb = self.time_text_embed(times.to(x.device), self.dtype)
        for block in self.walk(self.transformer_blocks):
            h, text = block(h, text, emb, told)
        h = split.gather(self.proj_out(self.norm_out(h, emb[:1])), 1, told.place.tokens)
        return unpack(h[:, : tokens.shape[1]], x.shape[-2:])


def pack(x: Tensor) -> Tensor:
    """Latents [1, C, 1, h, w] to tokens [1, h/2 * w/2, 4C]."""
    B, C, _, h, w = x.shape
    x = x.reshape(B, C, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, h * w // PATCH**2, C * PATCH**2)


def unpack(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Tokens to latents of height and width `sides`."""
    h, w = sides
    x = x.view(len(x), h // PATCH, w // PATCH, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(x), -1, 1, h, w)


# ------------------------------------------------------------------------------------------------- prompts

USER, ASSISTANT = "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
PAD = "<|image_pad|>"  # the place of a picture's token in a prompt
SEEN = f"<|vision_start|>{PAD}<|vision_end|>"
DRAW = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
EDIT = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
)
PICTURE_AREA, GLANCE_AREA = 1024**2, 384**2  # pixels of an input picture, and of what the text encoder sees of it
PICTURE_MULTIPLE = 32
LONGEST = 100  # times its other side: an input picture's longer one


@attrs.frozen
class Form:
    """What a pipeline class makes of prompts and pictures."""

    system: str
    drop: int  # tokens that stand before the user's; their hidden states are left out
    steps: int = 50
    most: int = 0  # pictures
    numbered: bool = False  # each picture has a number, and is seen small

    @property
    def needs(self) -> tuple[str, ...]:
        """Components."""
        return ("tokenizer", "text_encoder", "vae", "scheduler", "transformer") + ("processor",) * (self.most > 0)

    def marks(self, counts: Sequence[int]) -> str:
        """What stands for pictures of so many tokens, before the user's words."""
        heads = [f"Picture {i}: " if self.numbered else "" for i, _ in enumerate(counts, 1)]
        return "".join(head + SEEN.replace(PAD, PAD * n) for head, n in zip(heads, counts, strict=True))


FORMS = {
    "QwenImagePipeline": Form(DRAW + USER, 34),
    "QwenImageEditPipeline": Form(EDIT + USER, 64, most=1),
    "QwenImageEditPlusPipeline": Form(EDIT + USER, 64, steps=40, most=16, numbered=True),
}


class PromptEncoder:
    """Prompts and pictures to hidden states, by Qwen2.5-VL (https://arxiv.org/abs/2502.13923)."""

    def __init__(self, parts: ComponentLoader, form: Form):
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.form, sees = form, form.most > 0
        self.tokenizer = tokenizer(parts, "tokenizer")
        if (known := len(self.tokens(form.system))) != form.drop:
            raise ModelError(
                f"{parts.path('tokenizer')}: it makes {known} tokens of the model's own words, not {form.drop}"
            )
        self.processor: Any = image_processor(parts.path("processor")) if sees else None
        whole, layers = Qwen2_5_VLForConditionalGeneration, "language_model.layers"
        self.module = text_encoder(parts, "text_encoder", whole, layers, partial(trunk, sees))

    def tokens(self, text: str) -> list[int]:
        """Of a text with the model's special tokens."""
        found: list[int] = self.tokenizer(text).input_ids
        return found

    def look(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Patches of pictures, and the grid of each, as the module takes them."""
        if not pictures or self.processor is None:
            return {}
        seen = self.processor(list(pictures), return_tensors="pt")
        return {name: x.to(self.module.device) for name, x in seen.items()}

    def encode(self, prompt: str, seen: dict[str, Tensor], length: int) -> tuple[Tensor, int, str | None]:
        """Hidden states [1, L, C], the prompt's tokens, at most `length`, and a warning when it was cut.

        Raises:
            BadRequest: the prompt holds the mark of a picture.
        """
        counts = [int(n) // self.processor.merge_size**2 for n in seen["image_grid_thw"].prod(-1)] if seen else []
        if counts and PAD in prompt:
            raise BadRequest(f"it holds {PAD}, which stands for a picture", field="prompt")
        before = self.form.system + self.form.marks(counts)
        found, own = self.tokens(before + prompt + ASSISTANT), len(self.tokens(before))
        note = None
        if (given := len(found) - own) > length:
            note = f"prompt cut from {given} to {length} tokens, the most this request allows"
        ids = torch.tensor([found[: own + length]], device=self.module.device)
        kinds = {"mm_token_type_ids": (ids == self.tokenizer.convert_tokens_to_ids(PAD)).int()} if seen else {}
        hidden = self.module(input_ids=ids, use_cache=False, **seen, **kinds).last_hidden_state
        return hidden[:, self.form.drop :], min(given, length), note


def trunk(sees: bool, whole: Any) -> Any:
    """Qwen2.5-VL without the head that says the next word, and without eyes where no picture is shown to it."""
    if not sees:
        whole.model.visual = None
    return whole.model


def image_processor(folder: Path) -> Any:
    """That of transformers which works on PIL's pictures. Raises `ModelError`."""
    from transformers import Qwen2VLImageProcessorPil

    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be read: {error}") from None


# -------------------------------------------------------------------------------------------------- family

MAX_TOKENS = 1024
MADE_FOR = 3  # input pictures, where there may be several
SPACE = " "
NEGATIVE_2512 = (  # coarse, deformed, oversaturated, waxen, too smooth, confused, blurred text
    "低分辨率，低画质，肢体畸形，手指畸形，画面过饱和，蜡像感，人脸无细节，过度光滑，画面具有AI感。构图混乱。"
    "文字模糊，扭曲。"
)


class QwenImage(NativeModel):
    """QwenImagePipeline, QwenImageEditPipeline and QwenImageEditPlusPipeline checkpoints."""

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        self._form = form = FORMS[read_json(load.folder / "model_index.json")["_class_name"]]
        self.parts = parts = ComponentLoader(load, mesh, platform, progress, form.needs)
        self.scheduler = parts.scheduler
        parts.needs_euler()
        self._config = c = config_of(parts)
        self._defaults = self._read_defaults(load)
        mesh = parts.share(c.num_attention_heads, self._defaults.get("guidance_scale", 1.0) > 1)
        keep, s = parts.offloader, load.settings
        parts.torch_only("vae", "its attention has a single head of many channels")
        self._text = PromptEncoder(parts, form)
        make = partial(QwenImageTransformer, c, mesh)
        self._transformer = parts.transformer(
            "transformer", make, c.attention_head_dim, ("transformer_blocks",), crosses=False
        )
        self.lora = parts.lora({"transformer": self._transformer}, ())
        vae, rows = parts.dtype("vae"), mesh.all if s.parallel_decode else None
        self._vae = Vae(parts.path("vae"), s, vae, mesh.device, keep.keeper("vae"), rows)
        parts.loaded(self._vae.module)
        self.parallel_decode = s.parallel_decode
        self._takes_pictures = s.vae_config.load_encoder and has_encoder(parts.path("vae"))
        if form.most and not s.vae_config.load_encoder:
            raise BadRequest("vae_config.load_encoder: this model cannot work without the encoder", "load_encoder")
        self._load_encoder = partial(VaeEncoder, parts.path("vae"), s, vae, mesh.device, keep.keeper("vae_encoder"))
        self._encoder = self._load_encoder() if form.most else None
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c, latent, text = self._config, self._vae.channels, self._text.module.config.text_config.hidden_size
        if (latent, text) != (c.out_channels, c.joint_attention_dim):
            raise ModelError(
                f"the components do not fit: the transformer takes {c.out_channels} latent channels and text of "
                f"{c.joint_attention_dim}, the vae has {latent} channels, the text encoder makes {text}"
            )

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        check_shapes(pictures)
        offloader, area = self.parts.offloader, GLANCE_AREA if self._form.numbered else PICTURE_AREA
        offloader.need("text_encoder")
        seen = self._text.look([resized(picture, area) for picture in pictures])
        prompts = {"": params.prompt}
        if self.guidance(torch.zeros(()), params) > 1:
            prompts["negative "] = SPACE if params.negative_prompt is None else params.negative_prompt
        read = []
        for prompt in prompts.values():
            raise_if_cancelled()
            read.append(self._text.encode(prompt, seen, params.max_sequence_length))
        notes = [kind + note for kind, (_, _, note) in zip(prompts, read, strict=True) if note]
        if len(pictures) > MADE_FOR:
            notes.append(f"image_path: {len(pictures)} pictures; this model was made for 1 to {MADE_FOR}")
        offloader.need("vae_encoder")
        latents = []
        for picture in pictures:
            raise_if_cancelled()
            latents.append(self._latents(picture))
        positive, negative = [self._tell(text, latents, params) for text, _, _ in read] + [None] * (2 - len(read))
        counts: dict[str, Any] = {"prompt_tokens": read[0][1], "latent_tokens": math.prod(self._grid(params))}
        return Conditioning(positive, negative, **counts), notes + (self.unguided(params) if negative is None else [])

    def _latents(self, picture: Image) -> Tensor:
        """[1, C, 1, h, w]"""
        assert self._encoder is not None
        pixels = torch.from_numpy(np.array(resized(picture, PICTURE_AREA))).permute(2, 0, 1)[None]
        return self._encoder.encode(2 * (pixels.float() / 255) - 1)

    def _tell(self, text: Tensor, latents: Sequence[Tensor], params: SamplingParams) -> BranchInputs:
        """One branch, with where everything stands."""
        c, split, device = self._config, self.mesh.tokens, self.mesh.device
        own, others = self._grid(params), [(z.shape[-2] // PATCH, z.shape[-1] // PATCH) for z in latents]
        positions, first = stand([own, *others])
        words = torch.arange(first, first + text.shape[1])[:, None].expand(-1, 3)
        rope, text_rope = (rope_at(p.to(device), c.axes_dims_rope) for p in (positions, words))
        still = (torch.arange(len(positions)) >= math.prod(own)).long().to(device) if c.zero_cond_t else None
        return BranchInputs(
            text,
            torch.cat([pack(z) for z in latents], 1) if latents else None,
            TokenLayout(split.shard(rope, 0), text_rope, len(positions)),
            None if still is None else split.shard(still, 0),
        )

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        rows, columns = self._grid(params)
        shape = (1, self._config.out_channels, 1, PATCH * rows, PATCH * columns)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self.mesh.device)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        if self._encoder is None:  # most requests bring no picture
            self._encoder = self._load_encoder()
        self.parts.offloader.need("vae_encoder")
        return self._encoder.encode(frames, raise_if_cancelled)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, x[0, 0].numel() // PATCH**2)

    def predict(self, x: Tensor, t: Tensor, told: BranchInputs) -> Tensor:
        self.parts.offloader.need("transformer")
        y: Tensor = self._transformer(x, t, told)
        return y

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        return params.guidance_scale if params.true_cfg_scale is None else params.true_cfg_scale

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        """Every token of the guided prediction is as long as the prompt's."""
        guided, own = (pack(v) for v in (super().guide(positive, negative, scale, params), positive.float()))
        guided = guided * (own.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(guided, positive.shape[-2:])

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self._vae.decode(x, raise_if_cancelled)

    def _grid(self, params: SamplingParams) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = PATCH * self._vae.spatial
        return params.height // side, params.width // side

    def _describe(self) -> ModelInfo:
        form = self._form
        edits = "image-to-image" if self._takes_pictures else None
        return self.model_info(
            kind="image",
            defaults=self._defaults,
            size_multiple=PATCH * self._vae.spatial,
            frame_multiple=1,
            pictures=PictureRule(
                min=int(form.most > 0),
                max=form.most or int(self._takes_pictures),
                starts_denoising=form.most == 0,
                shape_from=-1,
                multiple=PICTURE_MULTIPLE if form.most else None,
            ),
            unsupported=NO_NORMALIZATION,
            tasks=tuple(filter(None, (None if form.most else "text-to-image", edits))),
            max_tokens=MAX_TOKENS,
            memory=self._memory(),
        )

    def _memory(self) -> Memory:
        """As Wan's. The base holds the tokens of the text, and what the text encoder sees of a picture."""
        c, dtype = self._config, self._transformer.dtype
        text = self._text.module.config.text_config
        token = self.parts.token_bytes(c.dim, 4 * c.dim, dtype) + 48 * c.in_channels
        seen = PICTURE_AREA if self._form.most else 0  # pixels
        tokens = seen // (PATCH * self._vae.spatial) ** 2
        word = (3 * text.intermediate_size + 8 * text.hidden_size) * self._text.module.dtype.itemsize
        return self.parts.memory(
            self._vae.tiling,
            base=2**25 + max(MAX_TOKENS * token, (MAX_TOKENS + tokens) * word),
            token=token,
            picture=tokens * token,
            picture_pixels=seen // 2,  # the encoder has half as many channels as the decoder
            pixel=27,
            chunk_pixel=self._vae.chunk_pixel_bytes,
            chunk_pixels=CHUNK_PIXELS,
        )

    def _read_defaults(self, load: Load) -> dict[str, Any]:
        """The folder's generation_config.json, else those of the known checkpoint."""
        form = self._form
        later = "Qwen-Image-2512" in f"{load.settings.model_path} {load.folder}"
        width, height = (1024, 1024) if form.most else (1280, 720)
        return self.parts.defaults(
            {"width": width, "height": height, "num_inference_steps": form.steps, "guidance_scale": 4.0,
             "negative_prompt": NEGATIVE_2512 if later else SPACE, "max_sequence_length": 512}
        )  # fmt: skip


def stand(grids: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """Positions [S, 3] of the tokens of pictures, the middle of each at 0; and the text's first, after all of them."""
    positions = [
        torch.cartesian_prod(torch.tensor([i]), torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
        for i, (h, w) in enumerate(grids)
    ]
    return torch.cat(positions), max(side // 2 for grid in grids for side in grid)


def resized(picture: Image, area: int) -> Image:
    """The picture's shape in about that area."""
    return picture.resize(near(area, picture.size, PICTURE_MULTIPLE), Resampling.LANCZOS)


def check_shapes(pictures: Sequence[Image]) -> None:
    """Raise `BadRequest` for a picture too long to be seen."""
    for picture in pictures:
        if max(picture.size) > LONGEST * min(picture.size):
            raise inputs.refused(picture, f"is too long; one side may be {LONGEST} times the other")


def config_of(parts: ComponentLoader) -> QwenImageConfig:
    """The numbers of the transformer's config.json.

    Raises:
        ModelError: another architecture.
    """
    file = parts.path("transformer") / "config.json"
    c: QwenImageConfig = pick(parts.config("transformer"), QwenImageConfig, file)
    for name, needed in (
        ("guidance_embeds", False), ("use_additional_t_cond", False), ("use_layer3d_rope", False),
        ("patch_size", PATCH), ("in_channels", PATCH**2 * c.out_channels),
        ("axes_dims_rope", (*c.axes_dims_rope[:2], c.attention_head_dim - sum(c.axes_dims_rope[:2]))),
    ):  # fmt: skip
        if (value := getattr(c, name)) != needed:
            raise ModelError(f"{file}: {name} is {value!r}; only {needed!r} is supported")
    return c
