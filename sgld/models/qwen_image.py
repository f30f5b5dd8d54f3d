"""Qwen-Image (Qwen Team 2025, https://arxiv.org/abs/2508.02324): pictures from text, and from pictures and text.

The attribute names of the transformer are the keys of the diffusers checkpoint. Its autoencoder is that of Wan 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from sgld import inputs
from sgld.errors import BadRequest, ModelError
from sgld.models.base import DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_NORMALIZATION, Component, ComponentLoader
from sgld.models.hf_components import text_encoder, tokenizer
from sgld.models.vae import CHUNK_PIXELS
from sgld.models.vae_encoder import WanAutoencoder
from sgld.nn.attention import Backend
from sgld.nn.blocks import DiffusionTransformer, FeedForward, TimestepEmbedder
from sgld.nn.mmdit import JointAttention, OutNorm, TokenLayout, finite, modulate, pack, unpack
from sgld.nn.parallel import Mesh
from sgld.nn.rope import rope_at
from sgld.nn.runner import StepContext
from sgld.nn.usp import SequenceAttention
from sgld.nn.weights import Architecture
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams, near

Grid = tuple[int, int]  # tokens in height and width

# ---------------------------------------------------------------------------------------------- transformer

PATCH = 2  # latent pixels of a token's side


@attrs.frozen
class QwenImageConfig(Architecture):
    """Architecture numbers, as in transformer/config.json."""

    supported: ClassVar[Mapping[str, object]] = {
        "guidance_embeds": False, "use_additional_t_cond": False, "use_layer3d_rope": False, "patch_size": PATCH,
    }  # fmt: skip

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
        """Return the channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def fault(self) -> str | None:
        if self.in_channels != (needed := PATCH**2 * self.out_channels):
            return f"in_channels is {self.in_channels}; only {needed} is supported"
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            return f"axes_dims_rope is {self.axes_dims_rope}; its sum must be {self.attention_head_dim}"
        return None


@attrs.frozen(eq=False)
class QwenInputs:
    """The inputs of one guidance branch beside the noise."""

    text: Tensor  # [1, L, C]
    pictures: Tensor | None  # tokens [1, S', 4C] of the input pictures
    layout: TokenLayout  # of the latents, and after them the input pictures
    clean: Tensor | None  # [S/n], 1 for tokens that are always at time 0, else 0; None: there are none


class QwenImageBlock(nn.Module):
    """Two streams, each with weights of its own, that attend to both."""

    def __init__(self, c: QwenImageConfig, attention: SequenceAttention):
        super().__init__()
        self.img_mod, self.txt_mod = (nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim)) for _ in range(2))
        self.attn = JointAttention(c.dim, c.num_attention_heads, c.attention_head_dim, attention)
        self.img_mlp, self.txt_mlp = (FeedForward(c.dim, 4 * c.dim) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, emb: Tensor, branch: QwenInputs) -> tuple[Tensor, Tensor]:
        """Return x [1, S/n, C] and text [1, L, C] after the block; emb [1 or 2, C] is of the time, and of time 0."""
        mod, own = self.img_mod(emb).chunk(6, -1), self.txt_mod(emb[:1])[:, None].chunk(6, -1)
        each = partial(spread, branch.clean)
        y, z = self.attn(modulate(x, each(mod[0]), each(mod[1])), modulate(text, *own[:2]), branch.layout)
        x, text = x + each(mod[2]) * y, text + own[2] * z
        x = x + each(mod[5]) * self.img_mlp(modulate(x, each(mod[3]), each(mod[4])))
        text = text + own[5] * self.txt_mlp(modulate(text, *own[3:5]))
        return finite(x), finite(text)


def spread(clean: Tensor | None, mod: Tensor) -> Tensor:
    """Return each token's modulation: [1, 1, C] of one time, or [1, S/n, C] of two, picked by 0 and 1."""
    return mod[:, None] if clean is None else mod[clean][None]


class QwenImageTransformer(DiffusionTransformer):
    """Predicts the velocity of latents x [1, C, 1, h, w] at one time."""

    frequencies = 256

    def __init__(self, c: QwenImageConfig, mesh: Mesh, backend: Backend):
        super().__init__()
        self.config, self.mesh = c, mesh
        attention = SequenceAttention(mesh, backend)
        self.time_text_embed = nn.ModuleDict({"timestep_embedder": TimestepEmbedder(self.frequencies, c.dim)})
        self.txt_norm = nn.RMSNorm(c.joint_attention_dim, eps=1e-6)
        self.img_in, self.txt_in = nn.Linear(c.in_channels, c.dim), nn.Linear(c.joint_attention_dim, c.dim)
        self.transformer_blocks = nn.ModuleList(QwenImageBlock(c, attention) for _ in range(c.num_layers))
        self.norm_out = OutNorm(c.dim)
        self.proj_out = nn.Linear(c.dim, PATCH**2 * c.out_channels)

    def forward(self, x: Tensor, t: Tensor, branch: QwenInputs, step: StepContext) -> Tensor:
        """Predict for latents x [1, C, 1, h, w] at time t in [0, 1000]."""
        split, tokens = self.mesh.tokens, pack(x[:, :, 0])
        sequence = tokens if branch.pictures is None else torch.cat([tokens, branch.pictures], 1)
        h = self.img_in(split.shard(sequence.to(self.compute_dtype), 1))
        text = self.txt_in(self.txt_norm(branch.text.to(self.compute_dtype)))
        times = t.view(1) if branch.clean is None else torch.stack([t, torch.zeros_like(t)])
        emb = self.time_text_embed["timestep_embedder"](times.to(x.device))

        def call(block: nn.Module, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return block(*hidden, emb, branch)  # type: ignore[no-any-return]

        h, _ = self.runner.run(self.transformer_blocks, (h, text), call, step)
        h = split.gather(self.proj_out(self.norm_out(h, emb[:1])), 1, branch.layout.tokens)
        return unpack(h[:, : tokens.shape[1]], tokens_of(x))[:, :, None]


def tokens_of(z: Tensor) -> Grid:
    """Return the rows and columns of tokens of latents [..., h, w]."""
    return z.shape[-2] // PATCH, z.shape[-1] // PATCH


# --------------------------------------------------------------------------------------------- text encoder

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
class PromptForm:
    """How a pipeline class presents prompts and pictures to the text encoder."""

    system: str
    drop: int  # tokens that stand before the user's; their hidden states are left out
    steps: int = 50
    max_pictures: int = 0
    numbered: bool = False  # each picture has a number, and is seen small

    def marks(self, counts: Sequence[int]) -> str:
        """Return the placeholders of pictures of so many tokens, which come before the user's words."""
        heads = [f"Picture {i}: " if self.numbered else "" for i, _ in enumerate(counts, 1)]
        return "".join(head + SEEN.replace(PAD, PAD * n) for head, n in zip(heads, counts, strict=True))


FORMS = {
    "QwenImagePipeline": PromptForm(DRAW + USER, 34),
    "QwenImageEditPipeline": PromptForm(EDIT + USER, 64, max_pictures=1),
    "QwenImageEditPlusPipeline": PromptForm(EDIT + USER, 64, steps=40, max_pictures=16, numbered=True),
}


@attrs.frozen(eq=False)
class Seen:
    """The input pictures as the text encoder takes them; prepared once for all prompts of a request."""

    inputs: Mapping[str, Tensor]  # patches, and the grid of each picture
    before: str  # the chat up to the user's words
    tokens: int  # of `before`


@attrs.frozen(eq=False)
class QwenText:
    """Hidden states [1, L, C] of prompts and pictures, by Qwen2.5-VL (https://arxiv.org/abs/2502.13923)."""

    tokenizer: Any
    processor: Any  # None where no pictures are seen
    module: Any
    form: PromptForm
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader, form: PromptForm) -> QwenText:
        """Load text_encoder, tokenizer, and where pictures are seen the processor.

        Raises:
            ModelError: a tokenizer with other tokens for the model's own words.
        """
        from transformers import Qwen2_5_VLForConditionalGeneration

        words, sees = tokenizer(parts, "tokenizer"), form.max_pictures > 0
        if (known := len(words(form.system).input_ids)) != form.drop:
            raise ModelError(
                f"{parts.path('tokenizer')}: it makes {known} tokens of the model's own words, not {form.drop}"
            )
        processor = image_processor(parts.path("processor")) if sees else None
        whole, layers = Qwen2_5_VLForConditionalGeneration, "language_model.layers"
        return cls(words, processor, text_encoder(parts, cls.component, whole, layers, partial(trunk, sees)), form)

    def see(self, request: EncodeRequest) -> Seen:
        """Prepare the pictures of a request, which are scaled to a fixed area."""
        check_shapes(request.pictures)
        if not request.pictures or self.processor is None:
            return Seen({}, self.form.system, self.form.drop)
        area = GLANCE_AREA if self.form.numbered else PICTURE_AREA
        found = self.processor([resized(picture, area) for picture in request.pictures], return_tensors="pt")
        counts = [int(n) // self.processor.merge_size**2 for n in found["image_grid_thw"].prod(-1)]
        before = self.form.system + self.form.marks(counts)
        patches = {name: x.to(self.module.device) for name, x in found.items()}
        return Seen(patches, before, len(self.tokenizer(before).input_ids))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        """Encode a prompt after the pictures. Raises `BadRequest` for a prompt that holds a picture's placeholder."""
        if "seen" not in request.store:
            request.store["seen"] = self.see(request)
        seen: Seen = request.store["seen"]
        if seen.inputs and PAD in prompt:
            raise BadRequest(f"it holds {PAD}, which stands for a picture", field="prompt")
        found, length = self.tokenizer(seen.before + prompt + ASSISTANT).input_ids, request.params.max_sequence_length
        if (count := len(found) - seen.tokens) > length:
            words = name.replace("_", " ")
            request.notes.append(f"{words} cut from {count} to {length} tokens, the most this request allows")
        ids = torch.tensor([found[: seen.tokens + length]], device=self.module.device)
        placeholder = self.tokenizer.convert_tokens_to_ids(PAD)
        kinds = {"mm_token_type_ids": (ids == placeholder).int()} if seen.inputs else {}
        states = self.module(input_ids=ids, use_cache=False, **seen.inputs, **kinds).last_hidden_state
        return EncodedText(states[:, self.form.drop :], min(count, length))


def trunk(sees: bool, whole: Any) -> Any:
    """Cut Qwen2.5-VL down: no head for the next word, and no vision tower where no picture is seen."""
    if not sees:
        whole.model.visual = None
    return whole.model


def image_processor(folder: Path) -> Any:
    """Load the image processor that works on PIL's pictures. Raises `ModelError`."""
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


class QwenImage(DiffusionModel):
    """QwenImagePipeline, QwenImageEditPipeline and QwenImageEditPlusPipeline checkpoints."""

    architecture = Component(QwenImageTransformer, QwenImageConfig, ("transformer_blocks",), crosses=False)
    empty_negative_prompt = SPACE
    patch = (PATCH, PATCH)

    config: QwenImageConfig
    vae: WanAutoencoder

    @property
    def form(self) -> PromptForm:
        """Return how the pipeline class presents prompts and pictures."""
        return FORMS[self.parts.index["_class_name"]]

    @property
    def edits(self) -> bool:
        """Return true for a model that edits pictures. Others start denoising from the picture."""
        return self.form.max_pictures > 0

    def known_defaults(self) -> Mapping[str, Any]:
        later = "Qwen-Image-2512" in f"{self.parts.settings.model.model_path} {self.parts.folder}"
        width, height = (1024, 1024) if self.edits else (1280, 720)
        return {
            "width": width, "height": height, "num_inference_steps": self.form.steps, "guidance_scale": 4.0,
            "negative_prompt": NEGATIVE_2512 if later else SPACE, "max_sequence_length": 512,
        }  # fmt: skip

    def load_components(self) -> None:
        if self.edits:
            self.parts.need("processor")
        self.text = QwenText.load(self.parts, self.form)
        self.text_encoders = (self.text,)
        self.vae = WanAutoencoder(self.parts)
        if self.edits:
            if not self.parts.settings.memory.vae_config.load_encoder:
                raise BadRequest("this model cannot work without the encoder", field="vae_config.load_encoder")
            self.vae.load_encoder()

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c, text = self.config, self.text.module.config.text_config
        return (c.out_channels, self.vae.channels), ((c.joint_attention_dim, text.hidden_size),)

    def encode_pictures(self, request: EncodeRequest) -> list[Tensor]:
        """Encode input pictures to latents [1, C, 1, h, w] each."""
        if len(request.pictures) > MADE_FOR:
            request.notes.append(
                f"image_path: {len(request.pictures)} pictures; this model was made for 1 to {MADE_FOR}"
            )
        latents = []
        for picture in request.pictures:
            request.raise_if_cancelled()
            pixels = torch.from_numpy(np.array(resized(picture, PICTURE_AREA))).permute(2, 0, 1)[None]
            latents.append(self.encode_frames(2 * (pixels.float() / 255) - 1, request.raise_if_cancelled))
        return latents

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.encode(frames, raise_if_cancelled)

    def branch(
        self, texts: Sequence[EncodedText], pictures: Sequence[Tensor] | None, params: SamplingParams
    ) -> QwenInputs:
        c, split, device = self.config, self.mesh.tokens, self.mesh.device
        text, latents, own = texts[0].states, pictures or (), self.latent_tokens(params)
        rows, columns = self.latent_shape(params)[-2:]
        positions, first = place([(rows // PATCH, columns // PATCH), *(tokens_of(z) for z in latents)])
        words = torch.arange(first, first + text.shape[1])[:, None].expand(-1, 3)
        rope, text_rope = (rope_at(p.to(device), c.axes_dims_rope) for p in (positions, words))
        clean = (torch.arange(len(positions)) >= own).long().to(device) if c.zero_cond_t else None
        return QwenInputs(
            text,
            torch.cat([pack(z[:, :, 0]) for z in latents], 1) if latents else None,
            TokenLayout(split.shard(rope, 0), text_rope, len(positions)),
            None if clean is None else split.shard(clean, 0),
        )

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        side = PATCH * self.vae.spatial
        return 1, self.config.out_channels, 1, PATCH * (params.height // side), PATCH * (params.width // side)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self.latent_tokens(params))

    def guidance_scale(self, params: SamplingParams) -> float:
        return params.guidance_scale if params.true_cfg_scale is None else params.true_cfg_scale

    def forward(self, x: Tensor, t: Tensor, branch: QwenInputs, step: StepContext) -> Tensor:
        return self.transformer(x, t, branch, step)  # type: ignore[no-any-return]

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        """Guide, with every token of the guided prediction as long as the prompt's."""
        guided = super().guide(positive, negative, scale, params)
        tokens, own = (pack(v[:, :, 0]) for v in (guided, positive.float()))
        tokens = tokens * (own.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True))
        return unpack(tokens, tokens_of(positive))[:, :, None]

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x, raise_if_cancelled)

    def describe(self) -> ModelInfo:
        most, takes_pictures = self.form.max_pictures, self.vae.can_encode
        tasks = () if self.edits else ("text-to-image",)
        return self.model_info(
            kind="image",
            defaults=self.defaults,
            size_multiple=PATCH * self.vae.spatial,
            frame_multiple=1,
            pictures=PictureRule(
                min=int(self.edits),
                max=most or int(takes_pictures),
                starts_denoising=not self.edits,
                shape_from=-1,
                multiple=PICTURE_MULTIPLE if self.edits else None,
            ),
            unsupported=NO_NORMALIZATION,
            tasks=tasks + (("image-to-image",) if takes_pictures else ()),
            max_tokens=MAX_TOKENS,
            memory=self.memory(),
        )

    def memory(self) -> Memory:
        """Estimate as Wan's; the base holds the tokens of the text, and the text encoder's of a picture."""
        c, text, decoder = self.config, self.text.module, self.vae.decoder
        token = self.parts.token_bytes(c.dim, 4 * c.dim, self.transformer.compute_dtype) + 48 * c.in_channels
        seen = PICTURE_AREA if self.edits else 0  # pixels
        tokens = seen // (PATCH * self.vae.spatial) ** 2
        t = text.config.text_config
        word = (3 * t.intermediate_size + 8 * t.hidden_size) * text.dtype.itemsize
        return self.parts.memory(
            decoder.tiling,
            base=2**25 + max(MAX_TOKENS * token, (MAX_TOKENS + tokens) * word),
            token=token,
            picture=tokens * token,
            picture_pixels=seen // 2,  # the encoder has half as many channels as the decoder
            pixel=27,
            chunk_pixel=decoder.chunk_pixel_bytes,
            chunk_pixels=CHUNK_PIXELS,
        )


def place(grids: Sequence[Grid]) -> tuple[Tensor, int]:
    """Return positions [S, 3] of the tokens of pictures, the middle of each at 0; and the text's first, after them."""
    positions = [
        torch.cartesian_prod(torch.tensor([i]), torch.arange(h) - (h - h // 2), torch.arange(w) - (w - w // 2))
        for i, (h, w) in enumerate(grids)
    ]
    return torch.cat(positions), max(side // 2 for grid in grids for side in grid)


def resized(picture: Image, area: int) -> Image:
    """Scale a picture to about an area in pixels; it keeps its shape."""
    return picture.resize(near(area, picture.size, PICTURE_MULTIPLE), Resampling.LANCZOS)


def check_shapes(pictures: Sequence[Image]) -> None:
    """Raise `BadRequest` for a picture too long to be seen."""
    for picture in pictures:
        if max(picture.size) > LONGEST * min(picture.size):
            raise inputs.refused(picture, f"is too long; one side may be {LONGEST} times the other")
