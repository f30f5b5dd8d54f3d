"""Model families: a template that each fills in with data and a few methods, one file and one registry line each.

A worker knows `LoadedModel`. A `DiffusionModel` is denoised step by step by the sampler; an `OpaquePipeline` makes its
output by itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import attrs
import torch
from PIL.Image import Image
from torch import Generator, Tensor

from sgld.convert import structure
from sgld.errors import ModelError
from sgld.messages import Load
from sgld.models.components import Component, ComponentLoader, Length
from sgld.nn.blocks import DiffusionTransformer
from sgld.nn.lora import LoraLayers
from sgld.nn.lora_formats import Renames
from sgld.nn.parallel import Mesh
from sgld.nn.runner import StepContext
from sgld.params import Memory, ModelInfo, OutputParams, SamplingParams
from sgld.platform import Platform
from sgld.settings import TRANSFORMERS

ONE_TRANSFORMER = dict.fromkeys(("guidance_scale_2", "boundary_ratio"), "it has no second expert (transformer_2)")
NO_PIPELINE = {"diffusers_kwargs": "it runs as native code; start it with backend diffusers to use them"}
LENGTH = Length()
RaiseIfCancelled = Callable[[], None]


def never_cancelled() -> None:
    """Do nothing: the request cannot be cancelled."""


@attrs.frozen
class Conditioning:
    """The inputs of each guidance branch, prepared once for all steps of a request."""

    positive: Any
    negative: Any | None = None
    pictures: Any = attrs.field(default=None, kw_only=True)  # what `encode_pictures` made of the input pictures
    params: SamplingParams = attrs.field(factory=SamplingParams, kw_only=True)
    store: dict[object, Any] = attrs.field(factory=dict, kw_only=True)  # computed at the first step, for all others
    prompt_tokens: int = attrs.field(default=0, kw_only=True)  # of the prompt alone, without padding
    latent_tokens: int = attrs.field(default=0, kw_only=True)  # that the transformer works on

    @property
    def branches(self) -> list[Any]:
        """Return the inputs of the prompt's branch and, under guidance, of the negative prompt's."""
        return [self.positive] if self.negative is None else [self.positive, self.negative]


@attrs.frozen
class EncodeRequest:
    """One request while its inputs are encoded."""

    params: SamplingParams
    pictures: Sequence[Image]
    raise_if_cancelled: RaiseIfCancelled
    notes: list[str] = attrs.field(factory=list)  # warnings for the user
    store: dict[str, Any] = attrs.field(factory=dict)  # computed for the first prompt, for all others


@attrs.frozen
class EncodedText:
    """A prompt's hidden states, and how many tokens it has without padding."""

    states: Tensor
    tokens: int


class TextEncoder(Protocol):
    """A text encoder with its tokenizer."""

    component: str  # of the model folder, for offloading

    def encode(self, name: str, prompt: str, request: EncodeRequest) -> EncodedText | None:
        """Encode a prompt; a warning that it was cut calls it by `name`: prompt or negative_prompt."""


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
        """Space levels evenly from 1 to 1/steps."""
        return cls(shift, mu, [1 - i / steps for i in range(steps)])


@attrs.frozen
class Sound:
    """An audio track: float32 [channels, samples] in [-1, 1]."""

    samples: Tensor
    rate: int  # samples a second


class AnyModel(ABC):
    """What a worker needs of any model."""

    info: ModelInfo
    lora: Mapping[str, LoraLayers] = MappingProxyType({})  # by component

    def after_output(self) -> None:  # noqa: B027 - few models have anything to do
        """Drop offloaded weights; called after each output, made or not."""


class Watch(Protocol):
    """How an output tells of its progress and hears of a cancel: `worker.run_context.RunContext`."""

    def stage(self, name: str, total: int = 1) -> AbstractContextManager[None]:
        """Enter a stage of so many steps."""

    def step(self) -> AbstractContextManager[None]:
        """Enter one step of the current stage."""

    def raise_if_cancelled(self) -> None:
        """Raise an exception once a cancel has come."""

    def note(self, text: str) -> None:
        """Warn the user."""


class OpaquePipeline(AnyModel):
    """A model that makes its output in one call, on one rank."""

    @abstractmethod
    def make(self, params: OutputParams, watch: Watch) -> tuple[Tensor, Sound | None]:
        """Make one output: frames u8 [N, H, W, 3] on the CPU, and its audio track."""


class DiffusionModel(AnyModel):
    """A transformer of ours, its text encoders and its autoencoder: the template of every family.

    A family names its `architecture`, `needs` and `lora_names`, and writes `known_defaults`, `load_components`,
    `widths`, `latent_shape`, `branch`, `forward`, `decode_latents` and `describe`. Other methods may be overridden.
    """

    architecture: ClassVar[Component]
    needs: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    lora_names: ClassVar[Renames] = ()
    any_scheduler: ClassVar[bool] = False  # else only Euler's with flow matching
    few_steps: ClassVar[bool] = False  # whether dmd_denoising_steps may be set
    empty_negative_prompt: ClassVar[str] = ""  # where none is given

    parts: ComponentLoader
    config: Any
    defaults: dict[str, Any]
    scheduler: dict[str, Any]  # scheduler_config.json
    transformers: Mapping[str, DiffusionTransformer]  # by component
    text_encoders: Sequence[TextEncoder]
    vae: Any
    parallel_decode: bool = False  # whether ranks share the decoding: then all of them hear of a cancel at once

    def __init__(self, load: Load, mesh: Mesh, platform: Platform, progress: Callable[[int, int], None]):
        self.parts = parts = ComponentLoader(load, mesh, platform, progress, self.needs, self.few_steps)
        self.scheduler = parts.scheduler
        if not self.any_scheduler:
            parts.needs_euler()
        spec = self.architecture
        self.config = parts.architecture(TRANSFORMERS[0], spec)
        self.defaults = parts.defaults(self.known_defaults())
        guided = self.guidance_scale(structure(self.defaults, SamplingParams)) > 1
        parts.share(self.config.num_attention_heads, guided)
        self.load_components()
        self.transformers = {name: parts.transformer(name, spec) for name in TRANSFORMERS if name in parts.names}
        self.lora = parts.lora(self.transformers, self.lora_names)
        self.parallel_decode = load.settings.memory.parallel_decode
        self.check_widths()
        parts.mesh.barrier()  # until all ranks have loaded, memory is not what it will be
        self.info = self.describe()

    @property
    def mesh(self) -> Mesh:
        """Return the ranks."""
        return self.parts.mesh

    @property
    def transformer(self) -> Any:
        """Return the transformer, or the first of two."""
        return self.transformers[TRANSFORMERS[0]]

    # ------------------------------------------------------------------------------------------------ loading

    def known_defaults(self) -> Mapping[str, object]:
        """Return this checkpoint's values of `SamplingParams`, where its folder has no generation_config.json."""
        raise NotImplementedError

    def load_components(self) -> None:
        """Load everything but the transformers: set `text_encoders` and `vae`."""
        raise NotImplementedError

    def widths(self) -> tuple[tuple[int, int], Sequence[tuple[int, int]]]:
        """Return widths as (taken by the transformer, given): of the latents, and of each text encoder."""
        raise NotImplementedError

    def check_widths(self) -> None:
        """Raise `ModelError` when components that were put together do not fit."""
        latent, texts = self.widths()
        if all(taken == given for taken, given in (latent, *texts)):
            return
        taken, given = (" and ".join(str(pair[i]) for pair in texts) for i in range(2))
        encoders = "text encoder makes" if len(texts) == 1 else "text encoders make"
        raise ModelError(
            f"the components do not fit: the transformer takes {latent[0]} latent channels and text of {taken}, "
            f"the vae has {latent[1]} channels, the {encoders} {given}"
        )

    def describe(self) -> ModelInfo:
        """Return the description of the model, by `model_info`."""
        raise NotImplementedError

    def model_info(self, unsupported: Mapping[str, str], **own: Any) -> ModelInfo:
        """Describe the model: `own` are the fields of `ModelInfo` that families differ in."""
        parts = self.parts
        lacks = {} if "transformer_2" in parts.names else ONE_TRANSFORMER
        return ModelInfo(
            name=parts.index["_class_name"],
            components=parts.names,
            unsupported={**NO_PIPELINE, **lacks, **unsupported},
            lora_targets=tuple(self.lora),
            degrees=attrs.asdict(parts.degrees),
            attention=parts.kernels,
            **own,
        )

    # ----------------------------------------------------------------------------------------------- encoding

    def encode(
        self, params: SamplingParams, pictures: Sequence[Image], raise_if_cancelled: RaiseIfCancelled = never_cancelled
    ) -> tuple[Conditioning, list[str]]:
        """Encode the prompts and pictures, and return warnings for the user beside them.

        `pictures` are RGB and upright, as they are in their files; none where `info.pictures.starts_denoising`.
        `raise_if_cancelled` is called between the parts of the work, by all ranks equally often.
        """
        request = EncodeRequest(params, pictures, raise_if_cancelled)
        guided = self.guidance_scale(params) > 1
        negative = self.empty_negative_prompt if params.negative_prompt is None else params.negative_prompt
        prompts = {"prompt": params.prompt} | ({"negative_prompt": negative} if guided else {})
        texts: dict[str, list[EncodedText | None]] = {name: [] for name in prompts}
        for encoder in self.text_encoders:
            self.parts.offloader.need(encoder.component)
            for name, prompt in prompts.items():
                raise_if_cancelled()
                texts[name].append(encoder.encode(name, prompt, request))
        encoded = self.encode_pictures(request) if pictures else None
        branches = [self.branch(found, encoded, params) for found in texts.values()]
        condition = Conditioning(
            branches[0],
            branches[1] if guided else None,
            pictures=encoded,
            params=params,
            prompt_tokens=max((text.tokens for text in texts["prompt"] if text is not None), default=0),
            latent_tokens=self.latent_tokens(params),
        )
        return condition, request.notes + ([] if guided else self.unguided(params))

    def encode_pictures(self, request: EncodeRequest) -> Any:
        """Encode input pictures for `branch` and `Conditioning.pictures`."""
        raise NotImplementedError

    def branch(self, texts: Sequence[Any], pictures: Any, params: SamplingParams) -> Any:
        """Return the inputs of one guidance branch; `texts` are its prompt's `EncodedText`, one of each encoder."""
        raise NotImplementedError

    def encode_frames(self, frames: Tensor, raise_if_cancelled: RaiseIfCancelled) -> Tensor:
        """Encode frames [N, 3, H, W] in [-1, 1] to latents like `noise`'s; called on rank 0 alone.

        Only where `info.pictures.starts_denoising`.
        """
        raise NotImplementedError

    def unguided(self, params: SamplingParams) -> list[str]:
        """Warn of a negative prompt, and of ranks for guidance, in an output without guidance."""
        info, notes = self.info, []
        if params.negative_prompt and params.negative_prompt != info.defaults.get("negative_prompt"):
            scale = "guidance_scale" if "true_cfg_scale" in info.unsupported else "true_cfg_scale"
            notes.append(f"negative_prompt: it has no effect without a {scale} above {info.unguided:g}")
        if self.mesh.cfg.size > 1:
            notes.append("enable_cfg_parallel: without guidance half of the workers repeat what the others do")
        return notes

    # ---------------------------------------------------------------------------------------------- denoising

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the shape [1, C, ..., h, w] of an output's latents."""
        raise NotImplementedError

    @property
    def patch(self) -> Sequence[int]:
        """Return the sides of a token, in latents."""
        raise NotImplementedError

    def latent_tokens(self, params: SamplingParams) -> int:
        """Count the tokens of an output, input pictures left out."""
        return math.prod(self.latent_shape(params)[2:]) // math.prod(self.patch)

    def noise(self, params: SamplingParams, generator: Generator) -> Tensor:
        """Draw initial latents, float32, from a CPU generator, so that every device starts alike."""
        return torch.randn(self.latent_shape(params), generator=generator, dtype=torch.float32).to(self.mesh.device)

    def schedule(self, params: SamplingParams, x: Tensor) -> Schedule:
        """Return the noise levels for latents like `x`."""
        return Schedule(params.flow_shift)

    def shifted_by_length(self, params: SamplingParams, tokens: int, known: Length = LENGTH) -> Schedule:
        """Space levels evenly from 1 to 1/steps, shifted by mu, which grows linearly with the number of tokens.

        The numbers of scheduler_config.json come before those that are `known`.
        """
        c = attrs.asdict(known)
        c |= {name: self.scheduler[name] for name in c if name in self.scheduler}
        slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
        mu = c["base_shift"] + slope * (tokens - c["base_image_seq_len"])
        return Schedule.even(params.num_inference_steps, params.flow_shift, mu)

    def guidance_scale(self, params: SamplingParams) -> float:
        """Return the scale of classifier-free guidance; 1 or less is without it."""
        return params.guidance_scale

    def guidance(self, t: Tensor, params: SamplingParams) -> float:
        """Return the guidance scale at time `t`."""
        return self.guidance_scale(params)

    def velocities(
        self, x: Tensor, t: Tensor, condition: Any, step: StepContext | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict at latents `x` and time `t` in [0, 1000]: for the prompt, and under guidance for the negative one.

        With `enable_cfg_parallel` each half of the ranks predicts one of them.
        """
        step = step or StepContext()
        if condition.negative is None:
            return self.velocity(x, t, condition.positive, step), None
        if self.mesh.cfg.size == 2:
            own = self.mesh.cfg.index
            prediction = self.velocity(x, t, (condition.positive, condition.negative)[own], step.of(own))
            positive, negative = self.mesh.cfg.gather(prediction, 0).chunk(2)
            return positive, negative
        positive = self.velocity(x, t, condition.positive, step)
        return positive, self.velocity(x, t, condition.negative, step.of(1))

    def velocity(self, x: Tensor, t: Tensor, branch: Any, step: StepContext) -> Tensor:
        """Run `forward` with the transformer's weights loaded."""
        self.parts.offloader.need(TRANSFORMERS[0])
        return self.forward(x, t, branch, step)

    def forward(self, x: Tensor, t: Tensor, branch: Any, step: StepContext) -> Tensor:
        """Return the velocity at latents `x` and time `t` for one guidance branch, of the shape of `x`."""
        raise NotImplementedError

    def guide(self, positive: Tensor, negative: Tensor, scale: float, params: SamplingParams) -> Tensor:
        """Guide without a classifier (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598), in float32."""
        return torch.lerp(negative.float(), positive.float(), scale)

    # ----------------------------------------------------------------------------------------------- decoding

    def finalize_latents(self, x: Tensor, condition: Any) -> Tensor:
        """Return latents with the parts that the conditioning prescribes."""
        return x

    def streams(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """Split finalized latents into the latents for `decode`, and for `sound`, where the output has sound."""
        return x, None

    def preview_latents(self, x0: Tensor, condition: Any) -> Tensor:
        """Return the part of an estimate of the clean latents that `preview` decodes."""
        return self.streams(x0, condition)[0]

    def decode_latents(self, x: Tensor, raise_if_cancelled: RaiseIfCancelled) -> Tensor:
        """Decode latents to frames u8 [N, H, W, 3] on the CPU; called on rank 0, or on all with `parallel_decode`."""
        raise NotImplementedError

    def preview(self, x0: Tensor, raise_if_cancelled: RaiseIfCancelled) -> Tensor:
        """Decode the first frame u8 [1, H, W, 3] of latents by `preview_latents`."""
        return self.decode(x0, raise_if_cancelled)[:1]

    def decode(self, x: Tensor, raise_if_cancelled: RaiseIfCancelled) -> Tensor:
        """Decode latents to frames u8 [N, H, W, 3] on the CPU; ranks other than 0 return no frames."""
        frames = torch.empty(0, 0, 0, 3, dtype=torch.uint8)
        if self.parallel_decode or self.mesh.rank == 0:
            self.parts.offloader.need("vae")
            decoded = self.decode_latents(x, raise_if_cancelled)
            frames = frames if self.mesh.rank else decoded
        return frames

    def sound(self, x: Tensor, raise_if_cancelled: RaiseIfCancelled) -> Sound | None:
        """Decode audio latents, on rank 0; called after `decode`."""
        return None

    def after_output(self) -> None:
        self.parts.offloader.release_all()

    def memory(self) -> Memory:
        """Return the estimate of the bytes that an output takes."""
        raise NotImplementedError
