"""constraints.txt pins whatever pyproject.toml names, and whatever that brings."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OF_TORCH = ("nvidia-", "cuda-", "triton")  # what its CUDA wheels choose for themselves


def named() -> list[str]:
    """The requirements of the project, all extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]


def brought(requirements: Iterable[str]) -> set[str]:
    """Every distribution that these need here, by what the installed ones say of themselves."""
    todo = [Requirement(text) for text in requirements]
    done: dict[str, set[str]] = {}  # name -> extras
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        extras = {"", *one.extras}
        if extras <= done.get(name, set()):
            continue
        done[name] = extras | done.get(name, set())
        further = [Requirement(text) for text in requires(one.name) or []]
        todo += [r for r in further if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name in done if not name.startswith(OF_TORCH)}


def pins() -> list[str]:
    return [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]


def test_every_dependency_is_pinned() -> None:
    assert brought(named()) - set(pins()) == set()


def test_the_pins_are_in_order() -> None:
    assert pins() == sorted(set(pins()))


def test_an_unpinned_one_would_be_seen() -> None:
    assert {"aiohttp", "yarl"} <= brought(["aiohttp"])
    assert "pip" in brought(["aiohttp", "pip"]) - set(pins())
