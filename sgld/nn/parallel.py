"""Mesh: the ranks of one group, and the collectives that split a picture's tokens among them.

The split is Ulysses (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509): each rank holds some of the tokens;
around attention an all-to-all trades tokens for heads, so that each rank attends over all tokens with some heads.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from sgld.errors import BadRequest
from sgld.platform import Platform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@attrs.frozen
class Mesh:
    """This rank's place among its peers. A world of 1 never imports torch.distributed."""

    rank: int
    world: int
    device: torch.device
    control: ProcessGroup | None = None  # gloo, for flags

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> Mesh:
        """A world of one rank."""
        return cls(0, 1, torch.device(device))

    @classmethod
    def join(cls, rank: int, world: int, store_file: Path, platform: Platform, timeout_s: float) -> Mesh:
        """Meet the other ranks through a file that does not exist yet; no ports.

        gloo listens on the interface that GLOO_SOCKET_IFNAME names. A collective gives up after `timeout_s`.
        """
        if world == 1:
            return cls.solo(platform.device(rank))
        import torch.distributed as dist

        dist.init_process_group(
            platform.backend,
            init_method=f"file://{store_file.absolute()}",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        control = dist.group.WORLD if platform.backend == "gloo" else dist.new_group(backend="gloo")
        return cls(rank, world, platform.device(rank), control)

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        if self.world == 1:
            return flag
        import torch.distributed as dist

        byte = torch.tensor([flag], dtype=torch.uint8)
        dist.broadcast(byte, src=0, group=self.control)
        return bool(byte.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag of any rank is set, on every rank."""
        if self.world == 1:
            return flag
        import torch.distributed as dist

        byte = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(byte, op=dist.ReduceOp.MAX, group=self.control)
        return bool(byte.item())

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal part of `x` along `dim`."""
        return x if self.world == 1 else x.chunk(self.world, dim)[self.rank].contiguous()

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The parts of all ranks, joined along `dim`."""
        if self.world == 1:
            return x
        import torch.distributed as dist

        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim)

    def share(self, x: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; the others give one of the same shape and type, which is overwritten."""
        if self.world == 1:
            return x
        import torch.distributed as dist

        x = x.contiguous()
        dist.broadcast(x, src=0)
        return x

    def tokens_to_heads(self, x: Tensor) -> Tensor:
        """[B, S/n, H, D] -> [B, S, H/n, D]"""
        B, s, H, D = x.shape
        y = x.view(B, s, self.world, H // self.world, D).permute(2, 0, 1, 3, 4)  # [n, B, S/n, H/n, D]
        return self._all_to_all(y).permute(1, 0, 2, 3, 4).reshape(B, self.world * s, H // self.world, D)

    def heads_to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, H/n, D] -> [B, S/n, H, D]"""
        B, S, h, D = x.shape
        y = x.reshape(B, self.world, S // self.world, h, D).permute(1, 0, 2, 3, 4)  # [n, B, S/n, H/n, D]
        return self._all_to_all(y).permute(1, 2, 0, 3, 4).reshape(B, S // self.world, self.world * h, D)

    def _all_to_all(self, x: Tensor) -> Tensor:
        """Part i of the first dimension goes to rank i."""
        import torch.distributed as dist

        x = x.contiguous()
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x)
        return y

    def check_heads(self, heads: int) -> None:
        """Raise `BadRequest` unless the ranks can share the attention heads evenly."""
        if heads % self.world:
            raise BadRequest(
                f"num_gpus: {heads} attention heads do not split over {self.world} workers; "
                f"allowed here: {_listed(_divisors(heads))}",
                "num_gpus",
            )

    def check_tokens(self, tokens: int, heads: int) -> None:
        """Raise `BadRequest` unless the ranks can share the tokens of one output evenly."""
        if tokens % self.world:
            allowed = [n for n in _divisors(heads) if tokens % n == 0]
            raise BadRequest(
                f"num_gpus: {tokens} tokens of this size and length do not split over {self.world} workers; "
                f"allowed for it: {_listed(allowed)}",
                "num_gpus",
            )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
