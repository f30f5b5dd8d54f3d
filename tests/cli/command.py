"""Run the real command of this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QUICK = ("--num-inference-steps", "2", "--num-frames", "5")


def sgld(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`sgld ...` in `folder`, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "sgld", *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=150,
        check=False,
    )


def start(*words: str, folder: Path) -> subprocess.Popen[str]:
    """`sgld ...` in `folder`, in a session of its own, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "sgld", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
