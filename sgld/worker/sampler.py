"""The one denoise loop, for every family; a model that makes its output as a whole does without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sgld.messages import Tokens
from sgld.models.family import Conditioning, Family, Sound, Whole
from sgld.params import SamplingParams
from sgld.worker.canvas import Canvas, pictures_of
from sgld.worker.hook import Hook
from sgld.worker.solvers import Solver, make_solver


def sample(model: Family | Whole, params: SamplingParams, hook: Hook, previews: int = 0) -> tuple[Tensor, Sound | None]:
    """One output: frames u8 [N, H, W, 3] on the CPU, and what is heard. `params` holds one seed.

    Raises:
        Stopped: all ranks agreed to stop, between two steps.
    """
    try:
        if isinstance(model, Whole):
            return model.make(params, hook)
        return _sample(model, params, hook, previews)
    finally:
        model.rest()


@torch.inference_mode()
def _sample(family: Family, params: SamplingParams, hook: Hook, previews: int) -> tuple[Tensor, Sound | None]:
    assert isinstance(params.seed, int)
    with hook.stage("encode"):
        generator = torch.Generator("cpu").manual_seed(params.seed)
        pictures = [] if family.info.starts_from_picture else pictures_of(params, hook)
        condition, warnings = family.encode(params, pictures, hook.check)
        hook.tokens = Tokens(condition.prompt_tokens, condition.latent_tokens)
        x = family.noise(params, generator)
        canvas = Canvas.prepare(family, params, hook, x) if family.info.starts_from_picture else None
    for warning in warnings:
        hook.note(warning)
    schedule = family.schedule(params, x)
    solver = make_solver(family.scheduler, params.num_inference_steps, schedule, params.first_step, generator)
    if canvas is not None:
        x = canvas.at(float(solver.sigmas[0]))
    shown = preview_steps(len(solver.timesteps), previews)
    with hook.stage("denoise", len(solver.timesteps)):
        x = denoise(family, params, hook, solver, condition, x, shown, canvas)
    with hook.stage("decode"):
        pulse = hook.check if family.together else hook.pulse
        x = family.settle(x, condition)
        frames = family.decode(x, pulse)
        return frames if canvas is None else canvas.composite(frames), family.sound(x, hook.pulse)


def denoise(
    family: Family,
    params: SamplingParams,
    hook: Hook,
    solver: Solver,
    condition: Conditioning,
    x: Tensor,
    previews: list[int],
    canvas: Canvas | None = None,
) -> Tensor:
    """Latents from noise, or from a canvas. `previews` are the steps after which the clean ones' estimate is shown."""
    for i, t in enumerate(solver.timesteps, 1):
        with hook.step():
            v, negative = family.velocities(x, t, condition)
            scale = family.guidance(t, params)
            estimate = None
            if i in previews:
                estimate = family.settle(
                    clean(family, params, x, float(solver.sigmas[i - 1]), v, negative, scale), condition
                )
            x = solver.step(guide(family, params, v, negative, scale), x)
            if canvas is not None:
                x = canvas.hold(x, float(solver.sigmas[i]))
        if estimate is not None:
            hook.preview(previews.index(i), partial(show, family, canvas, estimate), family.together)
    return x


def show(family: Family, canvas: Canvas | None, x0: Tensor, pulse: Callable[[], None]) -> Tensor:
    """A preview u8 [1, H, W, 3], within the picture it will be part of."""
    frames = family.preview(x0, pulse)
    return frames if canvas is None else canvas.composite(frames)


def clean(
    family: Family, params: SamplingParams, x: Tensor, sigma: float, v: Tensor, negative: Tensor | None, scale: float
) -> Tensor:
    """The estimate of the clean latents to show. Guidance grows as noise falls: early on it overshoots.

    On the embedded model this brings every preview nearer to the final picture than full guidance does.
    """
    return x - sigma * guide(family, params, v, negative, 1 + (scale - 1) * (1 - sigma))


def preview_steps(total: int, previews: int) -> list[int]:
    """That many steps, evenly spread over 1 to `total` - 1; fewer where there are fewer."""
    n = min(previews, total - 1)
    return [total * i // (n + 1) for i in range(1, n + 1)]


def guide(family: Family, params: SamplingParams, v: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """The prediction to follow, float32."""
    return v.float() if negative is None else family.guide(v, negative, scale, params)
