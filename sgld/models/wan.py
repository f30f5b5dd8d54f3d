"""Wan (Wan Team 2025, https://arxiv.org/abs/2503.20314): video from text and from a picture.

Wan 2.1; the two experts of Wan 2.2; TI2V-5B, whose tokens have times of their own; few-step models such as FastWan.
The attribute names of the transformer are the keys of the diffusers checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import attrs
from torch import Tensor

from sgld.errors import BadRequest, ModelError
from sgld.models import names
from sgld.models.base import Conditioning, DiffusionModel, EncodedText, EncodeRequest, Schedule
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, Component, ComponentLoader
from sgld.models.text import PromptEncoder, UMT5Encoder, pad
from sgld.models.vae import CHUNK_PIXELS, vae_config
from sgld.models.vae_encoder import WanAutoencoder
from sgld.models.wan_defaults import SHIFT, TEXT_TOKENS, Form, defaults, few_steps, levels_of
from sgld.models.wan_pictures import (
    NO_PICTURES,
    ImageConditioning,
    ImageEncoder,
    channels_of,
    clip_of,
    crop,
)
from sgld.models.wan_transformer import TextKeys, WanConfig, WanTransformer
from sgld.nn.runner import StepContext
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.settings import TRANSFORMERS

TEXT_TASKS, PICTURE_TASKS = ("text-to-video", "text-to-image"), ("image-to-video", "image-to-image")
UNUSED = ("blocks.*.attn2.norm_added_q.", "blocks.*.to_gate_compress.")  # which nothing reads: a sparse kernel's gate
PRECISE = ("time_embedder", "scale_shift_table", "norm1", "norm2")  # float32 in every precision, as with diffusers
FEW_STEP_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}
BATCH_TOKENS = 4096  # up to so many tokens, guidance runs as one batch of two


@attrs.frozen
class UMT5Text:
    """UMT5's states [1, n, C] of a prompt, without padding."""

    encoder: UMT5Encoder
    prompts: PromptEncoder
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> UMT5Text:
        """Load text_encoder and tokenizer."""
        name, axis, keeper = cls.component, parts.mesh.axis(parts.settings.parallel.tp_size), parts.offloader.keeper
        parts.torch_only(name, "its attention adds a learned bias for each distance")
        folders, dtype = (parts.path("tokenizer"), parts.path(name)), parts.dtype(name)
        prompts = PromptEncoder.load(*folders, dtype, parts.mesh.device, keeper(name), axis)
        return cls(parts.loaded(prompts.encoder), prompts)

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        states, note = self.prompts.encode(prompt, request.params.max_sequence_length)
        if note:
            request.notes.append(note if name == "prompt" else f"negative {note}")
        return EncodedText(states, states.shape[1])


class Wan(DiffusionModel):
    """Wan checkpoints, of four kinds of pipeline; Wan 2.2 has a second transformer, for low noise.

    To a transformer with text input a picture is where denoising begins; others are conditioned on it.
    """

    architecture = Component(WanTransformer, WanConfig, unused=UNUSED, precise=PRECISE)
    lora_names = names.WAN
    any_scheduler = True
    few_steps = True

    config: WanConfig
    transformers: Mapping[str, WanTransformer]
    vae: WanAutoencoder

    @property
    def boundary(self) -> float | None:
        """Return the share of the time above which the first of two transformers works."""
        ratio: float | None = self.parts.index.get("boundary_ratio")
        return ratio

    @property
    def times(self) -> Sequence[int] | None:
        """Return the times of a few-step model's steps."""
        s = self.parts.settings
        return few_steps(s.model.model_path, self.parts.index["_class_name"], s.model.dmd_denoising_steps)

    @cached_property
    def expands_times(self) -> bool:
        """Return true for a model whose tokens have times of their own. A picture's time is 0."""
        residual = vae_config(self.parts.path("vae") / "config.json").is_residual
        return bool(self.parts.index.get("expand_timesteps", residual))

    @property
    def is_image_conditioned(self) -> bool:
        """Return true for a transformer with pictures as an input."""
        return bool(self.config.picture_channels) or self.expands_times

    def known_defaults(self) -> Mapping[str, Any]:
        experts = 1 + ("transformer_2" in self.parts.names)
        conditioned = bool(self.config.picture_channels)
        form = Form(self.config.num_layers, experts, conditioned, self.expands_times, self.times)
        known = defaults(self.parts.settings.model.model_path, form)
        return known | ({"boundary_ratio": self.boundary} if experts == 2 else {})

    def load_components(self) -> None:
        if self.times is not None:
            self.scheduler = FEW_STEP_SCHEDULER
        self.text = UMT5Text.load(self.parts)
        self.text_encoders = (self.text,)
        self.vae = WanAutoencoder(self.parts)
        self.image_encoder = self.load_image_encoder()

    def load_image_encoder(self) -> ImageEncoder | None:
        """Load the image encoder, if the transformer has an input for it.

        Raises:
            ModelError: the model lacks it, or the VAE's encoder, which an image-conditioned transformer needs.
        """
        if self.config.picture_channels and not self.vae.can_encode:
            raise ModelError(
                f"{self.parts.path('vae')}: this model cannot work without the VAE's encoder; it is missing, or "
                "vae_config.load_encoder leaves it out"
            )
        if self.config.image_dim is None:
            return None
        for name in ("image_encoder", "image_processor"):
            if name not in self.parts.names:
                raise ModelError(f"{self.parts.folder / 'model_index.json'}: lacks {name}")
        return ImageEncoder(self.parts)

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        c = self.config
        return (c.out_channels, self.vae.channels), ((c.text_dim, self.text.encoder.shared.embedding_dim),)

    # ----------------------------------------------------------------------------------------------- encoding

    def encode_pictures(self, request: EncodeRequest) -> ImageConditioning:
        """Encode pictures, cropped to the size of the output, as the transformer's inputs."""
        params, encode = request.params, partial(self.vae.encode, raise_if_cancelled=request.raise_if_cancelled)
        pictures, frames = crop(request.pictures, params.width, params.height), params.num_frames
        if self.expands_times:
            return ImageConditioning(first=encode(clip_of(pictures, 1)))
        if frames < len(pictures):
            raise BadRequest(f"{frames}: it is too few for {len(pictures)} pictures", field="num_frames")
        tokens = None if self.image_encoder is None else self.image_encoder.encode(pictures)
        return ImageConditioning(channels_of(pictures, frames, encode), tokens=tokens)

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.encode(frames, raise_if_cancelled)

    def branch(self, texts: Sequence[EncodedText], pictures: Any, params: SamplingParams) -> Tensor:
        return texts[0].states

    # ---------------------------------------------------------------------------------------------- denoising

    @property
    def patch(self) -> Sequence[int]:
        return self.config.patch_size

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        return 1, self.vae.channels, *(n // p * p for n, p in zip(self.vae.grid(params), self.patch, strict=True))

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        if self.times is None:
            return Schedule(params.flow_shift)
        sigmas = levels_of(self.times, self.parts.train_steps, params.flow_shift or SHIFT)
        return Schedule(sigmas=sigmas, exact=True, times=self.times)

    def works_low(self, t: Tensor, params: SamplingParams) -> bool:
        """Return true for a time below the boundary, where a second transformer takes over."""
        ratio = self.boundary if params.boundary_ratio is None else params.boundary_ratio
        return ratio is not None and float(t) < ratio * self.parts.train_steps

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        low = params.guidance_scale_2 is not None and self.works_low(t, params)
        return params.guidance_scale_2 if low and params.guidance_scale_2 is not None else params.guidance_scale

    def velocities(
        self, x: Tensor, t: Tensor, condition: Conditioning, step: StepContext | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict as the template does, but few tokens of two branches as one batch."""
        name = TRANSFORMERS[len(self.transformers) == 2 and self.works_low(t, condition.params)]
        self.parts.offloader.need(name)
        keys, pictures, cfg = self.text_keys(name, condition), condition.pictures or NO_PICTURES, self.mesh.cfg
        x, step = pictures.beside(x), step or StepContext()

        def predict(x: Tensor, keys: TextKeys, branch: int) -> Tensor:
            return self.transformers[name](x, t, keys, pictures.clean_frames, step.of(branch))  # type: ignore[no-any-return]

        if condition.negative is None:
            return predict(x, keys, 0), None
        if cfg.size == 2:
            both = cfg.gather(predict(x, keys, cfg.index), 0)
        elif math.prod(self.transformers[name].grid(x)) > BATCH_TOKENS:
            return predict(x, keys.row(0), 0), predict(x, keys.row(1), 1)
        else:
            both = predict(x.expand(2, -1, -1, -1, -1), keys, 0)
        positive, negative = both.chunk(2)
        return positive, negative

    def text_keys(self, name: str, condition: Conditioning) -> TextKeys:
        """Return keys and values for a transformer; computed at its first step, and dropped at another's."""
        if name not in condition.store:
            condition.store.clear()
            texts = condition.branches
            if len(texts) == 2 and self.mesh.cfg.size == 2:
                texts = [texts[self.mesh.cfg.index]]
            fold = self.parts.platform.biased_attention_is_fast
            text, bias = pad(texts, condition.params.max_sequence_length, fold)
            tokens = None if condition.pictures is None else condition.pictures.tokens
            condition.store[name] = self.transformers[name].text_keys(text, bias, tokens)
        keys: TextKeys = condition.store[name]
        return keys

    # ----------------------------------------------------------------------------------------------- decoding

    def finalize_latents(self, x: Tensor, condition: Conditioning) -> Tensor:
        return x if condition.pictures is None else condition.pictures.finalize_latents(x)

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        frames = 2 if self.is_image_conditioned else 1  # the first frame would be the picture; the decoder is causal
        return self.decode(x0[:, :, :frames], raise_if_cancelled)[-1:]

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.vae.decode(x, raise_if_cancelled)

    # -------------------------------------------------------------------------------------------- description

    def describe(self) -> ModelInfo:
        pt, ph, pw = self.config.patch_size
        least, most = self.picture_counts()
        tasks = () if least else TEXT_TASKS
        return self.model_info(
            kind="video",
            defaults=self.defaults,
            size_multiple=self.vae.spatial * math.lcm(ph, pw),
            frame_multiple=self.vae.temporal * pt,
            pictures=PictureRule(least, most, starts_denoising=not self.is_image_conditioned),
            fixed_steps=None if self.times is None else len(self.times),
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=tasks + (PICTURE_TASKS[: 1 if self.is_image_conditioned else 2] if most else ()),
            max_tokens=TEXT_TOKENS,
            memory=self.memory(),
        )

    def picture_counts(self) -> tuple[int, int]:
        """Return how many pictures it takes, at least and at most: without CLIP a second may be the last frame."""
        c = self.config
        if not c.picture_channels:
            return 0, int(self.vae.can_encode)
        return (2, 2) if c.pos_embed_seq_len else (1, 1 if c.image_dim else 2)

    def memory(self) -> Memory:
        """Estimate, as measured in float32: 12 copies of the latents; for each pixel 6 numbers while frames are joined.

        Times of their own take two vectors for each token.
        """
        c, text, vae = self.config, self.text.encoder, self.vae.decoder
        dtype = self.transformers[TRANSFORMERS[0]].compute_dtype
        return self.parts.memory(
            vae.tiling,
            base=2**25 + 4 * c.num_layers * TEXT_TOKENS * c.dim * dtype.itemsize,
            text_pair=4 * text.heads * text.shared.weight.element_size(),
            token=self.parts.token_bytes(c.dim, c.ffn_dim, dtype)
            + 48 * c.in_channels * math.prod(c.patch_size)
            + 8 * c.dim * self.expands_times,
            paired_tokens=0 if self.mesh.cfg.size == 2 else 2 * BATCH_TOKENS,
            pixel=27,
            chunk_pixel=vae.chunk_pixel_bytes,
            chunk_pixels=CHUNK_PIXELS,
        )
