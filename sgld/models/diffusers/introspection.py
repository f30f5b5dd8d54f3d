"""Introspection of a loaded diffusers pipeline: its defaults, sizes, pictures and abilities as a `ModelInfo`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import nn

from sgld.errors import ModelError
from sgld.models.components import folder_defaults
from sgld.models.diffusers.call import FRAME_RATES, REQUEST_FIELDS, CallSignature
from sgld.params import ModelInfo, PictureRule

FALLBACKS = {"num_inference_steps": 30, "guidance_scale": 7.5, "height": 1024, "width": 1024, "num_frames": 1}
NEVER_NONE = (*FALLBACKS, "max_sequence_length")  # fields of a request that always have a value
CLIP_FRAMES = 121  # of a clip whose length neither the call nor a configuration fixes in advance
MAX_PICTURES = 10
NEEDS_PICTURE = re.compile("Img2Img|Image2Image|ImageToImage|ImageToVideo|Inpaint|Edit|Upscale|InstructPix2Pix")


def config_value(component: Any, key: str) -> Any:
    """Return one value of a component's configuration, or None."""
    return getattr(getattr(component, "config", None), key, None)


@attrs.frozen
class Introspection:
    """A loaded pipeline, its call, and its denoisers by name."""

    pipeline: Any
    call: CallSignature
    denoisers: Mapping[str, nn.Module]

    def describe(self, folder: Path, lora_targets: Sequence[str], offload: str | None) -> ModelInfo:
        """Build the model's description. `offload` is the setting that asks for offload.

        Raises:
            ModelError: generation_config.json has a field that the pipeline cannot use.
        """
        arguments = self.call.arguments
        own, unsupported, defaults = folder_defaults(folder), self._unsupported(lora_targets, offload), self._defaults()
        for name in own.keys() & unsupported.keys():
            raise ModelError(f"{folder / 'generation_config.json'}: {name}: {unsupported[name]}; leave it out")
        kind = "video" if "num_frames" in arguments else "image"
        fewest, most = self._picture_counts()
        sources = ["text"] * (fewest == 0) + ["image"] * (most > 0)
        return ModelInfo(
            name=self.call.name,
            kind=kind,
            defaults=defaults | own,
            left_open=tuple(name for name in NEVER_NONE if self.call.is_optional(name) and name not in own),
            size_multiple=self._size_multiple() if self.takes_size else 1,
            frame_multiple=self._frame_multiple(defaults["num_frames"]) if kind == "video" else 1,
            components=tuple(name for name, part in self.pipeline.components.items() if part is not None),
            unsupported=unsupported,
            tasks=tuple(f"{source}-to-{kind}" for source in sources),
            pictures=PictureRule(fewest, most, starts_denoising="strength" in arguments, sets_size=self.takes_size),
            audio="audio_latents" in arguments,
            lora_targets=tuple(lora_targets),
            backend="diffusers",
        )

    @property
    def takes_size(self) -> bool:
        """Return true where the call has a height and a width."""
        return {"height", "width"} <= self.call.arguments.keys()

    def _picture_counts(self) -> tuple[int, int]:
        """Return the fewest and the most pictures of a request."""
        argument = self.call.arguments.get("image")
        if argument is None:
            return 0, 0
        needed = argument.default is argument.empty or NEEDS_PICTURE.search(self.call.name) is not None
        annotation = str(argument.annotation)
        is_list = re.search(r"[lL]ist\[", annotation) is not None and "Tensor" not in annotation
        return int(needed), MAX_PICTURES if is_list or "Plus" in self.call.name else 1

    def _unsupported(self, lora_targets: Sequence[str], offload: str | None) -> dict[str, str]:
        """Return the fields of a request that the call has no argument for, each with its reason."""
        needed = {field: field for field in REQUEST_FIELDS} | {"mask_path": "mask_image"}
        found = {
            field: f"the call of {self.call.name} has no argument {argument}"
            for field, argument in needed.items()
            if argument not in self.call.arguments and field != "num_frames"  # it is 1 for pictures
        }
        if offload:
            found["loras"] = f"components that are offloaded take no adapters; leave {offload} out to use them"
        elif not lora_targets:
            found["loras"] = f"only transformers take adapters, and {self.call.name} has none"
        return found

    def _defaults(self) -> dict[str, Any]:
        """Merge the call's defaults over the sizes and lengths of the denoisers, over the fallbacks."""
        arguments = self.call.arguments
        found: dict[str, Any] = {name: value for name, value in FALLBACKS.items() if name in arguments}
        if self.takes_size:
            found |= self._trained_size()
        if self.call.is_optional("num_frames"):
            lengths = [*self._trained("num_frames"), *self._trained("sample_frames")]
            found["num_frames"] = next((n for n in lengths if isinstance(n, int)), CLIP_FRAMES)
        for name in (*REQUEST_FIELDS, *FRAME_RATES):
            value = arguments[name].default if name in arguments else None
            if name in FRAME_RATES and isinstance(value, int | float):
                found["fps"] = round(value)
            elif isinstance(value, int | float | str):
                found[name] = float(value) if isinstance(value, bool) else value
        return found

    def _trained(self, key: str) -> list[Any]:
        """Return one configuration value of every denoiser."""
        return [config_value(module, key) for module in self.denoisers.values()]

    def _trained_size(self) -> dict[str, int]:
        """Return the height and width in pixels that the denoiser was trained for, where it has them."""
        squares = [getattr(self.pipeline, "default_sample_size", None), *self._trained("sample_size")]
        pairs = [(size, size) for size in squares]
        pairs += zip(self._trained("sample_height"), self._trained("sample_width"), strict=True)
        latents = next(((h, w) for h, w in pairs if isinstance(h, int) and isinstance(w, int)), ())
        return {name: side * self._latent_pixels() for name, side in zip(("height", "width"), latents, strict=False)}

    def _factor(self, *names: str) -> int:
        """Return the first whole number among attributes of the pipeline, else 1."""
        return next((f for name in names if isinstance(f := getattr(self.pipeline, name, None), int)), 1)

    def _latent_pixels(self) -> int:
        """Return the pixels per latent along one side."""
        return self._factor("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")

    def _size_multiple(self) -> int:
        """Return the multiple of pixels that the denoiser's patches and the image processors share."""
        patches = [size[-1] if isinstance(size, list | tuple) else size for size in self._trained("patch_size")]
        found = [self._latent_pixels() * (size if isinstance(size, int) else 1) for size in (*patches, 1)]
        for name in ("image_processor", "video_processor"):
            factor = config_value(getattr(self.pipeline, name, None), "vae_scale_factor")
            found += [factor] if isinstance(factor, int) else []
        return math.lcm(*found)

    def _frame_multiple(self, length: int) -> int:
        """Return the frames per latent, or 1 where the pipeline's default length does not fit that rule."""
        factor = self._factor(
            "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"
        )
        return factor if (length - 1) % factor == 0 else 1
