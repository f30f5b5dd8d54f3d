"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864) over frames, rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4)
def rope_3d(grid: tuple[int, int, int], dims: tuple[int, int, int], device: torch.device, theta: float = 1e4) -> Tensor:
    """Return rotations as complex numbers [T*H*W, D/2]; `dims`, whose sum is D, are the bands of the axes."""
    bands = []
    for axis, (length, dim) in enumerate(zip(grid, dims, strict=True)):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)  # [length, dim/2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        bands.append(torch.polar(torch.ones_like(angle), angle).view(shape).expand(*grid, dim // 2))
    return torch.cat(bands, -1).reshape(math.prod(grid), -1).to(torch.complex64).to(device)


def rope_at(positions: Tensor, dims: Sequence[int], theta: float = 1e4) -> Tensor:
    """Return rotations as complex numbers [S, D/2] of positions [S, axes]; `dims`, whose sum is D, by axis."""
    bands = [
        torch.outer(p, theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=p.device) / dim))
        for p, dim in zip(positions.double().T, dims, strict=True)
    ]
    angle = torch.cat(bands, -1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn each pair of neighbours in x [B, S, H, D] by rope [S, D/2]."""
    z = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # [B, S, H, D/2]
    return torch.view_as_real(z * rope[:, None]).flatten(-2).type_as(x)
