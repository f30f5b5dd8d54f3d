"""Collectives between two real ranks, and a world of one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgld.nn.attention import sdpa, ulysses
from sgld.nn.parallel import Mesh
from sgld.platform import Cpu
from tests.nn.ranks import on_ranks


def _collectives(mesh: Mesh) -> dict[str, Any]:
    torch.manual_seed(0)
    x, q, k, v = torch.randn(4, 2, 6, 4, 3)
    own = [mesh.shard(t, 1) for t in (q, k, v)]
    return {
        "round trip": torch.equal(mesh.gather(mesh.shard(x, 1), 1), x),
        "heads": torch.equal(mesh.tokens_to_heads(own[0]), mesh.shard(q, 2)),
        "tokens": torch.equal(mesh.heads_to_tokens(mesh.tokens_to_heads(own[0])), own[0]),
        "attention": float((mesh.gather(ulysses(mesh, sdpa)(*own, None), 1) - sdpa(q, k, v)).abs().max()),
        "agree": (mesh.agree(mesh.rank == 0), mesh.agree(mesh.rank == 1)),
    }


def test_collectives(tmp_path: Path) -> None:
    for answer in on_ranks(2, tmp_path / "store", _collectives):
        assert answer.pop("attention") < 1e-6
        assert answer == {"round trip": True, "heads": True, "tokens": True, "agree": (True, False)}


def test_a_world_of_one_needs_no_process_group(tmp_path: Path) -> None:
    mesh = Mesh.join(0, 1, tmp_path / "store", Cpu(), 1)
    x: Tensor = torch.randn(2, 3)
    assert mesh == Mesh.solo()
    assert mesh.agree(True)
    assert torch.equal(mesh.gather(mesh.shard(x, 1), 1), x)
    mesh.leave()
