"""Inputs of Wan's transformers made from a picture: channels beside the latents, a first frame, or CLIP's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from PIL.ImageOps import fit
from torch import Tensor

from sgld.models.components import ComponentLoader
from sgld.models.hf_components import text_encoder

MASK_CHANNELS = 4  # one for each of the frames of a latent frame


@attrs.frozen
class ImageConditioning:
    """The transformer's inputs from a picture, prepared once for all steps."""

    channels: Tensor | None = None  # [1, 4 + C, T, h, w] beside the noisy latents
    first: Tensor | None = None  # [1, C, 1, h, w] in place of their first frame
    tokens: Tensor | None = None  # [1, L, D] of the image encoder

    @property
    def clean_frames(self) -> int:
        """Count the latent frames without noise."""
        return 0 if self.first is None else 1

    def beside(self, x: Tensor) -> Tensor:
        """Join the picture to latents x [1, C, T, h, w]."""
        x = self.finalize_latents(x)
        return x if self.channels is None else torch.cat([x, self.channels.to(x)], 1)

    def finalize_latents(self, x: Tensor) -> Tensor:
        """Put the picture in place of the first latent frame, where it stays clean."""
        return x if self.first is None else torch.cat([self.first.to(x), x[:, :, 1:]], 2)


NO_PICTURES = ImageConditioning()


class ImageEncoder:
    """CLIP's picture tokens (Radford et al. 2021, https://arxiv.org/abs/2103.00020), of the last layer but one."""

    def __init__(self, parts: ComponentLoader):
        from transformers import CLIPVisionModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self._parts = parts
        self._module: Any = text_encoder(parts, "image_encoder", CLIPVisionModel, "encoder")
        self._prepare = CLIPImageProcessorPil.from_pretrained(parts.path("image_processor"))

    def encode(self, pictures: Sequence[Image]) -> Tensor:
        """Encode pictures, one after the other, to tokens [1, L, D]."""
        self._parts.offloader.need("image_encoder")
        pixels = self._prepare(images=list(pictures), return_tensors="pt")["pixel_values"]
        weight = next(self._module.parameters())
        states = self._module(pixel_values=pixels.to(weight), output_hidden_states=True).hidden_states
        tokens: Tensor = states[-2].flatten(0, 1)[None]
        return tokens


def crop(pictures: Sequence[Image], width: int, height: int) -> list[Image]:
    """Scale pictures to cover a size in pixels, and crop them to it about the centre."""
    return [fit(picture, (width, height), Resampling.LANCZOS) for picture in pictures]


def clip_of(pictures: Sequence[Image], frames: int) -> Tensor:
    """Build a clip [N, 3, H, W] in [-1, 1], grey between the first picture and the second, its last frame."""
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2)
    known = pixels.float() / 255 * 2 - 1  # [1 or 2, 3, H, W]
    grey = known.new_zeros(frames - len(known), *known.shape[1:])
    return torch.cat([known[:1], grey, known[1:]])


def channels_of(pictures: Sequence[Image], frames: int, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the latents of `clip_of` [1, C, T, h, w], below a mask [1, 4, T, h, w] of the frames that they stand for.

    The first latent frame stands for a single frame, which counts four times.
    """
    latents = encode(clip_of(pictures, frames))
    known = torch.zeros(frames)
    known[0] = 1
    if len(pictures) > 1:
        known[-1] = 1
    mask = F.pad(known, (MASK_CHANNELS - 1, 0), value=1).view(-1, MASK_CHANNELS).T  # [4, T]
    mask = mask[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat([mask.to(latents), latents], 1)
