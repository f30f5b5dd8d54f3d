"""LTX-2 and LTX-2.3: video with sound from text, and from a first frame (https://arxiv.org/abs/2601.03233)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling
from torch import Generator, Tensor

from sgld import inputs
from sgld.errors import BadRequest, ModelError
from sgld.media import through_h264
from sgld.models import names
from sgld.models.base import Conditioning, DiffusionModel, EncodedText, EncodeRequest, Schedule, Sound
from sgld.models.components import NO_NORMALIZATION, NO_TRUE_CFG, Component, ComponentLoader, Length
from sgld.models.hf_components import Autoencoder, text_encoder
from sgld.models.ltx2_sound import SoundDecoder
from sgld.models.ltx2_transformer import LatentLayout, LTX2Config, LTX2Inputs, LTX2Transformer
from sgld.models.text import load_tokenizer
from sgld.nn.parallel import Axis
from sgld.nn.runner import StepContext
from sgld.nn.weights import require
from sgld.params import Memory, ModelInfo, PictureRule, SamplingParams

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


@attrs.frozen
class MultiGuidance:
    """Guidance away from weaker predictions: scales, for video and audio; `perturbed` 0 is without it.

    The weaker ones have another text (classifier-free guidance), skip the attention within each stream in one block
    (STG, Hyung et al. 2024, https://arxiv.org/abs/2411.18664), or skip the attention between the streams (the paper's
    modality guidance, off at 1).
    """

    audio_text: float | None = None  # None: that of the request, which is the video's
    perturbed: float = 0.0
    isolated: float = 1.0
    rescale: float = 0.0  # Lin et al. 2023, https://arxiv.org/abs/2305.08891
    block: int = 28  # that is perturbed

    def branches(self, texts: Sequence[LTX2Inputs]) -> list[LTX2Inputs]:
        """Return the predictions of each step: the prompt's, and under guidance the weaker ones that count."""
        first, *other = texts
        weaker = [
            (self.perturbed, attrs.evolve(first, perturbed=self.block)),
            (self.isolated - 1, attrs.evolve(first, isolated=True)),
        ]
        return [first, *other, *(branch for weight, branch in weaker if weight and other)]

    def guide(self, x: Tensor, sigma: float, velocities: Tensor, text: float) -> Tensor:
        """Guide one stream's latents x [1, N] by the branches' velocities [k, N], in float32; `text` is a scale."""
        own, *others = velocities[:, None].unbind()
        weights = [text - 1, *(weight for weight in (self.perturbed, self.isolated - 1) if weight)]
        v = own + sum(weight * (own - other) for weight, other in zip(weights, others, strict=True))
        if self.rescale:
            clean, guided = x - sigma * own, x - sigma * v
            v = (x - guided * (1 + self.rescale * (clean.std() / guided.std() - 1))) / sigma
        return v


LTX23_GUIDANCE = MultiGuidance(audio_text=7.0, perturbed=1.0, isolated=3.0, rescale=0.7)


@attrs.frozen
class GemmaStates:
    """Gemma 3's states [1, n, C, layers] of a prompt: of every layer."""

    tokenizer: Any
    module: Any
    component = "text_encoder"

    @classmethod
    def load(cls, parts: ComponentLoader) -> GemmaStates:
        """Load text_encoder, without its image encoder and output layer, and tokenizer."""
        from transformers import Gemma3ForConditionalGeneration

        words = load_tokenizer(parts.path("tokenizer") / "tokenizer.json")
        whole = Gemma3ForConditionalGeneration
        return cls(words, text_encoder(parts, cls.component, whole, "layers", lambda m: m.model.language_model))

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText:
        """Encode a prompt without padding.

        The pipeline pads to the left. That changes nothing: positions are relative, and the encoder is causal.
        """
        tokens, length = self.tokenizer.encode(prompt.strip()).ids, request.params.max_sequence_length
        if len(tokens) > length:
            allowed = f"{length} tokens, the most this request allows"
            request.notes.append(f"{name.replace('_', ' ')} cut from {len(tokens)} to {allowed}")
        ids = torch.tensor([tokens[:length]], device=self.module.device)
        states = self.module(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return EncodedText(torch.stack(states, -1), ids.shape[1])


class LTX2(DiffusionModel):
    """LTX2Pipeline and LTX2ImageToVideoPipeline checkpoints. A picture is the first frame of the video.

    A `guidance_scale` of 1 or less turns every guidance of the checkpoint off.
    """

    architecture = Component(LTX2Transformer, LTX2Config, ("transformer_blocks",))
    needs = ("tokenizer", "text_encoder", "connectors", "vae", "audio_vae", "vocoder", "scheduler", "transformer")
    lora_names = names.LTX2

    config: LTX2Config
    vae: Autoencoder

    @property
    def multi_guidance(self) -> MultiGuidance:
        """Return the guidance that the checkpoint was made for."""
        return LTX23_GUIDANCE if self.config.cross_attn_mod else MultiGuidance()

    def known_defaults(self) -> Mapping[str, Any]:
        return LTX23_DEFAULTS if self.config.cross_attn_mod else LTX2_DEFAULTS

    def load_components(self) -> None:
        from diffusers import AutoencoderKLLTX2Video
        from diffusers.pipelines.ltx2 import LTX2TextConnectors

        parts = self.parts
        for name, needed in (
            ("connectors", {"_class_name": "LTX2TextConnectors"}),
            ("vae", {"timestep_conditioning": False}),
        ):
            require(parts.config(name), parts.path(name) / "config.json", needed)
        self.text = GemmaStates.load(parts)
        self.text_encoders = (self.text,)
        config = parts.config("connectors")
        self.connectors: Any = parts.module("connectors", partial(LTX2TextConnectors.from_config, config))
        temporal, spatial, _ = self.config.vae_scale_factors
        self.vae = Autoencoder(parts, AutoencoderKLLTX2Video, spatial, temporal, tiled=True, least=LEAST_LATENTS)
        self.sound_decoder = SoundDecoder(parts)

    def check_widths(self) -> None:
        c, k, text = self.config, self.connectors.config, self.text.module.config
        made = {
            "latent channels of the vae": (self.vae.config["latent_channels"], c.in_channels),
            "channels of the audio_vae": (self.sound_decoder.channels, c.audio_in_channels),
            "pixels a latent of the vae": (self.vae.module.spatial_compression_ratio, self.vae.spatial),
            "frames a latent of the vae": (self.vae.module.temporal_compression_ratio, self.vae.temporal),
            "channels of the text_encoder": (text.hidden_size, k.caption_channels),
            "layers of the text_encoder": (text.num_hidden_layers + 1, k.text_proj_in_factor),
        }
        for name, (given, taken) in made.items():
            if given != taken:
                raise ModelError(f"the components do not fit: {given} {name}; {taken} are needed")

    # ----------------------------------------------------------------------------------------------- encoding

    def encode_pictures(self, request: EncodeRequest) -> Tensor:
        """Encode the first frame as normalized latents [1, n]."""
        picture, params = request.pictures[0], request.params
        if min(picture.size) < 2:
            raise inputs.refused(picture, "is too small; each side needs 2 or more")
        self.parts.offloader.need("vae")
        request.raise_if_cancelled()
        frame = Image.fromarray(through_h264(np.asarray(picture), PICTURE_RATE_FACTOR))
        frame = frame.resize((params.width, params.height), Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(frame)).to(self.mesh.device).float() / 255  # [H, W, 3]
        z = self.vae.encode((2 * pixels - 1).permute(2, 0, 1)[None, :, None]).float()  # [1, C, 1, h, w]
        mean, std = self.latent_statistics()
        return ((z - mean) / std).flatten(2).mT.flatten(1)

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and the deviation [C, 1, 1, 1] of video latents."""
        mean, std = (x.view(-1, 1, 1, 1) for x in (self.vae.module.latents_mean, self.vae.module.latents_std))
        return mean, std / self.vae.module.config.scaling_factor

    def branch(self, texts: Sequence[EncodedText], pictures: Tensor | None, params: SamplingParams) -> LTX2Inputs:
        self.parts.offloader.need("connectors")
        text, audio_text = self.connect(texts[0].states, params.max_sequence_length)
        clean = 0 if pictures is None else pictures.shape[1] // self.config.in_channels
        return LTX2Inputs(text, audio_text, self.layout(params), clean)

    def connect(self, states: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Connect states [1, n, C, layers] to text [1, L, C] for the video and for the audio.

        Learned tokens fill the text up to `length`.

        Raises:
            BadRequest: the learned tokens do not fit into `length`.
        """
        registers = self.connectors.config.video_connector_num_learnable_registers or 1
        if length % registers:
            raise BadRequest(
                f"{length} is not a multiple of {registers}, as this model needs",
                field="max_sequence_length",
            )
        n = states.shape[1]
        padded = states.new_zeros(1, length, *states.shape[2:], dtype=self.connectors.dtype)
        padded[:, length - n :] = states
        mask = torch.zeros(1, length, dtype=torch.long, device=states.device)
        mask[:, length - n :] = 1
        text, audio_text, mask = self.connectors(padded, mask, padding_side="left")
        valid = mask[0].bool()
        return text[:, valid], audio_text[:, valid]

    # ---------------------------------------------------------------------------------------------- denoising

    def layout(self, params: SamplingParams) -> LatentLayout:
        """Return the layout of an output's latents."""
        c = self.config
        length = max(1, round(params.num_frames / params.fps * c.audio_rate))
        return LatentLayout(self.vae.grid(params), length, c.in_channels, c.audio_in_channels, params.fps)

    def latent_tokens(self, params: SamplingParams) -> int:
        layout = self.layout(params)
        return layout.tokens + layout.length

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        layout = self.layout(params)
        video = torch.randn((1, layout.channels, *layout.grid), generator=generator, dtype=torch.float32)
        audio = torch.randn(self.sound_decoder.shape(layout.length), generator=generator, dtype=torch.float32)
        return torch.cat([video.flatten(2).mT.flatten(1), audio.transpose(1, 2).flatten(1)], 1).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        return self.shifted_by_length(params, self.layout(params).tokens, LENGTH)

    def velocities(
        self, x: Tensor, t: Tensor, condition: Conditioning, step: StepContext | None = None
    ) -> tuple[Tensor, None]:
        """Predict the guided velocity. Where two ranks share guidance, each predicts half of the branches."""
        x, step, rule = self.finalize_latents(x, condition), step or StepContext(), self.multi_guidance
        branches = rule.branches(condition.branches)
        cfg = self.mesh.cfg if len(branches) > 1 else Axis()
        own = cfg.share_list(range(len(branches)))
        v = torch.cat([self.velocity(x, t, branches[i], step.of(i)) for i in own])
        if len(branches) == 1:
            return v, None
        v, sigma = cfg.gather(v, 0), float(t) / self.parts.train_steps
        layout, scale = branches[0].layout, condition.params.guidance_scale
        streams = zip(layout.split(x), layout.split(v), (scale, rule.audio_text or scale), strict=True)
        return torch.cat([rule.guide(z, sigma, u, text) for z, u, text in streams], 1), None

    def forward(self, x: Tensor, t: Tensor, branch: LTX2Inputs, step: StepContext) -> Tensor:
        video, audio = self.transformer(*branch.layout.streams(x), t, branch, step)
        return torch.cat([video.flatten(1), audio.flatten(1)], 1).float()

    def finalize_latents(self, x: Tensor, condition: Conditioning) -> Tensor:
        """Return latents that begin with the picture's."""
        first = condition.pictures
        return x if first is None else torch.cat([first, x[:, first.shape[1] :]], 1)

    # ----------------------------------------------------------------------------------------------- decoding

    def streams(self, x: Tensor, condition: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Split into latents [1, C, T, h, w] and audio tokens [1, A, C]; a single frame is silent."""
        layout = condition.positive.layout
        return layout.video(x), None if layout.grid[0] == 1 else layout.streams(x)[1]

    def preview_latents(self, x0: Tensor, condition: Conditioning) -> Tensor:
        """Return the first latent frame, or the first two if the first is the picture's."""
        return self.streams(x0, condition)[0][:, :, : 1 if condition.pictures is None else 2]

    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        return self.decode(x0, raise_if_cancelled)[-1:]

    def decode_latents(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        mean, std = self.latent_statistics()
        return self.vae.decode(x * std + mean, raise_if_cancelled)

    def sound(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Sound | None:
        return None if self.mesh.rank else self.sound_decoder.decode(x, raise_if_cancelled)

    # -------------------------------------------------------------------------------------------- description

    def describe(self) -> ModelInfo:
        takes_pictures = self.parts.settings.memory.vae_config.load_encoder
        return self.model_info(
            kind="video",
            defaults=self.defaults,
            size_multiple=self.vae.spatial,
            frame_multiple=self.vae.temporal,
            unsupported=NO_TRUE_CFG | NO_NORMALIZATION,
            tasks=TASKS + (PICTURE_TASKS if takes_pictures else ()),
            max_tokens=TEXT_TOKENS,
            memory=self.memory(),
            pictures=PictureRule(max=int(takes_pictures), starts_denoising=False),
            audio=True,
        )

    def memory(self) -> Memory:
        """Estimate, as measured on a CPU: 48 copies of the decoder's last features, 3 of all layers' text states."""
        vae, text = self.vae.module.config, self.text.module
        c, dtype = self.config, self.transformer.compute_dtype
        states = text.config.hidden_size * (text.config.num_hidden_layers + 1)
        return self.parts.memory(
            self.vae.tiling,
            base=2**25 + 3 * TEXT_TOKENS * states * self.connectors.dtype.itemsize,
            text_pair=4 * text.config.num_attention_heads * text.dtype.itemsize,
            token=self.parts.token_bytes(c.dim, 4 * c.dim, dtype) + 48 * c.in_channels,
            pixel=90 if self.vae.tiling else 27,  # tiles are held twice while they are joined
            chunk_pixel=int(48 * vae.decoder_block_out_channels[0] / vae.upsample_factor[0] / vae.patch_size**2)
            * self.vae.dtype.itemsize,
            chunk_pixels=2**40,  # all frames at once
        )
