"""Small modules that several transformers share, named by the keys of diffusers checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


class Denoiser(nn.Module):
    """A transformer whose blocks are gone through by `walk`, which brings the weights of each where they wait."""

    walk: Callable[[Iterable[nn.Module]], Iterator[nn.Module]] = staticmethod(iter)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


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
    """Sinusoidal embedding of times t [B] -> [B, dim], cosines first (Ho et al. 2020)."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)
