"""Sound of LTX-2: an autoencoder of mel spectrograms and a vocoder, both borrowed from diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sgld.errors import ModelError
from sgld.models.base import Sound
from sgld.models.components import ComponentLoader

BIN_SCALE = 4  # mel bins that one latent stands for


class SoundDecoder:
    """Decodes audio tokens of `channels` to sound."""

    def __init__(self, parts: ComponentLoader):
        from diffusers import AutoencoderKLLTX2Audio
        from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE, UpSample1d

        self._parts = parts
        self._vae = _borrow(parts, "audio_vae", AutoencoderKLLTX2Audio)
        self._vocoder = _borrow(parts, "vocoder", LTX2Vocoder, LTX2VocoderWithBWE)
        config = self._vocoder.config
        if isinstance(self._vocoder, LTX2VocoderWithBWE):  # its filter is not among the weights
            ratio = config.output_sampling_rate // config.input_sampling_rate
            filter = UpSample1d(ratio, window_type="hann", persistent=False)
            self._vocoder.resampler = filter.to(parts.mesh.device)
        self.rate: int = config.output_sampling_rate
        self._bins: int = self._vae.config.mel_bins // BIN_SCALE
        self.latent_channels: int = self._vae.config.latent_channels
        self.channels = self.latent_channels * self._bins

    def shape(self, length: int) -> tuple[int, int, int, int]:
        """Return the shape [1, C, A, bins] of the noise for `length` audio tokens."""
        return 1, self.latent_channels, length, self._bins

    def decode(self, y: Tensor, raise_if_cancelled: Callable[[], None]) -> Sound:
        """Decode audio tokens [1, A, C * bins]. `raise_if_cancelled` is called before each of the two parts."""
        raise_if_cancelled()
        self._parts.offloader.need("audio_vae")
        z = (y * self._vae.latents_std + self._vae.latents_mean).unflatten(2, (-1, self._bins)).transpose(1, 2)
        mel = self._vae.decode(z.to(self._vae.dtype), return_dict=False)[0]
        raise_if_cancelled()
        self._parts.offloader.need("vocoder")
        return Sound(self._vocoder(mel)[0].float(), self.rate)


def _borrow(parts: ComponentLoader, name: str, *classes: Any) -> Any:
    """Load a component of one of these classes of diffusers."""
    config, known = parts.config(name), {cls.__name__: cls for cls in classes}
    if (given := config.get("_class_name")) not in known:
        raise ModelError(f"{parts.path(name) / 'config.json'}: _class_name is {given!r}; only {', '.join(known)}")
    return parts.module(name, partial(known[given].from_config, config))
