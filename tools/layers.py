"""Check the ladder of imports: a module imports only from its own package or from lower rungs.

Usage: python tools/layers.py; exits 1 and lists what climbs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "sgld"
LADDER = [  # a room within a room is named with a dot, and stands on a rung of its own
    {"cli", "deploy"},
    {"server.app"},
    {"server.routes"},
    {"server.service"},
    {"server.jobs", "server.http"},  # neither imports the other
    {"engine"},
    {"worker"},
    {"models", "post"},
    {"nn"},
    {"hub", "platform", "media", "storage", "inputs"},
    {"errors", "convert", "config", "settings", "params", "resolve", "messages", "log", "demo"},
]
RUNG = {name: len(LADDER) - height for height, names in enumerate(LADDER) for name in names}
ONLY_IN = {  # said in one place only: import -> the files that may name it
    "torch.cuda": {"platform.py"},
    "torch.distributed": {"nn/parallel.py", "worker/entry.py"},
    "multiprocessing": {
        "engine/follow.py",
        "engine/forkserver.py",
        "engine/group.py",
        "engine/node.py",
        "worker/entry.py",
        "worker/run_context.py",
        "messages.py",
    },
    "aiohttp": {"server/app.py", "server/service.py", "server/http/", "server/routes/", "cli/serve.py"},
    "os.environ": {"config.py"},
}
NEVER_IN = {"torch": ("server/", "engine/", "cli/", "hub/", "deploy/")}  # the parent never imports torch


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and dotted name of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every attribute such as `os.environ`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def room_of(module: str) -> str:
    """Name the room of a module: `nn` of `sgld.nn.rope`, `server.http` of `sgld.server.http.body`, none of `sgld`."""
    parts = module.split(".")[1:3]
    return ".".join(parts) if ".".join(parts) in RUNG else parts[0] if parts and parts[0] in RUNG else ""


def faults(path: Path, root: Path) -> Iterator[str]:
    """List the faults of one file."""
    relative = path.relative_to(root).as_posix()
    tree = ast.parse(path.read_text())
    own = room_of("sgld." + relative.removesuffix(".py").replace("/", "."))
    if not own and path.name not in ("__init__.py", "__main__.py"):
        yield f"{relative}:1: it is on no rung of the ladder; add it to LADDER"
    for line, name in imports(tree):
        target = room_of(name) if name.split(".")[0] == "sgld" else ""
        if target and own and target != own and not _may_import(own, target):
            yield f"{relative}:{line}: {own} may not import {name}"
    for line, name in [*imports(tree), *dotted(tree)]:
        for thing, places in ONLY_IN.items():
            inside = any(relative == place or (place.endswith("/") and relative.startswith(place)) for place in places)
            if (name == thing or name.startswith(f"{thing}.")) and not inside:
                yield f"{relative}:{line}: {thing} belongs in {', '.join(sorted(places))}"
        for thing, places_barred in NEVER_IN.items():
            if name.split(".")[0] == thing and relative.startswith(places_barred):
                yield f"{relative}:{line}: {thing} may not be imported here"


def _may_import(own: str, target: str) -> bool:
    """Allow lower rungs, and the ground floor among itself."""
    return RUNG[target] < RUNG[own] or RUNG[target] == RUNG[own] == 1


def cycles(root: Path) -> list[str]:
    """List import cycles between modules, function-level imports included."""
    graph: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        name = ".".join(("sgld", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        found = {target for _, target in imports(ast.parse(path.read_text())) if target.startswith("sgld")}
        graph[name] = found
    resolved = {name: {_module(target, graph) for target in found} - {name} for name, found in graph.items()}
    return [f"import cycle through {name}" for name in sorted(resolved) if _reaches(name, name, resolved, set())]


def _module(target: str, graph: dict[str, set[str]]) -> str:
    while target not in graph and "." in target:
        target = target.rpartition(".")[0]
    return target


def _reaches(start: str, goal: str, graph: dict[str, set[str]], seen: set[str]) -> bool:
    for following in graph.get(start, set()) - seen:
        seen.add(following)
        if following == goal or _reaches(following, goal, graph, seen):
            return True
    return False


def check(root: Path = ROOT) -> list[str]:
    """List every fault in the tree under `root`."""
    return [fault for path in sorted(root.rglob("*.py")) for fault in faults(path, root)] + cycles(root)


if __name__ == "__main__":
    found = check()
    print("\n".join(found) or "the ladder stands")
    sys.exit(bool(found))
