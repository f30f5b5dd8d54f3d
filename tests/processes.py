"""The processes of a command under test."""

from __future__ import annotations

import psutil


def ranks_of(pid: int | None) -> list[psutil.Process]:
    """Return the ranks below that process, by their names."""
    return [child for child in psutil.Process(pid).children(recursive=True) if child.name().startswith("sgld-rank")]
