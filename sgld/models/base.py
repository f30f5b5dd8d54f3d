"""Family: what a model must be able to do. One file and one registry line each.

`AnyModel` is what a worker needs of any; a `DiffusionModel` is denoised step by step here. An `OpaquePipeline`
makes its output by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Protocol

import attrs
import torch
from PIL.Image import Image
from torch import Generator, Tensor

from sgld.nn.lora import LoraLayers
from sgld.params import ModelInfo, OutputParams, SamplingParams


@attrs.frozen
class Conditioning:
    """What the denoiser is told, prepared once for all steps: the prompt's and, with guidance, the negative's."""

    positive: Any
    negative: Any | None = None
    prompt_tokens: int = attrs.field(default=0, kw_only=True)  # of the prompt alone, without padding
    latent_tokens: int = attrs.field(default=0, kw_only=True)  # that the denoiser works on


@attrs.frozen
class Schedule:
    """The noise levels of one generation, where they are not the scheduler's own."""

    shift: float | None = None  # of time; None: the checkpoint's
    mu: float | None = None  # of time, for a scheduler that shifts by the length of the sequence
    sigmas: Sequence[float] | None = None  # before they are shifted; None: evenly spaced, as the scheduler has them
    exact: bool = False  # whether `sigmas` are to be taken as they are, without a shift
    times: Sequence[float] | None = None  # of `sigmas`, as the model takes them; None: in proportion to them

    @classmethod
    def even(cls, steps: int, shift: float | None, mu: float | None = None) -> Schedule:
        """Levels evenly from 1 to 1/steps."""
        return cls(shift, mu, [1 - i / steps for i in range(steps)])


@attrs.frozen
class Sound:
    """What is heard: float32 [channels, samples] in [-1, 1]."""

    samples: Tensor
    rate: int  # samples a second


class AnyModel(ABC):
    """What a worker needs of any model."""

    info: ModelInfo
    lora: Mapping[str, LoraLayers] = MappingProxyType({})  # by component

    def after_output(self) -> None:  # noqa: B027 - few models have anything to do
        """Called after each output, made or not: weights that are offloaded may go."""


class Watch(Protocol):
    """How an output tells of its progress and hears of a cancel: `worker.hook.RunContext`."""

    def stage(self, name: str, total: int = 1) -> AbstractContextManager[None]:
        """A stage of so many steps."""

    def step(self) -> AbstractContextManager[None]:
        """One step of the current stage."""

    def raise_if_cancelled(self) -> None:
        """Leave by an exception once a cancel has come."""

    def note(self, text: str) -> None:
        """A warning for the user."""


class OpaquePipeline(AnyModel):
    """A model that makes its output in one call, on one rank."""

    @abstractmethod
    def make(self, params: OutputParams, watch: Watch) -> tuple[Tensor, Sound | None]:
        """One output: frames u8 [N, H, W, 3] on the CPU, and what is heard."""


class DiffusionModel(AnyModel):
    """The pieces of one generation, in the order the sampler calls them."""

    scheduler: dict[str, Any]  # scheduler_config.json
    parallel_decode = False  # whether ranks share the decoding: then all of them hear of a cancel before it goes on

    @abstractmethod
    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: Callable[[], None] = lambda: None
    ) -> tuple[Conditioning, list[str]]:
        """The prompt (and negative prompt, when guidance is on) as conditioning, and warnings for the user.

        `pictures` are RGB and upright, as they are in their files; none where `info.pictures.starts_denoising`.
        `raise_if_cancelled` is called between the parts of the work, by all ranks equally often.
        """

    @abstractmethod
    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        """Initial latents, float32, drawn from a CPU generator so that every device starts alike."""

    def encode_frames(self, frames: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """Frames [N, 3, H, W] in [-1, 1] to latents like `noise`'s; called on rank 0 alone.

        Only where `info.pictures.starts_denoising`.
        """
        raise NotImplementedError

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        """The noise levels, for latents like `x`."""
        return Schedule(params.flow_shift)

    @abstractmethod
    def velocities(self, x: Tensor, t: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """The predictions at latents `x` and time `t` in [0, 1000]: the prompt's, and the negative's under guidance.

        Both at once, for a family may compute them as one batch.
        """

    @abstractmethod
    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        """The guidance scale that holds at time `t`."""

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598), in float32."""
        return torch.lerp(negative.float(), positive.float(), scale)

    def finalize_latents(self, x: Tensor, condition: Any) -> Tensor:
        """Latents as `decode` takes them, where the conditioning prescribes a part of them."""
        return x

    @abstractmethod
    def preview(self, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """One frame of an estimate of the clean latents, the first: u8 [1, H, W, 3], else as `decode`."""

    @abstractmethod
    def decode(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
        """Latents to frames: u8 [N, H, W, 3] on the CPU; ranks other than 0 may answer with none."""

    def sound(self, x: Tensor, raise_if_cancelled: Callable[[], None]) -> Sound | None:
        """What is heard, on rank 0; called after `decode`."""
        return None
