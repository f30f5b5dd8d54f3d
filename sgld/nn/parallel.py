"""Mesh: the ranks of one group, and the ways in which they share one picture's work.

Each way is an `Axis`. Guidance branches (`cfg`) are split first, then a branch's tokens (`tokens`), which are the
product of a ring and of Ulysses' heads: rank = (cfg * rings + ring) * heads + head.
"""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from sgld.errors import BadRequest
from sgld.messages import RankAssignment
from sgld.platform import Platform
from sgld.settings import Settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

T = TypeVar("T")
AWAKE_S = 0.1  # how long a rank on a CPU keeps its core while it waits for the others' heads


@attrs.frozen
class Axis:
    """This rank's place, `index`, among `ranks` that share some work. One alone never imports torch.distributed."""

    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: ProcessGroup | None = None  # None: every rank there is

    @property
    def size(self) -> int:
        """Return the number of ranks that share."""
        return len(self.ranks)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of `x` along `dim`. Zeros fill up the last parts, so that sizes are equal."""
        if self.size == 1:
            return x
        each = -(-x.shape[dim] // self.size)
        start = min(self.index * each, x.shape[dim])
        part = x.narrow(dim, start, min(each, x.shape[dim] - start))
        lack = each - part.shape[dim]
        return F.pad(part, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, lack)) if lack else part.contiguous()

    def gather(self, x: Tensor, dim: int, length: int | None = None) -> Tensor:
        """Gather the parts of all ranks along `dim`, and cut them to `length`."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in self.ranks]
        dist.all_gather(parts, x, group=self.group)
        whole = torch.cat(parts, dim)
        return whole if length is None else whole.narrow(dim, 0, length)

    def share(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part of `x` along `dim`. The parts differ in size."""
        return x.tensor_split(self.size, dim)[self.index]

    def share_list(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of a list, cut as `share` cuts."""
        sizes = [len(part) for part in torch.arange(len(items)).tensor_split(self.size)]
        start = sum(sizes[: self.index])
        return items[start : start + sizes[self.index]]

    def join(self, x: Tensor, dim: int, units: int) -> Tensor:
        """Join on the first rank the parts that `share` cut of `units`, each grown by one factor; else return `x`."""
        if self.size == 1:
            return x
        import torch.distributed as dist

        sizes = [len(part) for part in torch.arange(units).tensor_split(self.size)]
        grown = x.shape[dim] // sizes[self.index]
        lack = (sizes[0] - sizes[self.index]) * grown  # the first parts are the largest
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, lack)).contiguous()
        parts = [torch.empty_like(x) for _ in sizes] if self.index == 0 else None
        dist.gather(x, parts, group=self.group, group_dst=0)
        if parts is None:
            return x
        return torch.cat([part.narrow(dim, 0, n * grown) for part, n in zip(parts, sizes, strict=True)], dim)

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(x, group=self.group)
        return x

    def all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to send part i of the first dimension to rank i; the answer waits for part i from each rank i."""
        import torch.distributed as dist

        y = torch.empty_like(x)
        work = dist.all_to_all_single(y, x, group=self.group, async_op=True)

        def arrived() -> Tensor:
            if x.device.type == "cpu":
                _stay_awake(work)
            work.wait()
            return y

        return arrived

    def pass_on(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to send `x` to the next rank; the function that comes back waits for the one before's."""
        received = torch.empty_like(x)
        wait = self._exchange([(x, 1)], [(received, -1)])

        def arrived() -> Tensor:
            wait()
            return received

        return arrived

    def with_halo(self, x: Tensor, dim: int) -> Tensor:
        """Put `x` between the neighbours' nearest rows along `dim`; zeros at both ends of the whole."""
        first, last = (x.narrow(dim, at, 1).contiguous() for at in (0, x.shape[dim] - 1))
        before, after = torch.zeros_like(first), torch.zeros_like(last)
        sides = [(-1, first, before)] * (self.index > 0) + [(1, last, after)] * (self.index < self.size - 1)
        self._exchange([(own, side) for side, own, _ in sides], [(theirs, side) for side, _, theirs in sides])()
        return torch.cat([before, x, after], dim)

    def _exchange(self, out: list[tuple[Tensor, int]], into: list[tuple[Tensor, int]]) -> Callable[[], None]:
        """Start to send to, and to receive from, the ranks that many places on; the answer waits for all."""
        import torch.distributed as dist

        def peer(by: int) -> int:
            return self.ranks[(self.index + by) % self.size]

        work = [dist.P2POp(dist.isend, x, peer(by), self.group) for x, by in out]
        work += [dist.P2POp(dist.irecv, x, peer(by), self.group) for x, by in into]
        requests = dist.batch_isend_irecv(work)

        def wait() -> None:
            for request in requests:
                request.wait()

        return wait


@attrs.frozen
class Degrees:
    """How many ranks share each kind of work."""

    cfg: int = 1
    ring: int = 1
    ulysses: int = 1

    @classmethod
    def of(cls, settings: Settings, heads: int, guided: bool) -> Degrees:
        """Return the degrees of the settings, and choose those that are not set.

        Guidance branches cost the least traffic, so a model that is `guided` by default splits them first, unless
        the settings name a degree of the sequence. Then as many ranks share the attention heads as divide them,
        and a ring takes the rest.

        Raises:
            BadRequest: more workers for the heads than divide them.
        """
        s = settings
        named = s.parallel.sp_degree or s.parallel.ulysses_degree or s.parallel.ring_degree
        split = (
            guided and s.parallel.num_gpus % 2 == 0 and not named
            if s.parallel.enable_cfg_parallel is None
            else s.parallel.enable_cfg_parallel
        )
        cfg = 2 if split else 1
        sequence = s.parallel.num_gpus // cfg
        ulysses = s.parallel.ulysses_degree or (
            sequence // s.parallel.ring_degree if s.parallel.ring_degree else math.gcd(sequence, heads)
        )
        if heads % ulysses:
            fit = [d for d in range(1, sequence + 1) if sequence % d == 0 and heads % d == 0]
            name, given, allowed, rest = "ulysses_degree", str(ulysses), fit, ", and ring_degree takes the rest"
            if not s.parallel.ulysses_degree:
                name, given, rest = (
                    "ring_degree",
                    f"{s.parallel.ring_degree} leaves ulysses_degree {ulysses}, and so many",
                    "",
                )
                allowed = [sequence // d for d in reversed(fit)]
            raise BadRequest(
                f"{given} workers cannot share {heads} attention heads evenly; allowed for "
                f"{sequence} workers: {', '.join(map(str, allowed))}{rest}",
                field=name,
            )
        return cls(cfg, sequence // ulysses, ulysses)


@attrs.frozen
class Mesh:
    """This rank's place among its peers. A world of 1 never imports torch.distributed."""

    rank: int
    world: int
    device: torch.device
    control: ProcessGroup | None = None  # gloo, for flags
    cfg: Axis = Axis()
    tokens: Axis = Axis()  # of one guidance branch
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    local_world: int = attrs.field(default=attrs.Factory(lambda mesh: mesh.world, takes_self=True))  # on this machine
    _groups: dict[tuple[int, ...], ProcessGroup] = attrs.field(factory=dict, eq=False, repr=False)

    @classmethod
    def solo(cls, device: torch.device | str = "cpu") -> Mesh:
        """Build a mesh of one rank."""
        return cls(0, 1, torch.device(device))

    @classmethod
    def join(cls, assignment: RankAssignment, platform: Platform) -> Mesh:
        """Join the other ranks, by a file that does not exist yet or a port where rank 0 hosts torch's store.

        gloo listens on the interface that GLOO_SOCKET_IFNAME names. A collective gives up after the seat's timeout.
        """
        device = platform.device(assignment.local_rank)
        if assignment.world == 1:
            return cls.solo(device)
        import torch.distributed as dist

        timeout = datetime.timedelta(seconds=assignment.dist_timeout_s)
        store: Any
        if isinstance(assignment.rendezvous, Path):
            store = dist.FileStore(str(assignment.rendezvous.absolute()), assignment.world)  # type: ignore[attr-defined]
        else:
            listener = None if assignment.listener is None else assignment.listener.detach()
            store = dist.TCPStore(  # type: ignore[attr-defined]
                *assignment.rendezvous, assignment.world, assignment.rank == 0, timeout, master_listen_fd=listener
            )
        dist.init_process_group(
            platform.backend, store=store, rank=assignment.rank, world_size=assignment.world, timeout=timeout
        )
        control = dist.group.WORLD if platform.backend == "gloo" else dist.new_group(backend="gloo")
        return cls(assignment.rank, assignment.world, device, control, local_world=assignment.local_world)

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def all(self) -> Axis:
        """Return the axis of all ranks."""
        return Axis(tuple(range(self.world)), self.rank)

    def split(self, degrees: Degrees) -> Mesh:
        """Split the ranks into axes by these degrees. Every rank calls this alike."""
        d = degrees
        return attrs.evolve(
            self,
            cfg=self.axis(d.cfg, d.ring * d.ulysses),
            tokens=self.axis(d.ring * d.ulysses),
            ring=self.axis(d.ring, d.ulysses),
            ulysses=self.axis(d.ulysses),
        )

    def axis(self, size: int, stride: int = 1) -> Axis:
        """Return this rank's axis of `size` ranks, `stride` apart. Every rank calls this alike."""
        if size in (1, self.world):
            return Axis((self.rank,)) if size == 1 else self.all
        import torch.distributed as dist

        own = Axis()
        for start in range(self.world):
            if start // stride % size:
                continue  # not the first of its axis
            ranks = tuple(start + stride * i for i in range(size))
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks))
            if self.rank in ranks:
                own = Axis(ranks, ranks.index(self.rank), self._groups[ranks])
        return own

    def agree(self, flag: bool) -> bool:
        """Rank 0's flag, on every rank."""
        if self.world == 1:
            return flag
        import torch.distributed as dist

        byte = torch.tensor([flag], dtype=torch.uint8)
        dist.broadcast(byte, src=0, group=self.control)
        return bool(byte.item())

    def any(self, flag: bool) -> bool:
        """Return true on every rank if the flag of any rank is set."""
        if self.world == 1:
            return flag
        import torch.distributed as dist

        byte = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(byte, op=dist.ReduceOp.MAX, group=self.control)
        return bool(byte.item())

    def barrier(self) -> None:
        """Wait until every rank has come this far."""
        self.any(False)

    def share(self, x: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank; the others give one of the same shape and type, which is overwritten."""
        if self.world == 1:
            return x
        import torch.distributed as dist

        x = x.contiguous()
        dist.broadcast(x, src=0)
        return x


def _stay_awake(work: Work) -> None:
    """Let others run until a collective has ended, for a while at most, without going to sleep.

    Ranks are seldom far apart, and a core that went to sleep comes back late, above all on a virtual machine, whose
    host has given it to somebody else.
    """
    until = time.monotonic() + AWAKE_S
    while not work.is_completed() and time.monotonic() < until:
        os.sched_yield()
