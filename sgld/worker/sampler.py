"""The denoise loop of every model. An `OpaquePipeline` makes its output without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from sgld.messages import Tokens, batch_key
from sgld.models.base import Conditioning, DiffusionModel, OpaquePipeline, Sound
from sgld.nn.runner import StepContext
from sgld.params import OutputParams
from sgld.worker.denoise_state import DenoiseState
from sgld.worker.run_context import RunContext
from sgld.worker.sdedit import SDEditStart, pictures_of
from sgld.worker.solvers import Solver, make_solver


@attrs.frozen(eq=False)
class Encoding:
    """The conditioning of one request, and the picture that its denoising starts from."""

    condition: Conditioning
    start: SDEditStart | None
    warnings: list[str]


class SharedEncoding:
    """The encoding of the last item, which the next item shares if their batch keys are equal."""

    def __init__(self) -> None:
        self._key: OutputParams | None = None
        self._encoding: Encoding | None = None

    def get(self, params: OutputParams, encode: Callable[[], Encoding]) -> Encoding:
        """Return the encoding for `params`, by `encode` if it is another request's."""
        key = batch_key(params)
        if self._encoding is None or key != self._key:
            self._encoding = None  # its memory is free before the next one is made
            self._key, self._encoding = key, encode()
        return self._encoding


@attrs.frozen(eq=False)
class Trajectory:
    """All that stays the same from one denoising step to the next."""

    model: DiffusionModel
    params: OutputParams
    condition: Conditioning
    solver: Solver
    sdedit: SDEditStart | None


def sample(
    model: DiffusionModel | OpaquePipeline,
    params: OutputParams,
    context: RunContext,
    previews: int = 0,
    shared: SharedEncoding | None = None,
) -> tuple[Tensor, Sound | None]:
    """Make one output: frames u8 [N, H, W, 3] on the CPU, and its sound. `params` has one integer seed.

    Raises:
        Stopped: a cancel arrived.
    """
    try:
        if isinstance(model, OpaquePipeline):
            return model.make(params, context)
        with torch.inference_mode():
            path, state = prepare(model, params, context, shared)
            return decode(path, denoise(path, state, context, previews), context)
    finally:
        model.after_output()


@torch.inference_mode()
def prepare(
    model: DiffusionModel, params: OutputParams, context: RunContext, shared: SharedEncoding | None = None
) -> tuple[Trajectory, DenoiseState]:
    """Encode the request, draw its noise, and return the trajectory with its first state."""
    with context.stage("encode"):
        generator = torch.Generator("cpu").manual_seed(params.seed)
        noise = model.noise(params, generator)  # [1, C, ..., h, w]
        encoding = (shared or SharedEncoding()).get(params, partial(_encode, model, params, context, noise))
    condition = encoding.condition
    context.tokens = Tokens(condition.prompt_tokens, condition.latent_tokens)
    for warning in encoding.warnings:
        context.note(warning)
    solver = make_solver(model.scheduler, params.num_inference_steps, model.schedule(params, noise), params.first_step)
    sdedit = None if encoding.start is None else attrs.evolve(encoding.start, noise=noise)
    x = noise if sdedit is None else sdedit.at(float(solver.sigmas[0]))
    state = DenoiseState(0, x, generator=generator.get_state())
    return Trajectory(model, params, condition, solver, sdedit), state


def _encode(model: DiffusionModel, params: OutputParams, context: RunContext, noise: Tensor) -> Encoding:
    pictures = [] if model.info.pictures.starts_denoising else pictures_of(params, context)
    condition, warnings = model.encode(params, pictures, context.raise_if_cancelled_on_all_ranks)
    start = SDEditStart.prepare(model, params, context, noise) if model.info.pictures.starts_denoising else None
    return Encoding(condition, start, warnings)


@torch.inference_mode()
def denoise(
    path: Trajectory, state: DenoiseState, context: RunContext, previews: int = 0, until: int | None = None
) -> DenoiseState:
    """Step from `state` to the end of the schedule, or until `until` steps are done. Send previews on the way."""
    model, params, solver, total = path.model, path.params, path.solver, len(path.solver.timesteps)
    preview_at = preview_steps(total, previews)
    store: dict[str, Any] = {}  # of block runners, between steps
    with context.stage("denoise", total, state.step):
        for i in range(state.step, total if until is None else until):
            x, x0 = state.latents, None  # [1, C, ..., h, w]
            t, sigma = solver.timesteps[i], float(solver.sigmas[i])
            with context.step():
                step = StepContext(i, total, sigma, store=store, agree=context.agree)
                v, v_negative = model.velocities(x, t, path.condition, step)
                scale = model.guidance(t, params)
                if i + 1 in preview_at:
                    x0 = x - sigma * _guide(path, v, v_negative, _preview_scale(scale, sigma))
                    x0 = model.finalize_latents(x0, path.condition)
                state = solver.step(state, _guide(path, v, v_negative, scale))
                if path.sdedit is not None:
                    x = path.sdedit.hold(state.latents, float(solver.sigmas[i + 1]))
                    state = attrs.evolve(state, latents=x)
            if x0 is not None:
                context.preview(preview_at.index(i + 1), partial(_show, path, x0), model.parallel_decode)
    return state


def _guide(path: Trajectory, v: Tensor, v_negative: Tensor | None, scale: float) -> Tensor:
    """Return the guided velocity, float32."""
    return v.float() if v_negative is None else path.model.guide(v, v_negative, scale, path.params)


def _preview_scale(scale: float, sigma: float) -> float:
    """Return a guidance scale that grows as noise falls: early on, full guidance overshoots.

    On the embedded model this brings every preview nearer to the final picture.
    """
    return 1 + (scale - 1) * (1 - sigma)


def _show(path: Trajectory, x0: Tensor, raise_if_cancelled: Callable[[], None]) -> Tensor:
    """Decode a preview u8 [1, H, W, 3]."""
    frames = path.model.preview(path.model.preview_latents(x0, path.condition), raise_if_cancelled)
    return frames if path.sdedit is None else path.sdedit.composite(frames)


@torch.inference_mode()
def decode(path: Trajectory, state: DenoiseState, context: RunContext) -> tuple[Tensor, Sound | None]:
    """Decode the last state: frames u8 [N, H, W, 3] on the CPU, and sound. Other ranks than 0 may return no frames."""
    model = path.model
    with context.stage("decode"):
        x, audio = model.streams(model.finalize_latents(state.latents, path.condition), path.condition)
        if model.parallel_decode:
            frames = model.decode(x, context.raise_if_cancelled_on_all_ranks)
        with context.rank0_alone():
            if not model.parallel_decode:
                frames = model.decode(x, context.raise_if_cancelled)
            frames = frames if path.sdedit is None else path.sdedit.composite(frames)
            return frames, None if audio is None else model.sound(audio, context.raise_if_cancelled)


def preview_steps(total: int, previews: int) -> list[int]:
    """Return `previews` steps, evenly spread over 1 to `total` - 1, or all of them if they are fewer."""
    n = min(previews, total - 1)
    return [total * i // (n + 1) for i in range(1, n + 1)]
