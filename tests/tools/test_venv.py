"""tools/venv, as far as it comes without the network: what it reuses, and what it makes anew."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/venv"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the tool, in a project that cannot be installed."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/venv").write_bytes(TOOL.read_bytes())
    (tmp_path / "pyproject.toml").write_text("no toml")
    (tmp_path / "constraints.txt").touch()
    return tmp_path


def run(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/venv"], cwd=project, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=150, check=False,
    )  # fmt: skip


def finish(project: Path, pip: bool = True) -> None:
    """A .venv that holds everything it should, or one without pip, as an interrupted first run leaves it."""
    venv.create(project / ".venv", symlinks=True)
    if pip:
        packages = project / f".venv/lib/python3.{sys.version_info[1]}/site-packages/pip"
        packages.mkdir()
        (packages / "__main__.py").touch()
    (project / ".venv/.sgld-run").write_text(hashlib.sha256((project / "pyproject.toml").read_bytes()).hexdigest())


def test_a_finished_one_is_reused(project: Path) -> None:
    finish(project)
    done = run(project, PYTHON=sys.executable)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_without_pip_is_made_anew(project: Path) -> None:
    finish(project, pip=False)
    done = run(project, PYTHON=sys.executable)
    assert "making .venv with Python 3." in done.stderr
    assert "pip could not install" in done.stderr
    pip = subprocess.run([project / ".venv/bin/python", "-m", "pip", "--version"], capture_output=True, check=False)
    assert pip.returncode == 0


def test_another_version_of_python_is_told_and_not_kept(project: Path) -> None:
    finish(project)
    newer = project / "newer"  # says that it is 3.13, and can make no venv
    newer.write_text('#!/bin/sh\ncase "$2" in *print*) echo "Python 3.13";; *exit*) ;; *) exit 1;; esac\n')
    newer.chmod(0o755)
    done = run(project, PYTHON=str(newer))
    first, last = done.stderr.splitlines()
    has = f"Python 3.{sys.version_info[1]}"
    assert first == f".venv has {has}, and PYTHON={newer} is Python 3.13: making .venv anew"
    assert last.startswith(f"error: {newer} has no venv or no pip")


def test_a_python_that_is_not_there(project: Path) -> None:
    finish(project)
    done = run(project, PYTHON="/no/such/python")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11 to 3.13 is needed (/no/such/python: not found)")
    assert len(done.stderr.splitlines()) == 1
