"""Our solvers against diffusers' schedulers, on random velocities."""

from typing import Any

import pytest
import torch

from sgld.errors import ModelError
from sgld.models.base import Schedule
from sgld.worker.denoise_state import DenoiseState
from sgld.worker.solvers import check, make_solver

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def apart(reference: Any, steps: int, flow_shift: float | None = None) -> float:
    """Largest difference over all steps."""
    config = dict(reference.config) | {"_class_name": type(reference).__name__}
    solver = make_solver(config, steps, Schedule(flow_shift))
    reference.set_timesteps(steps)
    reference.set_begin_index(0)
    assert torch.equal(solver.timesteps, reference.timesteps)
    assert solver.timesteps.dtype == reference.timesteps.dtype
    x = torch.randn(1, 4, 3, 6, 6)
    state = DenoiseState(0, x)
    worst = 0.0
    for t in reference.timesteps:
        v = torch.randn(x.shape)
        x = reference.step(v, t, x, return_dict=False)[0]
        state = solver.step(state, v)
        worst = max(worst, float((x - state.latents).abs().max()))
    return worst


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_unipc_equals_diffusers(order: int, steps: int, shift: float) -> None:
    from diffusers import UniPCMultistepScheduler

    assert apart(UniPCMultistepScheduler(**FLOW, solver_order=order, flow_shift=shift), steps) < 1e-5


def test_unipc_without_some_corrections() -> None:
    from diffusers import UniPCMultistepScheduler

    assert apart(UniPCMultistepScheduler(**FLOW, disable_corrector=[0, 2]), 6) < 1e-5


def test_unipc_bh1_equals_diffusers_until_its_last_step() -> None:
    """There diffusers divides by zero; ours ends at the estimate of x0."""
    from diffusers import UniPCMultistepScheduler

    reference = UniPCMultistepScheduler(**FLOW, solver_type="bh1", solver_order=3)
    solver = make_solver(dict(reference.config) | {"_class_name": "UniPCMultistepScheduler"}, 6)
    reference.set_timesteps(6)
    x = torch.randn(1, 4, 2, 3, 3)
    state = DenoiseState(0, x)
    for i, t in enumerate(reference.timesteps):
        v = torch.randn(x.shape)
        x, state = reference.step(v, t, x, return_dict=False)[0], solver.step(state, v)
        assert i == 5 or (x - state.latents).abs().max() < 1e-5
    assert torch.equal(state.latents, state.history[1])


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert apart(FlowMatchEulerDiscreteScheduler(shift=shift), steps) < 1e-5


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_request_overrides_the_shift(name: str) -> None:
    own_keys = FLOW | {"flow_shift": 3.0} if name.startswith("Uni") else {"shift": 3.0}
    config = {"_class_name": name} | own_keys
    own, same, other = (make_solver(config, 4, Schedule(shift)).sigmas for shift in (None, 3.0, 7.0))
    assert torch.equal(own, same)
    assert not torch.equal(own, other)


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_true_velocity_leads_to_its_target(name: str) -> None:
    """Every estimate of x0 that a solver remembers is the target, from the first step."""
    config = {"_class_name": name} | (FLOW if name.startswith("Uni") else {})
    target, state = torch.randn(2, 3), DenoiseState(0, torch.randn(2, 3))
    solver = make_solver(config, 8, Schedule(3.0))
    for sigma in solver.sigmas[:-1]:
        state = solver.step(state, (state.latents - target) / sigma)
        assert all(torch.allclose(x0, target, atol=1e-5) for x0 in state.history[1:])
    assert torch.allclose(state.latents, target, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_karras_sigmas", True),
        ("thresholding", True),
        ("prediction_type", "epsilon"),
        ("use_flow_sigmas", False),
        ("final_sigmas_type", "sigma_min"),
        ("solver_type", "heun"),
        ("lower_order_final", False),
        ("shift_terminal", 0.1),
        ("something_new", 3),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_what_we_cannot_follow_is_named(key: str, value: Any) -> None:
    config = {"_class_name": "UniPCMultistepScheduler"} | FLOW | {"something_off": None}
    check(config)
    with pytest.raises(ModelError, match=key):
        check(config | {key: value})


def test_absent_keys_count_as_diffusers_defaults() -> None:
    with pytest.raises(ModelError, match="prediction_type: 'epsilon'"):
        check({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True})


@pytest.mark.parametrize("first", [0, 1])
def test_levels_and_times_may_be_given(first: int) -> None:
    sigmas, times = [1.0, 0.75, 0.5], [1000, 757, 522]
    schedule = Schedule(sigmas=sigmas, exact=True, times=times)
    solver = make_solver({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 3, schedule, first)
    assert solver.timesteps.tolist() == times[first:]
    assert solver.sigmas.tolist() == [*sigmas, 0.0][first:]
