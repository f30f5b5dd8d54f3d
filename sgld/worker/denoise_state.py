"""DenoiseState: a point on the way from noise to clean latents, which can be saved and resumed elsewhere."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"


@attrs.frozen(eq=False)
class DenoiseState:
    """Everything that the remaining steps need of the steps before them.

    The rest follows from the request: the encoding, the noise levels, and a start picture's latents and noise.
    """

    step: int  # number of steps done
    latents: Tensor  # [1, C, ..., h, w], float32
    history: tuple[Tensor, ...] = ()  # of a multistep solver, newest first
    generator: Tensor | None = None  # torch.Generator's state, for solvers that add noise

    def save(self, file: Path) -> None:
        """Write the state as a safetensors file."""
        tensors = {"latents": self.latents} | {f"history.{i}": tensor for i, tensor in enumerate(self.history)}
        if self.generator is not None:
            tensors["generator"] = self.generator
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, file, {"version": VERSION, "step": str(self.step)})

    @classmethod
    def load(cls, file: Path, device: torch.device | str = "cpu") -> DenoiseState:
        """Read a state, its latents and history on `device`.

        Raises:
            ValueError: another version of sgld wrote the file.
        """
        with safe_open(file, "pt") as stored:
            header = stored.metadata() or {}
            if header.get("version") != VERSION:
                raise ValueError(f"{file}: version {header.get('version')!r} cannot be resumed; only {VERSION!r}")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
        generator = tensors.pop("generator", None)
        latents = tensors.pop("latents").to(device)
        history = tuple(tensors[f"history.{i}"].to(device) for i in range(len(tensors)))
        return cls(int(header["step"]), latents, history, generator)
