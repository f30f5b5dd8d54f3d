"""LTX-2 and LTX-2.3: video with sound from text, and from a first frame (https://arxiv.org/abs/2601.03233)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from PIL.Image import Image, Resampling, fromarray
from torch import Generator, Tensor

from sgld import inputs
from sgld.errors import BadRequest, ModelError
from sgld.media import through_h264
from sgld.messages import Load
from sgld.models.base import Conditioning, NativeModel, Schedule, Sound
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, ComponentLoader, Length
from sgld.models.hf_components import Autoencoder, text_encoder
from sgld.models.ltx2_sound import SoundDecoder
from sgld.models.ltx2_transformer import BranchInputs, LTX2Transformer, StreamLayout, ltx2_config
from sgld.models.text import load_tokenizer
from sgld.nn.lora_formats import Renames
from sgld.nn.parallel import Mesh
from sgld.nn.weights import require
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams
from sgld.platform import Platform

NEEDS = (
    "tokenizer", "text_encoder", "connectors", "vae", "audio_vae", "vocoder", "scheduler", "transformer",
)  # fmt: skip
TASKS, PICTURE_TASKS = ("text-to-video", "text-to-image"), ("image-to-video",)
TEXT_TOKENS = 1024  # with the learned ones that stand for padding
PICTURE_RATE_FACTOR = 33  # of the H.264 that pictures pass through: the model was trained on frames of videos
LEAST_LATENTS = 2  # a side, for the decoder of LTX-2 reflects what it sees at the edges

BASE = {
    "negative_prompt": "", "max_sequence_length": TEXT_TOKENS, "width": 768, "height": 512, "num_frames": 121,
    "fps": 24,
}  # fmt: skip
LENGTH = Length(1024, 4096, 0.95, 2.05)
LTX2_DEFAULTS = BASE | {"num_inference_steps": 40, "guidance_scale": 4.0}
LTX23_DEFAULTS = BASE | {"num_inference_steps": 30, "guidance_scale": 3.0}

LTX2_ORIGINAL: Renames = (  # from our layers' names, which are diffusers', to the authors'
    (r"^(audio_)?proj_in$", r"\1patchify_proj"),
    (r"^time_embed\.", "adaln_single."),
    (r"^audio_time_embed\.", "audio_adaln_single."),
    (r"^(audio_)?prompt_adaln\.", r"\1prompt_adaln_single."),
    (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
    (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
    (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
    (r"\.norm_([qk])$", r".\1_norm"),
    (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
)


@attrs.frozen
class Guidance:
    """How the prediction moves away from weaker ones: scales, for video and audio; `perturbed` 0 is without it.

    The weaker ones know another text (classifier-free guidance), skip the attention to their own stream in one block
    (STG, Hyung et al. 2024, https://arxiv.org/abs/2411.18664), or skip the attention between the streams (the paper's
    modality guidance, off at 1).
    """

    audio_text: float | None = None  # None: that of the request, which is the video's
    perturbed: float = 0.0
    isolated: float = 1.0
    rescale: float = 0.0  # Lin et al. 2023, https://arxiv.org/abs/2305.08891
    block: int = 28  # that is perturbed

    def branches(self, told: Sequence[BranchInputs]) -> list[Branch]:
        """What is predicted at each step: for the prompt, and with a negative one also the weaker ones that count."""
        first, *other = (Branch(text) for text in told)
        weaker = [(self.perturbed, Branch(first.told, self.block)), (self.isolated - 1, Branch(first.told, None, True))]
        return [first, *other, *(branch for weight, branch in weaker if weight and other)]

    def __call__(self, x: Tensor, sigma: float, velocities: Tensor, text: float) -> Tensor:
        """The velocity to follow at one stream's latents x [1, N], from those of the branches [k, N]; float32."""
        own, *others = velocities[:, None].unbind()
        weights = [text - 1, *(weight for weight in (self.perturbed, self.isolated - 1) if weight)]
        v = own + sum(weight * (own - other) for weight, other in zip(weights, others, strict=True))
        if self.rescale:
            clean, guided = x - sigma * own, x - sigma * v
            v = (x - guided * (1 + self.rescale * (clean.std() / guided.std() - 1))) / sigma
        return v


LTX23_GUIDANCE = Guidance(audio_text=7.0, perturbed=1.0, isolated=3.0, rescale=0.7)


@attrs.frozen
class Branch:
    """One of the predictions that guidance compares."""

    told: BranchInputs
    perturbed: int | None = None
    isolated: bool = False


@attrs.frozen
class Layout:
    """How latents [1, N] are made up: video tokens, frame by frame, then audio tokens."""

    grid: tuple[int, int, int]  # of the video in time, height and width
    length: int  # of the audio
    channels: int
    audio_channels: int
    given: int  # frames of the grid that are a picture's

    @property
    def tokens(self) -> int:
        """Of the video."""
        return math.prod(self.grid)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[k, N] as what is of the video and what is of the audio."""
        n = self.tokens * self.channels
        return x[:, :n], x[:, n:]

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Video tokens [1, S, C] and audio tokens [1, A, C]."""
        video, audio = self.parts(x)
        return video.view(1, -1, self.channels), audio.view(1, -1, self.audio_channels)

    def video(self, x: Tensor) -> Tensor:
        """[1, C, T, h, w]"""
        return self.streams(x)[0].mT.reshape(1, self.channels, *self.grid)


@attrs.frozen(eq=False)
class LTX2Conditioning(Conditioning):
    """The branches, in `positive`; the guidance; and the latents [1, n] of a first frame that is given."""

    scale: float = attrs.field(kw_only=True)
    layout: Layout = attrs.field(kw_only=True)
    first: Tensor | None = attrs.field(kw_only=True)

    def begun(self, x: Tensor) -> Tensor:
        """Latents that begin with what is given."""
        return x if self.first is None else torch.cat([self.first, x[:, self.first.shape[1] :]], 1)


class LTX2(NativeModel):
    """LTX2Pipeline and LTX2ImageToVideoPipeline checkpoints. A picture is the first frame of the video.

    A `guidance_scale` of 1 or less turns every guidance of the checkpoint off.
    """

    _layout: Layout  # of the output that is being made

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        from diffusers import AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2 import LTX2TextConnectors
        from transformers import Gemma3ForConditionalGeneration

        self.parts = parts = ComponentLoader(load, mesh, platform, progress, NEEDS)
        self.scheduler = parts.scheduler
        self._config = c = ltx2_config(parts.path("transformer") / "config.json")
        self._guidance = LTX23_GUIDANCE if c.cross_attn_mod else Guidance()
        self._defaults = parts.defaults(LTX23_DEFAULTS if c.cross_attn_mod else LTX2_DEFAULTS)
        guided = self._defaults.get("guidance_scale", SamplingParams().guidance_scale) > 1
        mesh = parts.share(c.num_attention_heads, guided)
        self._check_kinds()
        self._tokenizer = load_tokenizer(parts.path("tokenizer") / "tokenizer.json")
        self._text = text_encoder(parts, "text_encoder", Gemma3ForConditionalGeneration, "layers", _language)
        config = parts.config("connectors")
        self._connectors: Any = parts.module("connectors", partial(LTX2TextConnectors.from_config, config))
        make = partial(LTX2Transformer, c, mesh)
        self._transformer = parts.transformer("transformer", make, c.attention_head_dim, ("transformer_blocks",))
        self.lora = parts.lora({"transformer": self._transformer}, LTX2_ORIGINAL)
        temporal, spatial, _ = c.vae_scale_factors
        self._vae = Autoencoder(parts, AutoencoderKLLTX2Video, spatial, temporal, tiled=True, least=LEAST_LATENTS)
        self._sound = SoundDecoder(parts)
        self.parallel_decode = load.settings.parallel_decode
        self._check_widths()
        mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self._describe()

    def _check_kinds(self) -> None:
        """Raise `ModelError` for components of another kind than can be used."""
        for name, file, key, needed in (
            ("text_encoder", "config.json", "model_type", "gemma3"),
            ("connectors", "config.json", "_class_name", "LTX2TextConnectors"),
            ("vae", "config.json", "timestep_conditioning", False),
            ("scheduler", "scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
        ):
            config = self.scheduler if name == "scheduler" else self.parts.config(name)
            require(config, self.parts.path(name) / file, {key: needed})

    def _check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        c, k, text = self._config, self._connectors.config, self._text.config
        made = {
            "latent channels of the vae": (self._vae.config["latent_channels"], c.in_channels),
            "channels of the audio_vae": (self._sound.channels, c.audio_in_channels),
            "pixels a latent of the vae": (self._vae.module.spatial_compression_ratio, self._vae.spatial),
            "frames a latent of the vae": (self._vae.module.temporal_compression_ratio, self._vae.temporal),
            "channels of the text_encoder": (text.hidden_size, k.caption_channels),
            "layers of the text_encoder": (text.num_hidden_layers + 1, k.text_proj_in_factor),
        }
        for what, (given, taken) in made.items():
            if given != taken:
                raise ModelError(f"the components do not fit: {given} {what}; {taken} are needed")

    # ------------------------------------------------------------------------------------------- conditioning

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[LTX2Conditioning, list[str]]:
        length, guided = params.max_sequence_length, params.guidance_scale > 1
        self.parts.offloader.need("text_encoder")
        prompts = [params.prompt, params.negative_prompt or ""][: 1 + guided]
        states, cuts = zip(*(self._read(prompt, length) for prompt in prompts), strict=True)
        notes = [note if i == 0 else f"negative {note}" for i, note in enumerate(cuts) if note]
        notes += [] if guided else self.unguided(params)
        raise_if_cancelled()
        self.parts.offloader.need("connectors")
        layout = self._layout_of(params)
        video, audio = self._transformer.places(layout.grid, layout.length, params.fps)
        told = [self._connect(state, length, video, audio) for state in states]
        raise_if_cancelled()
        condition = LTX2Conditioning(
            self._guidance.branches(told),
            prompt_tokens=states[0].shape[1],
            latent_tokens=layout.tokens + layout.length,
            scale=params.guidance_scale,
            layout=layout,
            first=self._first_frame(pictures[0], params) if pictures else None,
        )
        return condition, notes

    def _read(self, prompt: str, length: int) -> tuple[Tensor, str | None]:
        """The states [1, n, C, layers] of at most `length` tokens, and a warning when the prompt was cut.

        The pipeline pads to the left. That changes nothing: positions are relative, and no token sees what follows.
        """
        tokens = self._tokenizer.encode(prompt.strip()).ids
        note = None
        if len(tokens) > length:
            note = f"prompt cut from {len(tokens)} to {length} tokens, the most this request allows"
        ids = torch.tensor([tokens[:length]], device=self.mesh.device)
        states = self._text(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return torch.stack(states, -1), note

    def _connect(self, states: Tensor, length: int, video: StreamLayout, audio: StreamLayout) -> BranchInputs:
        """What the connectors make of them; learned tokens follow, so that there are `length`.

        Raises:
            BadRequest: the learned tokens do not fit into `length`.
        """
        registers = self._connectors.config.video_connector_num_learnable_registers or 1
        if length % registers:
            raise BadRequest(
                f"{length} is not a multiple of {registers}, as this model needs",
                field="max_sequence_length",
            )
        n = states.shape[1]
        padded = states.new_zeros(1, length, *states.shape[2:], dtype=self._connectors.dtype)
        padded[:, length - n :] = states
        mask = torch.zeros(1, length, dtype=torch.long, device=states.device)
        mask[:, length - n :] = 1
        text, audio_text, mask = self._connectors(padded, mask, padding_side="left")
        seen = mask[0].bool()
        return BranchInputs(text[:, seen], audio_text[:, seen], video, audio)

    def _first_frame(self, picture: Image, params: SamplingParams) -> Tensor:
        """Its latents [1, n], normalized."""
        if min(picture.size) < 2:
            raise inputs.refused(picture, "is too small; each side needs 2 or more")
        self.parts.offloader.need("vae")
        seen = fromarray(through_h264(np.asarray(picture), PICTURE_RATE_FACTOR))
        seen = seen.resize((params.width, params.height), Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(seen)).to(self.mesh.device).float() / 255  # [H, W, 3]
        z = self._vae.encode((2 * pixels - 1).permute(2, 0, 1)[None, :, None]).float()  # [1, C, 1, h, w]
        mean, std = self._statistics()
        return ((z - mean) / std).flatten(2).mT.flatten(1)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of video latents [C, 1, 1, 1]."""
        mean, std = (x.view(-1, 1, 1, 1) for x in (self._vae.module.latents_mean, self._vae.module.latents_std))
        return mean, std / self._vae.module.config.scaling_factor

    # ---------------------------------------------------------------------------------------------- denoising

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        self._layout = layout = self._layout_of(params)
        video = torch.randn((1, layout.channels, *layout.grid), generator=generator, dtype=torch.float32)
        audio = torch.randn(self._sound.shape(layout.length), generator=generator, dtype=torch.float32)
        return torch.cat([video.flatten(2).mT.flatten(1), audio.transpose(1, 2).flatten(1)], 1).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self._layout_of(params).tokens, LENGTH)

    def velocities(
        self, x: Tensor, t: Tensor, condition: LTX2Conditioning, step: object = None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided one. Where two ranks share guidance, each has half of the branches."""
        x, branches = condition.begun(x), condition.positive
        mine = self.mesh.cfg.share_list(branches) if len(branches) > 1 else branches
        v = torch.cat([self.predict(x, t, (branch, condition)) for branch in mine])
        if len(branches) == 1:
            return v, None
        v, sigma = self.mesh.cfg.gather(v, 0), float(t) / self.parts.train_steps
        scales = condition.scale, self._guidance.audio_text or condition.scale
        parts = zip(condition.layout.parts(x), condition.layout.parts(v), scales, strict=True)
        return torch.cat([self._guidance(z, sigma, u, scale) for z, u, scale in parts], 1), None

    def predict(self, x: Tensor, t: Tensor, told: tuple[Branch, LTX2Conditioning]) -> Tensor:
        self.parts.offloader.need("transformer")
        branch, condition = told
        clean = 0 if condition.first is None else condition.first.shape[1] // condition.layout.channels
        video, audio = self._transformer(
            *condition.layout.streams(x), t, branch.told, clean, branch.perturbed, branch.isolated
        )
        return torch.cat([video.flatten(1), audio.flatten(1)], 1).float()

    def finalize_latents(self, x: Tensor, condition: LTX2Conditioning) -> Tensor:
        return condition.begun(x)

    # ----------------------------------------------------------------------------------------------- decoding

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """The first frame that is not the picture's."""
        return self.decode(self._layout.video(x0)[:, :, : self._layout.given + 1], raise_if_cancelled)[-1:]

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """Also of video latents [1, C, T, h, w] alone."""
        mean, std = self._statistics()
        return self._vae.decode((x if x.ndim == 5 else self._layout.video(x)) * std + mean, raise_if_cancelled)

    def sound(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Sound | None:
        if self.mesh.rank or self._layout.grid[0] == 1:
            return None  # a single frame has none
        return self._sound.decode(self._layout.streams(x)[1], raise_if_cancelled)

    def _layout_of(self, params: SamplingParams) -> Layout:
        c = self._config
        length = max(1, round(params.num_frames / params.fps * c.audio_rate))
        return Layout(self._vae.grid(params), length, c.in_channels, c.audio_in_channels, len(params.image_path or ()))

    def _describe(self) -> ModelInfo:
        pictures = self.parts.settings.vae_config.load_encoder
        return self.model_info(
            kind="video",
            defaults=self._defaults,
            size_multiple=self._vae.spatial,
            frame_multiple=self._vae.temporal,
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=TASKS + (PICTURE_TASKS if pictures else ()),
            max_tokens=TEXT_TOKENS,
            memory=self._memory(),
            pictures=PictureRule(max=int(pictures), starts_denoising=False),
            audio=True,
        )

    def _memory(self) -> Memory:
        """Measured on a CPU: 48 copies of the decoder's last features; the text's states of all layers three times."""
        vae = self._vae.module.config
        c, text, dtype = self._config, self._text.config, self._transformer.dtype
        states = text.hidden_size * (text.num_hidden_layers + 1)
        return self.parts.memory(
            self._vae.tiling,
            base=2**25 + 3 * TEXT_TOKENS * states * self._connectors.dtype.itemsize,
            text_pair=4 * text.num_attention_heads * self._text.dtype.itemsize,
            token=self.parts.token_bytes(c.dim, 4 * c.dim, dtype) + 48 * c.in_channels,
            pixel=90 if self._vae.tiling else 27,  # tiles are held twice while they are joined
            chunk_pixel=int(48 * vae.decoder_block_out_channels[0] / vae.upsample_factor[0] / vae.patch_size**2)
            * self._vae.dtype.itemsize,
            chunk_pixels=2**40,  # all frames at once
        )


def _language(whole: Any) -> Any:
    """Gemma 3 without its eyes, and without the layer that tells the next token."""
    return whole.model.language_model
