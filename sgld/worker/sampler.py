"""The one denoise loop, for every family; a model that makes its output as a whole does without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sgld.messages import Tokens
from sgld.models.base import Conditioning, DiffusionModel, OpaquePipeline, Sound
from sgld.params import OutputParams, SamplingParams
from sgld.worker.run_context import RunContext
from sgld.worker.sdedit import SDEditStart, pictures_of
from sgld.worker.solvers import Solver, make_solver


def sample(
    model: DiffusionModel | OpaquePipeline, params: OutputParams, context: RunContext, previews: int = 0
) -> tuple[Tensor, Sound | None]:
    """One output: frames u8 [N, H, W, 3] on the CPU, and what is heard.

    Raises:
        Stopped: all ranks agreed to stop, between two steps.
    """
    try:
        if isinstance(model, OpaquePipeline):
            return model.make(params, context)
        return _sample(model, params, context, previews)
    finally:
        model.after_output()


@torch.inference_mode()
def _sample(
    family: DiffusionModel, params: OutputParams, context: RunContext, previews: int
) -> tuple[Tensor, Sound | None]:
    with context.stage("encode"):
        generator = torch.Generator("cpu").manual_seed(params.seed)
        pictures = [] if family.info.pictures.starts_denoising else pictures_of(params, context)
        condition, warnings = family.encode(params, pictures, context.raise_if_cancelled_on_all_ranks)
        context.tokens = Tokens(condition.prompt_tokens, condition.latent_tokens)
        x = family.noise(params, generator)
        sdedit = SDEditStart.prepare(family, params, context, x) if family.info.pictures.starts_denoising else None
    for warning in warnings:
        context.note(warning)
    schedule = family.schedule(params, x)
    solver = make_solver(family.scheduler, params.num_inference_steps, schedule, params.first_step, generator)
    if sdedit is not None:
        x = sdedit.at(float(solver.sigmas[0]))
    shown = preview_steps(len(solver.timesteps), previews)
    with context.stage("denoise", len(solver.timesteps)):
        x = denoise(family, params, context, solver, condition, x, shown, sdedit)
    with context.stage("decode"):
        raise_if_cancelled = (
            context.raise_if_cancelled_on_all_ranks if family.parallel_decode else context.raise_if_cancelled
        )
        x = family.finalize_latents(x, condition)
        frames = family.decode(x, raise_if_cancelled)
        return frames if sdedit is None else sdedit.composite(frames), family.sound(x, context.raise_if_cancelled)


def denoise(
    family: DiffusionModel,
    params: SamplingParams,
    context: RunContext,
    solver: Solver,
    condition: Conditioning,
    x: Tensor,
    previews: list[int],
    sdedit: SDEditStart | None = None,
) -> Tensor:
    """Latents from noise, or from a canvas. `previews` are the steps after which the clean ones' estimate is shown."""
    for i, t in enumerate(solver.timesteps, 1):
        with context.step():
            v, negative = family.velocities(x, t, condition)
            scale = family.guidance(t, params)
            estimate = None
            if i in previews:
                estimate = family.finalize_latents(
                    clean(family, params, x, float(solver.sigmas[i - 1]), v, negative, scale), condition
                )
            x = solver.step(guide(family, params, v, negative, scale), x)
            if sdedit is not None:
                x = sdedit.hold(x, float(solver.sigmas[i]))
        if estimate is not None:
            context.preview(previews.index(i), partial(show, family, sdedit, estimate), family.parallel_decode)
    return x


def show(
    family: DiffusionModel, sdedit: SDEditStart | None, x0: Tensor, raise_if_cancelled: Callable[[], None]
) -> Tensor:
    """A preview u8 [1, H, W, 3], within the picture it will be part of."""
    frames = family.preview(x0, raise_if_cancelled)
    return frames if sdedit is None else sdedit.composite(frames)


def clean(
    family: DiffusionModel,
    params: SamplingParams,
    x: Tensor,
    sigma: float,
    v: Tensor,
    negative: Tensor | None,
    scale: float,
) -> Tensor:
    """The estimate of the clean latents to show. Guidance grows as noise falls: early on it overshoots.

    On the embedded model this brings every preview nearer to the final picture than full guidance does.
    """
    return x - sigma * guide(family, params, v, negative, 1 + (scale - 1) * (1 - sigma))


def preview_steps(total: int, previews: int) -> list[int]:
    """That many steps, evenly spread over 1 to `total` - 1; fewer where there are fewer."""
    n = min(previews, total - 1)
    return [total * i // (n + 1) for i in range(1, n + 1)]


def guide(family: DiffusionModel, params: SamplingParams, v: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """The prediction to follow, float32."""
    return v.float() if negative is None else family.guide(v, negative, scale, params)
