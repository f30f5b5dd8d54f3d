"""Solvers: from the model's velocity to the next state, on flow-matching schedules.

A schedule is a falling list of noise levels sigma with x = (1 - sigma) x0 + sigma noise. A step goes from sigma_i to
sigma_i+1. A solver holds the schedule and its coefficients, computed once, in double precision, on the CPU. Everything
that changes from step to step is in the `DenoiseState`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from sgld.errors import ModelError
from sgld.models.base import Schedule
from sgld.worker.denoise_state import DenoiseState

Config = Mapping[str, Any]


class Solver(ABC):
    """An integrator of the flow on one schedule."""

    sigmas: Tensor  # [steps + 1], float32
    timesteps: Tensor  # [steps], as the model takes them

    @abstractmethod
    def step(self, state: DenoiseState, v: Tensor) -> DenoiseState:
        """Return the state one step later, from the velocity `v` at `state.latents`."""


def shifted(sigma: Any, shift: float) -> Any:
    """Shift the time of the flow schedule (Esser et al. 2024, https://arxiv.org/abs/2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamically_shifted(sigma: Any, mu: float, kind: str) -> Any:
    """Shift by `mu`, which grows with the length of the sequence: `kind` is exponential or linear."""
    factor = math.exp(mu) if kind == "exponential" else mu
    return factor / (factor + (1 / sigma - 1))


def stretched(sigma: Any, terminal: float | None) -> Any:
    """Stretch the schedule so that its last level before 0 is `terminal`. A single level, which is 1, stays."""
    left = 1 - sigma
    if not terminal or not left[-1]:
        return sigma
    return 1 - left * (1 - terminal) / left[-1]


class FlowMatchEuler(Solver):
    """The straight step x + (sigma' - sigma) v (Lipman et al. 2022, https://arxiv.org/abs/2210.02747).

    With `stochastic_sampling`, each step goes to the estimate of x0 and adds fresh noise: few-step models that were
    trained by distribution matching (Yin et al. 2024, https://arxiv.org/abs/2405.14867) sample like this.
    """

    only = {  # noqa: RUF012
        "invert_sigmas": False, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    }  # fmt: skip
    read = (
        "num_train_timesteps", "shift", "use_dynamic_shifting", "shift_terminal", "time_shift_type",
        "stochastic_sampling",
    )  # fmt: skip
    moot = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")  # a family's `Schedule` reads them

    def __init__(self, config: Config, steps: int, schedule: Schedule, first: int):
        train = config.get("num_train_timesteps", 1000)
        sigmas = self._levels(config, steps, schedule, train)
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)[first:]
        times = schedule.times
        self.timesteps = self.sigmas[:-1] * train if times is None else torch.tensor(times, dtype=torch.float32)[first:]
        self._steps: list[tuple[float, float]] = list(pairwise(self.sigmas.tolist()))
        self._stochastic = bool(config.get("stochastic_sampling"))

    def _levels(self, config: Config, steps: int, schedule: Schedule, train: int) -> Any:
        """Return the noise levels except the last, which is 0."""
        if schedule.sigmas is not None and schedule.exact:
            return schedule.sigmas
        least = torch.tensor(1 / train)  # that the model was trained on: an evenly spaced schedule ends there
        if config.get("use_dynamic_shifting"):
            mu = schedule.mu if schedule.shift is None else math.log(schedule.shift)
            if mu is None:
                raise ModelError("scheduler_config.json: use_dynamic_shifting is not supported by this model")
            shift = partial(dynamically_shifted, mu=mu, kind=config.get("time_shift_type") or "exponential")
        else:
            shift = partial(shifted, shift=config.get("shift", 1.0) if schedule.shift is None else schedule.shift)
            least = shift(least)  # the schedule's ends are shifted, then all of it
        even = np.linspace(train, float(least) * train, steps) / train
        sigmas = shift(even if schedule.sigmas is None else np.asarray(schedule.sigmas))
        return stretched(sigmas, config.get("shift_terminal"))

    def step(self, state: DenoiseState, v: Tensor) -> DenoiseState:
        x, (now, after) = state.latents, self._steps[state.step]
        if not self._stochastic:
            return attrs.evolve(state, step=state.step + 1, latents=x + (after - now) * v)
        assert state.generator is not None
        generator = torch.Generator("cpu").set_state(state.generator)
        x0 = x - now * v
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
        return DenoiseState(state.step + 1, (1 - after) * x0 + after * noise, generator=generator.get_state())


@attrs.frozen
class Update:
    """The linear map x' = a x + sum of c_k m_k over the estimates m of x0, newest first."""

    a: float
    c: list[float]

    def __call__(self, x: Tensor, estimates: Sequence[Tensor]) -> Tensor:
        y: Tensor = self.a * x
        for c, m in zip(self.c, estimates, strict=False):
            y = y + c * m
        return y


class UniPC(Solver):
    """UniPC, a multistep predictor-corrector on x0 (Zhao et al. 2023, https://arxiv.org/abs/2302.04867)."""

    only = {  # noqa: RUF012
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "predict_x0": True, "thresholding": False,
        "lower_order_final": True, "final_sigmas_type": "zero", "solver_p": None, "use_karras_sigmas": False,
        "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_dynamic_shifting": False,
        "shift_terminal": None,
    }  # fmt: skip
    read = ("num_train_timesteps", "solver_order", "solver_type", "flow_shift", "disable_corrector")
    moot = (  # without meaning on flow sigmas
        "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "timestep_spacing",
        "steps_offset", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type", "sigma_min", "sigma_max",
    )  # fmt: skip

    def __init__(self, config: Config, steps: int, schedule: Schedule, first: int):
        assert schedule.sigmas is None and schedule.mu is None, "families with their own levels use FlowMatchEuler"
        train = config.get("num_train_timesteps", 1000)
        shift = config.get("flow_shift", 1.0) if schedule.shift is None else schedule.shift
        sigmas = shifted(np.linspace(1, 1 / train, steps + 1)[:-1], shift)
        sigmas[0] = min(sigmas[0], 1 - 1e-6)  # at 1 the log signal-to-noise ratio is infinite
        self.timesteps = torch.from_numpy((sigmas * train).astype(np.int64))[first:]
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float32)[first:]
        self._kind = config.get("solver_type", "bh2")
        self._uncorrected = {i + 1 - first for i in config.get("disable_corrector", [])} | {0}
        order = config.get("solver_order", 2)
        left = steps - first
        self._orders = [min(order, left - i, i + 1) for i in range(left)]
        self._order = order
        self._predict, self._correct = self._coefficients()

    def step(self, state: DenoiseState, v: Tensor) -> DenoiseState:
        """Correct `state.latents` by `v`, then predict. The history is the corrected latents, then estimates of x0."""
        i, x = state.step, state.latents
        x0 = x.sub(v, alpha=self._sigma[i])
        estimates = [x0, *state.history[1:]]
        if state.history and i not in self._uncorrected:
            x = self._correct[i](state.history[0], estimates)
        estimates = estimates[: self._order]
        return attrs.evolve(state, step=i + 1, latents=self._predict[i](x, estimates), history=(x, *estimates))

    def _coefficients(self) -> tuple[list[Update], list[Update]]:
        """Return for every i the predictor from i to i + 1, and the corrector that repeats the step from i - 1."""
        self._sigma = self.sigmas.double().tolist()
        steps = range(len(self._orders))
        predict = [self._update(i + 1, i, self._orders[i], corrects=False) for i in steps]
        correct = [self._update(i, i - 1, self._orders[i - 1], corrects=True) for i in steps[1:]]
        return predict, [Update(1.0, []), *correct]

    def _lambda(self, i: int) -> float:
        """Return half the log signal-to-noise ratio at step i."""
        return math.log1p(-self._sigma[i]) - math.log(self._sigma[i])

    def _update(self, t: int, s: int, order: int, corrects: bool) -> Update:
        """Return the step from sigma_s to sigma_t by the estimates at s, s - 1, ... (a corrector: at t first)."""
        if self._sigma[t] == 0:
            return Update(0.0, [1.0])
        h = self._lambda(t) - self._lambda(s)
        r = [(self._lambda(s - k) - self._lambda(s)) / h for k in range(1, order)]
        phi = math.expm1(-h)
        b = -h if self._kind == "bh1" else phi
        rho = _rho(h, b, [*r, 1.0], corrects)
        alpha = 1 - self._sigma[t]
        earlier = [-alpha * b * p / q for p, q in zip(rho, r, strict=False)]
        new = [-alpha * b * rho[-1]] if corrects else []
        at_s = -alpha * phi - sum(earlier) - sum(new)
        return Update(self._sigma[t] / self._sigma[s], [*new, at_s, *earlier])


def _rho(h: float, b: float, r: list[float], corrects: bool) -> list[float]:
    """Solve the paper's system R rho = b for the weights of the finite differences, by short forms at low order."""
    order = len(r)
    if order == 1:
        return [0.5] if corrects else []
    if order == 2 and not corrects:
        return [0.5]
    phi = math.expm1(-h) / -h - 1
    factorial = 1
    right = []
    for k in range(1, order + 1):
        right.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    n = order if corrects else order - 1
    matrix = np.vander(r[:n], n, increasing=True).T
    return [float(x) for x in np.linalg.solve(matrix, right[:n])]


SOLVERS: dict[str, type[UniPC] | type[FlowMatchEuler]] = {
    "UniPCMultistepScheduler": UniPC,
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler,
}


def check(config: Config) -> type[UniPC] | type[FlowMatchEuler]:
    """Return the solver class for a scheduler_config.json.

    Raises:
        ModelError: the class or a value is not supported. Only keys without effect are ignored.
    """
    name = config.get("_class_name")
    if name not in SOLVERS:
        raise ModelError(f"scheduler_config.json: _class_name {name!r} is not supported; known: {', '.join(SOLVERS)}")
    solver = SOLVERS[name]
    for key, value in config.items():
        if key.startswith("_") or key in solver.read or key in solver.moot:
            continue
        if key not in solver.only and value not in (None, False):
            raise ModelError(f"scheduler_config.json: {key}: {value!r} is not supported by {name}")
    for key, needed in solver.only.items():
        if (value := config.get(key, _default(key, needed))) != needed:
            raise ModelError(f"scheduler_config.json: {key}: {value!r} is not supported; only {needed!r}")
    if config.get("solver_type", "bh2") not in ("bh1", "bh2"):
        kind = config["solver_type"]
        raise ModelError(f"scheduler_config.json: solver_type: {kind!r} is not supported; only bh1 and bh2")
    return solver


def _default(key: str, needed: object) -> Any:
    """Return the value of an absent key in diffusers, where it differs from `needed`."""
    return {"prediction_type": "epsilon", "use_flow_sigmas": False}.get(key, needed)


def make_solver(
    config: Config,
    steps: int,
    schedule: Schedule = Schedule(),  # noqa: B008 - frozen
    first: int = 0,
) -> Solver:
    """Build the solver of a scheduler_config.json for `steps` steps without those before `first`."""
    return check(config)(config, steps, schedule, first)
