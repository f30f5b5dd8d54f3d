"""Family: what a model must be able to do. One file and one registry line each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import attrs
from torch import Generator, Tensor

from sgld.nn.lora import LoraLayers
from sgld.params import ModelInfo, SamplingParams


@attrs.frozen
class Conditioning:
    """What the denoiser is told, prepared once for all steps: the prompt's and, with guidance, the negative's."""

    positive: Any
    negative: Any | None = None
    prompt_tokens: int = attrs.field(default=0, kw_only=True)  # of the prompt alone, without padding
    latent_tokens: int = attrs.field(default=0, kw_only=True)  # that the denoiser works on


class Family(ABC):
    """The pieces of one generation, in the order the sampler calls them."""

    info: ModelInfo
    scheduler: dict[str, Any]  # scheduler_config.json
    together = False  # whether ranks share the decoding: then all of them hear of a cancel before it goes on
    lora: Mapping[str, LoraLayers] = MappingProxyType({})  # by component

    @abstractmethod
    def encode(self, params: SamplingParams) -> tuple[Conditioning, list[str]]:
        """The prompt (and negative prompt, when guidance is on) as conditioning, and warnings for the user."""

    @abstractmethod
    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        """Initial latents, float32, drawn from a CPU generator so that every device starts alike."""

    def encode_frames(self, frames: Tensor, pulse: Callable[[], None]) -> Tensor:
        """Frames [N, 3, H, W] in [-1, 1] to latents like `noise`'s; called on rank 0 alone.

        Only where `info.max_pictures` is more than 0.
        """
        raise NotImplementedError

    @abstractmethod
    def velocities(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """The predictions at latents `x` and time `t` in [0, 1000]: the prompt's, and the negative's under guidance.

        Both at once, for a family may compute them as one batch.
        """

    @abstractmethod
    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        """The guidance scale that holds at time `t`."""

    @abstractmethod
    def preview(self, x0: Tensor, pulse: Callable[[], None]) -> Tensor:
        """One frame of an estimate of the clean latents, the first: u8 [1, H, W, 3], else as `decode`."""

    @abstractmethod
    def decode(self, x: Tensor, pulse: Callable[[], None]) -> Tensor:
        """Latents to frames: u8 [N, H, W, 3] on the CPU; ranks other than 0 may answer with none."""

    def rest(self) -> None:  # noqa: B027 - few families have anything to do
        """Called after each output, made or not: weights that are offloaded may go."""
