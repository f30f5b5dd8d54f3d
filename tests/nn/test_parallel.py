"""Collectives and attention between real ranks, and a world of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sgld.errors import BadRequest
from sgld.messages import RankAssignment
from sgld.nn.attention import TORCH, sdpa
from sgld.nn.parallel import Degrees, Mesh
from sgld.nn.usp import SequenceAttention, merge
from sgld.platform import Cpu
from sgld.settings import Settings
from tests.nn.ranks import on_ranks

TOKENS = (12, 5, 1)  # divides, does not, and leaves ranks without any


def _attention(mesh: Mesh, degrees: Degrees) -> dict[str, float]:
    """How far attention among the ranks is from attention on one, for each number of tokens."""
    mesh = mesh.split(degrees)
    among, split = SequenceAttention(mesh, TORCH), mesh.tokens
    apart: dict[str, float] = {}
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        q, k, v = torch.randn(3, 2, tokens, 4, 8, generator=generator)
        text = torch.randn(3, 2, 7, 4, 8, generator=generator).unbind()
        own = [split.shard(x, 1) for x in (q, k, v)]
        whole = split.gather(among(own[0], own[1], own[2], tokens), 1, tokens)
        apart[f"{tokens} tokens"] = _apart(whole, sdpa(q, k, v))
        picture, words = among.joint(own[0], own[1], own[2], tokens, text)
        joint = torch.cat([split.gather(picture, 1, tokens), words], 1)
        expected = sdpa(*(torch.cat(pair, 1) for pair in zip((q, k, v), text, strict=True)))
        apart[f"{tokens} tokens and text"] = _apart(joint, expected)
    q = torch.randn(2, 12, 4, 8, generator=torch.Generator().manual_seed(0))
    apart["the padding counts"] = _apart(
        sdpa(q, torch.cat([q, 0 * q[:, :1]], 1), torch.cat([q, 0 * q[:, :1]], 1)), sdpa(q, q, q)
    )
    return apart


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("degrees", [
    Degrees(ulysses=2), Degrees(ring=2), Degrees(ulysses=4), Degrees(ring=4), Degrees(ring=2, ulysses=2),
    Degrees(cfg=2, ulysses=2), Degrees(cfg=2, ring=2), Degrees(ring=3),
])  # fmt: skip
def test_attention_among_ranks_is_that_of_one(degrees: Degrees, tmp_path: Path) -> None:
    world = degrees.cfg * degrees.ring * degrees.ulysses
    for apart in on_ranks(world, tmp_path / "store", _attention, degrees):
        control = apart.pop("the padding counts")
        assert max(apart.values()) < 2e-6 < 1e-2 < control, apart


def test_merged_attention_is_that_over_all_keys() -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 8, generator=torch.Generator().manual_seed(1))
    assert TORCH.attend_lse is not None
    out = lse = None
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        out, lse = merge(out, lse, *TORCH.attend_lse(q, k[:, part], v[:, part]))
    assert out is not None
    assert _apart(out, sdpa(q, k, v)) < 1e-6


def _collectives(mesh: Mesh) -> dict[str, Any]:
    every = mesh.all
    x = torch.arange(15.0).view(3, 5)
    own = every.shard(x, 1)
    rows = torch.full((1, 2), float(mesh.rank))
    return {
        "each has as many": own.shape[1],
        "round trip": torch.equal(every.gather(own, 1, 5), x),
        "total": every.total(torch.ones(1)).item(),
        "halo": every.with_halo(rows, 0)[:, 0].tolist(),
        "agree": (mesh.agree(mesh.rank == 0), mesh.agree(mesh.rank == 1)),
        "any": (mesh.any(mesh.rank == 1), mesh.any(False)),
        "passed on": every.pass_on(rows)()[0, 0].item(),
    }


def test_collectives(tmp_path: Path) -> None:
    answers = on_ranks(3, tmp_path / "store", _collectives)
    assert [answer.pop("halo") for answer in answers] == [[0, 0, 1], [0, 1, 2], [1, 2, 0]]
    assert [answer.pop("passed on") for answer in answers] == [2, 0, 1]
    for answer in answers:
        assert answer == {
            "each has as many": 2, "round trip": True, "total": 3, "agree": (True, False), "any": (True, False)
        }  # fmt: skip


def _places(mesh: Mesh) -> dict[str, tuple[int, ...]]:
    mesh = mesh.split(Degrees(cfg=2, ring=1, ulysses=2))
    again = mesh.split(Degrees(cfg=2, ring=2, ulysses=1))
    return {"cfg": mesh.cfg.ranks, "tokens": mesh.tokens.ranks, "ulysses": mesh.ulysses.ranks, "ring": again.ring.ranks}


def test_guidance_branches_are_the_slowest_axis(tmp_path: Path) -> None:
    places = on_ranks(4, tmp_path / "store", _places)
    assert [place["cfg"] for place in places] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    for name in ("tokens", "ulysses", "ring"):
        assert [place[name] for place in places] == [(0, 1), (0, 1), (2, 3), (2, 3)]


@pytest.mark.parametrize(("settings", "heads", "guided", "expected"), [
    ({"num_gpus": 1}, 4, True, Degrees()),
    ({"num_gpus": 2}, 4, True, Degrees(cfg=2)),
    ({"num_gpus": 2}, 4, False, Degrees(ulysses=2)),
    ({"num_gpus": 3}, 4, True, Degrees(ring=3)),
    ({"num_gpus": 4}, 4, True, Degrees(cfg=2, ulysses=2)),
    ({"num_gpus": 4, "enable_cfg_parallel": False}, 4, True, Degrees(ulysses=4)),
    ({"num_gpus": 6, "enable_cfg_parallel": False}, 4, True, Degrees(ring=3, ulysses=2)),
    ({"num_gpus": 4, "ulysses_degree": 2, "ring_degree": 2}, 12, True, Degrees(ring=2, ulysses=2)),
    ({"num_gpus": 4, "ulysses_degree": 2}, 12, True, Degrees(ring=2, ulysses=2)),
    ({"num_gpus": 4, "ring_degree": 4}, 12, True, Degrees(ring=4)),
    ({"num_gpus": 4, "enable_cfg_parallel": True, "ring_degree": 2}, 12, True, Degrees(cfg=2, ring=2)),
    ({"num_gpus": 2, "sp_degree": 2}, 12, True, Degrees(ulysses=2)),
])  # fmt: skip
def test_what_the_settings_leave_open_is_chosen(
    settings: dict[str, Any], heads: int, guided: bool, expected: Degrees
) -> None:
    assert Degrees.of(Settings.of(**settings), heads, guided) == expected


def test_heads_that_do_not_divide_are_an_error_that_names_those_that_do() -> None:
    with pytest.raises(BadRequest, match=r"4 workers cannot share 6 attention heads .*for 4 workers: 1, 2, and ring"):
        Degrees.of(Settings.of(num_gpus=4, ulysses_degree=4), 6, True)
    with pytest.raises(BadRequest, match="^ring_degree: 2 leaves ulysses_degree 3, .*for 6 workers: 3, 6$"):
        Degrees.of(Settings.of(num_gpus=6, ring_degree=2, enable_cfg_parallel=False), 4, True)


def test_a_world_of_one_needs_no_process_group(tmp_path: Path) -> None:
    mesh = Mesh.join(RankAssignment(0, 1, tmp_path / "store"), Cpu())
    x = torch.randn(2, 3)
    assert mesh == Mesh.solo()
    assert mesh.agree(True)
    assert mesh.split(Degrees()) == mesh
    assert torch.equal(mesh.all.gather(mesh.all.shard(x, 1), 1), x)
    mesh.leave()
