"""Small modules that several transformers share, named by the keys of diffusers checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgld.nn.runner import BlockRunner, PlainRunner


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


class ComputeModule(nn.Module):
    """A module that casts its inputs to `compute_dtype`, whatever type its weights are stored in.

    `load_module` sets the type; a module built by hand computes in float32.
    """

    compute_dtype: torch.dtype = torch.float32


def set_compute_dtype(module: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Set the compute type of every `ComputeModule` in a module, by its name there."""
    for name, part in module.named_modules():
        if isinstance(part, ComputeModule):
            part.compute_dtype = dtype_of(name)


class DiffusionTransformer(ComputeModule):
    """A transformer whose blocks are run by `runner`."""

    runner: BlockRunner = PlainRunner()


class Embedder(nn.Module):
    """Linear, activation, linear; keys `linear_1`, `linear_2`."""

    def __init__(self, dim_in: int, dim: int, activation: Callable[[Tensor], Tensor], bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim, bias=bias)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return y


class TimestepEmbedder(ComputeModule):
    """Sinusoids of times, then linear, SiLU, linear; keys `linear_1`, `linear_2`."""

    def __init__(self, frequencies: int, dim: int, bias: bool = True):
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(frequencies, dim, bias=bias)
        self.linear_2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times t [K] in [0, 1000] as [K, C]."""
        y: Tensor = self.linear_2(F.silu(self.linear_1(sinusoid(t, self.frequencies).to(self.compute_dtype))))
        return y


class Projection(nn.Module):
    """The first half of `FeedForward`; key `proj`."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


class FeedForward(nn.Module):
    """Linear, activation, linear; keys `net.0.proj`, `net.2`."""

    def __init__(
        self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] = gelu_tanh, out: int | None = None
    ):
        super().__init__()
        last = nn.Linear(hidden, dim if out is None else out)
        self.net = nn.Sequential(Projection(dim, hidden, activation), nn.Identity(), last)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed times t [B] as sinusoids [B, dim], cosines first (Ho et al. 2020)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)
