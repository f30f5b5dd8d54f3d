"""SDEdit: start denoising from a picture, noised to the middle of the schedule.

Meng et al. 2021, https://arxiv.org/abs/2108.01073. With a mask, the latents outside it are replaced after each step by
the picture's, at the current noise level.
"""

from __future__ import annotations

from functools import partial

import attrs
import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image, fromarray
from torch import Tensor

from sgld import inputs
from sgld.inputs import Input
from sgld.models.base import DiffusionModel
from sgld.params import OutputParams
from sgld.worker.run_context import RunContext


@attrs.frozen
class SDEditStart:
    """A picture to start from. Everything but the noise is the same for all items of a request."""

    clean: Tensor  # [1, C, ..., h, w], the picture's latents
    noise: Tensor  # [1, C, ..., h, w]
    source: Input
    free: Tensor | None  # [h, w], the latent pixels that the mask lets change

    @classmethod
    def prepare(
        cls, model: DiffusionModel, params: OutputParams, context: RunContext, noise: Tensor
    ) -> SDEditStart | None:
        """Encode the request's picture on rank 0 and share its latents. Return None for a request without one.

        Raises:
            BadRequest, TooLarge: the picture or its mask cannot be read.
        """
        if not params.image_path:
            return None
        source = inputs.read(params.image_path[0], params.mask_path, params.width, params.height)
        frames = still_clip(source, params.num_frames)
        clean = context.from_rank0(noise, partial(model.encode_frames, frames, context.raise_if_cancelled))
        return cls(clean, noise, source, None if source.mask is None else _free(source.mask, noise))

    def at(self, sigma: float) -> Tensor:
        """Return the latents of the picture at noise level `sigma`."""
        return (1 - sigma) * self.clean + sigma * self.noise

    def hold(self, x: Tensor, sigma: float) -> Tensor:
        """Return `x` with the picture's latents where the mask forbids a change."""
        return x if self.free is None else torch.where(self.free, x, self.at(sigma))

    def composite(self, frames: Tensor) -> Tensor:
        """Fade frames u8 [N, H, W, 3] into the picture, in place: where the mask is 0, the picture stays."""
        if self.source.mask is not None:
            weight = torch.from_numpy(self.source.mask)[..., None].float() / 255  # [H, W, 1]
            picture = torch.from_numpy(self.source.picture).float()
            for frame in frames:
                frame.copy_(torch.lerp(picture, frame.float(), weight).round())
        return frames


def pictures_of(params: OutputParams, context: RunContext) -> list[Image]:
    """Read the request's pictures, RGB and upright, on rank 0, which alone may have the files. Share them.

    Raises:
        BadRequest, TooLarge: one of them cannot be read.
    """
    read: list[Image] = []

    def sizes() -> Tensor:
        read.extend(inputs.upright(path) for path in params.image_path or ())
        return torch.tensor([(image.height, image.width) for image in read])

    def pixels(i: int) -> Tensor:
        return torch.from_numpy(np.array(read[i]))

    if not params.image_path:
        return []
    sides = context.from_rank0(torch.empty(len(params.image_path), 2, dtype=torch.int64), sizes).tolist()
    like = (torch.empty(height, width, 3, dtype=torch.uint8) for height, width in sides)
    shared = [context.from_rank0(empty, partial(pixels, i)) for i, empty in enumerate(like)]
    images = (fromarray(picture.cpu().numpy()) for picture in shared)
    return [inputs.named(path, image) for path, image in zip(params.image_path, images, strict=True)]


def still_clip(source: Input, num_frames: int) -> Tensor:
    """Return the picture as a still clip [N, 3, H, W] in [-1, 1]."""
    picture = torch.from_numpy(source.picture).float() / 255  # [H, W, 3]
    return (2 * picture - 1).permute(2, 0, 1).expand(num_frames, -1, -1, -1)


def _free(mask: npt.NDArray[np.uint8], noise: Tensor) -> Tensor:
    """Return the latent pixels [h, w] that hold a pixel to paint."""
    weight = torch.from_numpy(mask)  # [H, W]
    h, w = noise.shape[-2:]
    cells = weight.view(h, weight.shape[0] // h, w, weight.shape[1] // w).amax((1, 3))
    return (cells >= inputs.PAINTED).to(noise.device)
