"""The block runner: the one way to go through a transformer's blocks, and what a step tells it.

A transformer hands its loop over: `hidden = self.runner.run(self.blocks, hidden, call, step)`. Where weights come
from, which blocks are skipped and how a block is compiled are the runner's business, never a family's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import attrs
from torch import Tensor, nn

H = TypeVar("H", bound=Tensor | tuple[Tensor, ...])  # hidden states, which every block takes and returns


@attrs.frozen
class StepContext:
    """The denoising step and guidance branch that a transformer computes."""

    index: int = 0
    total: int = 1
    sigma: float = 1.0
    branch: int = 0  # 0: the prompt, 1: the negative prompt, and so on
    store: dict[str, Any] = attrs.field(factory=dict, repr=False)  # shared by all steps and branches of one request
    agree: Callable[[bool], bool] = attrs.field(default=bool, repr=False)  # makes all ranks decide alike

    def of(self, branch: int) -> StepContext:
        """Return the context of another guidance branch in the same step."""
        return attrs.evolve(self, branch=branch)


class BlockRunner(Protocol):
    """Runs blocks over hidden states."""

    def run(self, blocks: Iterable[nn.Module], hidden: H, call: Callable[[nn.Module, H], H], step: StepContext) -> H:
        """Return the hidden states after all blocks; `call` applies one block. A runner may skip blocks."""

    def visit(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield every block while its weights are loaded, to read something of each once per request."""


class PlainRunner:
    """Runs each block in turn, with weights that are always loaded."""

    def run(self, blocks: Iterable[nn.Module], hidden: H, call: Callable[[nn.Module, H], H], step: StepContext) -> H:
        for block in self.visit(blocks):
            hidden = call(block, hidden)
        return hidden

    def visit(self, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
        return iter(blocks)
