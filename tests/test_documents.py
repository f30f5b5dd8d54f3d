"""The documents: their commands are accepted as written, and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sgld import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in BLOCK.findall(page.read_text())
    for line in block.splitlines()
    if re.match(r"(node \d \$ )?sgld (generate|serve)", line)
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_accepted(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, *words = shlex.split(line.partition("$ ")[2] or line, comments=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli.dispatch([*words, "--print-config"]) == 0, capsys.readouterr().err


def test_there_are_commands_of_both_kinds() -> None:
    assert {line.split()[1] for _, line in COMMANDS} >= {"generate", "serve"} and len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    files = [link for link in links if not link.startswith("http")]
    assert [link for link in files if not (page.parent / link).exists()] == []
    assert not [name for name in re.findall(r"`((?:tools|tests|configs)/[\w./-]+)`", page.read_text())
                if not (ROOT / name).exists()]  # fmt: skip


def test_the_readme_fits_its_limit() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 160
