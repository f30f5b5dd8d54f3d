"""The ladder of imports stands, and its check does see what breaks it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools/layers.py"


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(root: Path, **modules: str) -> Path:
    """A package of modules, `nn__rope` being nn/rope.py."""
    for name, text in modules.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_ladder_stands(layers: ModuleType) -> None:
    assert layers.check() == []


def test_a_sound_tree_has_no_fault(layers: ModuleType, tmp_path: Path) -> None:
    root = tree(tmp_path, cli__a="from sgld.server import app", server__app="import sgld.errors", errors="import os")
    assert layers.check(root) == []


@pytest.mark.parametrize(
    ("modules", "fault"),
    [
        ({"nn__rope": "from sgld.models import wan", "models__wan": ""}, "nn/rope.py:1: nn may not import sgld.models"),
        ({"nn__rope": "def f():\n    import sgld.server.app", "server__app": ""},
         "nn/rope.py:2: nn may not import sgld.server"),
        ({"server__jobs__a": "import sgld.server.service", "server__service": ""},
         "server/jobs/a.py:1: server.jobs may not import sgld.server.service"),
        ({"server__jobs__a": "import sgld.server.http.b", "server__http__b": ""},
         "server/jobs/a.py:1: server.jobs may not import sgld.server.http.b"),
        ({"server__http__a": "import sgld.server.jobs.b", "server__jobs__b": ""},
         "server/http/a.py:1: server.http may not import sgld.server.jobs.b"),
        ({"server__jobs__a": "import aiohttp"}, "server/jobs/a.py:1: aiohttp belongs in cli/serve.py, server/app.py"),
        ({"models__a": "from sgld.post import b", "post__b": ""}, "models/a.py:1: models may not import sgld.post"),
        ({"loose": "import os"}, "loose.py:1: it is on no rung"),
        ({"server__routes__a": "import torch"}, "server/routes/a.py:1: torch may not be imported here"),
        ({"nn__a": "import torch\ntorch.cuda.empty_cache()"}, "nn/a.py:2: torch.cuda belongs in platform.py"),
        ({"cli__a": "import os\nos.environ"}, "cli/a.py:2: os.environ belongs in config.py"),
    ],
    ids=[
        "climb", "climb in a function", "rooms", "jobs to http", "http to jobs", "aiohttp in jobs", "sideways",
        "no rung", "torch in the parent", "torch.cuda", "os.environ",
    ],
)  # fmt: skip
def test_a_climb_is_seen(layers: ModuleType, modules: dict[str, str], fault: str, tmp_path: Path) -> None:
    found = layers.check(tree(tmp_path, **modules))
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_a_cycle_is_seen(layers: ModuleType, tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        nn__a="from sgld.nn import b",
        nn__b="def f():\n    from sgld.nn.c import g",
        nn__c="import sgld.nn.a",
        nn__d="import sgld.nn.a",
    )
    assert layers.check(root) == [f"import cycle through sgld.nn.{name}" for name in "abc"]
