"""Autoencoders of FLUX.2: latents [1, C, h, w] as the transformer takes them, to pictures 16 times as large, and back.

The authors' autoencoder normalizes patched latents by the statistics of a batch norm; the tiny one of fal.ai
(`fal/FLUX.2-Tiny-AutoEncoder`) learned to do both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.errors import ModelError
from sgld.models.components import ComponentLoader
from sgld.models.hf_components import Autoencoder

PATCH = 2


class Flux2Autoencoder(Autoencoder):
    """The authors' autoencoder."""

    def __init__(self, parts: ComponentLoader):
        from diffusers import AutoencoderKLFlux2

        config = parts.config("vae")
        blocks = config.get("block_out_channels", (128, 256, 512, 512))
        super().__init__(parts, AutoencoderKLFlux2, 2 ** (len(blocks) - 1))
        self.channels: int = self.module.config.latent_channels * PATCH**2
        self.multiple = self.spatial * PATCH

    def decode(self, z: Tensor, raise_if_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        mean, deviation = self._statistics()
        return super().decode(unpatched(z.float() * deviation + mean), raise_if_cancelled)

    def encode(self, pictures: Tensor) -> Tensor:
        mean, deviation = self._statistics()
        return (patched(super().encode(pictures)).float() - mean) / deviation

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of each channel [C, 1, 1], float32."""
        mean, variance = (x.float().view(-1, 1, 1) for x in (self.module.bn.running_mean, self.module.bn.running_var))
        return mean, torch.sqrt(variance + self.module.config.batch_norm_eps)


class Flux2TinyAutoEncoder(nn.Module):
    """A tiny autoencoder (Bohan 2023, https://github.com/madebyollin/taesd) between a learned patching and unpatching.

    Attribute names are the keys of the checkpoint.
    """

    def __init__(self, config: Mapping[str, Any]):
        from diffusers import AutoencoderTiny

        super().__init__()
        latent = config.get("latent_channels", 128)
        inner = latent // PATCH**2
        known = {key: config[key] for key in TINY_ARCHITECTURE if key in config}
        self.tiny_vae: Any = AutoencoderTiny(**{"act_fn": "silu", "latent_channels": inner} | known)
        self.extra_encoder = nn.Conv2d(inner, latent, 4, PATCH, 1)
        self.extra_decoder = nn.ConvTranspose2d(latent, inner, 4, PATCH, 1)
        self.residual_encoder, self.residual_decoder = residual(latent), residual(inner)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Flux2TinyAutoEncoder:
        """Build from a config.json."""
        return cls(config)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the weights."""
        return self.extra_encoder.weight.dtype

    def encode(self, pictures: Tensor) -> Tensor:
        """Encode pictures [1, 3, H, W] in [-1, 1] to latents [1, C, H/16, W/16]."""
        z = self.extra_encoder(self.tiny_vae.encode(pictures, return_dict=False)[0])
        return z + self.residual_encoder(z)  # type: ignore[no-any-return]

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode latents [1, C, h, w] to pictures [1, 3, 16 h, 16 w] in [-1, 1], as diffusers without `return_dict`."""
        y = self.extra_decoder(z)
        pictures: tuple[Tensor] = self.tiny_vae.decode(y + self.residual_decoder(y), return_dict=return_dict)
        return pictures


TINY_ARCHITECTURE = (
    "in_channels", "out_channels", "encoder_block_out_channels", "decoder_block_out_channels", "act_fn",
    "upsampling_scaling_factor", "num_encoder_blocks", "num_decoder_blocks",
)  # fmt: skip


def residual(channels: int) -> nn.Sequential:
    """Build the layers that the tiny autoencoder adds to its latents."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.GroupNorm(8, channels),
        nn.SiLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class Flux2Tiny(Autoencoder):
    """The tiny autoencoder; its latents are the transformer's."""

    def __init__(self, parts: ComponentLoader):
        halvings = len(parts.config("vae").get("num_encoder_blocks", (1, 3, 3, 3))) - 1
        self.multiple = 2**halvings * PATCH
        super().__init__(parts, Flux2TinyAutoEncoder, self.multiple)
        self.channels: int = self.module.extra_encoder.out_channels

    @property
    def pixel_bytes(self) -> int:
        widest = max(self.config.get("decoder_block_out_channels", (64,)))
        return int(4 * widest * self.dtype.itemsize)

    def encode(self, pictures: Tensor) -> Tensor:
        z: Tensor = self.module.encode(pictures.to(next(self.module.parameters())))
        return z.float()


def flux2_autoencoder(parts: ComponentLoader) -> Flux2Autoencoder | Flux2Tiny:
    """Load the autoencoder of a model folder. Raises `ModelError` for another class."""
    known: dict[str, type[Flux2Autoencoder] | type[Flux2Tiny]] = {
        "AutoencoderKLFlux2": Flux2Autoencoder,
        "Flux2TinyAutoEncoder": Flux2Tiny,
    }
    name = str(parts.config("vae").get("_class_name"))
    if name not in known:
        file = parts.path("vae") / "config.json"
        raise ModelError(f"{file}: _class_name is {name!r}; only {' and '.join(known)} are supported")
    return known[name](parts)


def patched(z: Tensor) -> Tensor:
    """Patch latents [1, C, 2 h, 2 w] to [1, 4 C, h, w]."""
    return F.pixel_unshuffle(z, PATCH)


def unpatched(z: Tensor) -> Tensor:
    """Undo `patched`: [1, 4 C, h, w] to [1, C, 2 h, 2 w]."""
    return F.pixel_shuffle(z, PATCH)
