"""The one denoise loop, for every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sgld.messages import Tokens
from sgld.models.family import Conditioning, Family
from sgld.params import SamplingParams
from sgld.worker.canvas import Canvas
from sgld.worker.hook import Hook
from sgld.worker.solvers import Solver, make_solver


@torch.inference_mode()
def sample(family: Family, params: SamplingParams, hook: Hook, previews: int = 0) -> Tensor:
    """One output: frames u8 [N, H, W, 3] on the CPU. `params` holds one seed.

    Raises:
        Stopped: all ranks agreed to stop, between two steps.
    """
    try:
        return _sample(family, params, hook, previews)
    finally:
        family.rest()


def _sample(family: Family, params: SamplingParams, hook: Hook, previews: int) -> Tensor:
    assert isinstance(params.seed, int)
    with hook.stage("encode"):
        condition, warnings = family.encode(params)
        hook.tokens = Tokens(condition.prompt_tokens, condition.latent_tokens)
        x = family.noise(params, torch.Generator("cpu").manual_seed(params.seed))
        canvas = Canvas.prepare(family, params, hook, x)
    for warning in warnings:
        hook.note(warning)
    solver = make_solver(family.scheduler, params.num_inference_steps, params.flow_shift, params.first_step)
    if canvas is not None:
        x = canvas.at(float(solver.sigmas[0]))
    shown = preview_steps(len(solver.timesteps), previews)
    with hook.stage("denoise", len(solver.timesteps)):
        x = denoise(family, params, hook, solver, condition, x, shown, canvas)
    with hook.stage("decode"):
        frames = family.decode(x, hook.check if family.together else hook.pulse)
        return frames if canvas is None else canvas.composite(frames)


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
            estimate = clean(x, float(solver.sigmas[i - 1]), v, negative, scale) if i in previews else None
            x = solver.step(guide(v, negative, scale), x)
            if canvas is not None:
                x = canvas.hold(x, float(solver.sigmas[i]))
        if estimate is not None:
            hook.preview(previews.index(i), partial(show, family, canvas, estimate), family.together)
    return x


def show(family: Family, canvas: Canvas | None, x0: Tensor, pulse: Callable[[], None]) -> Tensor:
    """A preview u8 [1, H, W, 3], within the picture it will be part of."""
    frames = family.preview(x0, pulse)
    return frames if canvas is None else canvas.composite(frames)


def clean(x: Tensor, sigma: float, v: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """The estimate of the clean latents to show. Guidance grows as noise falls: early on it overshoots.

    On the embedded model this brings every preview nearer to the final picture than full guidance does.
    """
    return x - sigma * guide(v, negative, 1 + (scale - 1) * (1 - sigma))


def preview_steps(total: int, previews: int) -> list[int]:
    """That many steps, evenly spread over 1 to `total` - 1; fewer where there are fewer."""
    n = min(previews, total - 1)
    return [total * i // (n + 1) for i in range(1, n + 1)]


def guide(v: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598), in float32."""
    if negative is None:
        return v.float()
    return torch.lerp(negative.float(), v.float(), scale)
