"""The one denoise loop, for every family."""

from __future__ import annotations

import torch
from torch import Tensor

from sgld.models.family import Conditioning, Family
from sgld.params import SamplingParams
from sgld.worker.hook import Hook
from sgld.worker.solvers import Solver, make_solver


@torch.inference_mode()
def sample(family: Family, params: SamplingParams, hook: Hook) -> Tensor:
    """One output: frames u8 [N, H, W, 3] on the CPU. `params` holds one seed.

    Raises:
        Stopped: all ranks agreed to stop, between two steps.
    """
    assert isinstance(params.seed, int)
    with hook.stage("encode"):
        condition, warnings = family.encode(params)
    for warning in warnings:
        hook.note(warning)
    solver = make_solver(family.scheduler, params.num_inference_steps, params.flow_shift)
    x = family.noise(params, torch.Generator("cpu").manual_seed(params.seed))
    with hook.stage("denoise", len(solver.timesteps)):
        x = denoise(family, params, hook, solver, condition, x)
    with hook.stage("decode"):
        return family.decode(x, hook.pulse)


def denoise(
    family: Family, params: SamplingParams, hook: Hook, solver: Solver, condition: Conditioning, x: Tensor
) -> Tensor:
    """Latents from noise."""
    for t in solver.timesteps:
        with hook.step():
            v, negative = family.velocities(x, t, condition)
            x = solver.step(guide(v, negative, family.guidance(t, params)), x)
    return x


def guide(v: Tensor, negative: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598), in float32."""
    if negative is None:
        return v.float()
    return torch.lerp(negative.float(), v.float(), scale)
