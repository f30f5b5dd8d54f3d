"""The limits of the house: each check passes at its limit, and names the place of what goes beyond it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/house.py"
CODE_LINES, TEST_LINES = (
    int(found) for found in re.findall(r"^(?:CODE|TEST)_LINES = ([0-9_]+)", TOOL.read_text(), re.MULTILINE)
)


def measure(root: Path) -> tuple[int, str]:
    """Run the tool on a checkout; return its exit code and what it prints."""
    command = [sys.executable, str(TOOL), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def checkout(root: Path, files: dict[str, str]) -> Path:
    """Write a checkout of these files of sgld/nn/, or of the folders that they name."""
    for name, text in {"__init__.py": "", **files}.items():
        folder = root if name.startswith("tests/") else root / "sgld" if "/" in name else root / "sgld/nn"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def a_class(name: str, fields: int = 0, methods: int = 0) -> str:
    parts = [f"    x{n}: int" for n in range(fields)] + [f"    def m{n}(self): ..." for n in range(methods)]
    return "\n".join([f"class {name}:", "    c: ClassVar[int]", *parts, ""])


def a_function(lines: int, docstring: str = "Return nothing.") -> str:
    return "\n".join(
        ["def f():", f'    """{docstring}"""', *["    g()  # a comment", "", "    # a comment"] * (lines - 1)]
    )


def many_files(code_lines: int) -> dict[str, str]:
    whole, rest = divmod(code_lines, 500)
    return {f"f{n}.py": "g()\n" * size for n, size in enumerate([500] * whole + [rest])}


def docstrings(*texts: str) -> str:
    return "\n".join(f'def f{n}():\n    """{text}"""' for n, text in enumerate(texts))


GOOD = ("Return the room.", "Name the room.", "Load, then run.")
LIMITS = [  # a name, what is just allowed, what is not, and the place that is printed
    ("code lines", many_files(CODE_LINES), many_files(CODE_LINES + 1), "f0.py 500"),
    ("lines of the longest file", {"a.py": "# b\n" * 500}, {"a.py": "# b\n" * 501}, "sgld/nn/a.py: 501 lines"),
    ("fields of a class", {"a.py": a_class("A", 25)}, {"a.py": a_class("A", 26)}, "sgld/nn/a.py:1: A has 26 fields"),
    ("fields of a class", {"a.py": a_class("SamplingParams", 26)}, {"a.py": a_class("SamplingParams", 25)},
     "SamplingParams has 25 fields: it needs no exemption"),
    ("methods of a class", {"a.py": a_class("A", 0, 20)}, {"a.py": a_class("A", 0, 21)},
     "sgld/nn/a.py:1: A has 21 methods"),
    ("methods of a class", {"a.py": a_class("DiffusionModel", 0, 21)}, {"a.py": a_class("DiffusionModel", 0, 20)},
     "DiffusionModel has 20 methods: it needs no exemption"),
    ("public class names used twice", {"a.py": a_class("_A"), "b.py": a_class("_A")},
     {"a.py": a_class("A"), "b.py": a_class("A")}, "sgld/nn/b.py:1: A is also sgld/nn/a.py:1"),
    ("imperative docstrings, %", {"a.py": docstrings(*GOOD, "The room.", "A room.")},
     {"a.py": docstrings(*GOOD[:1], "Name of the room.")}, "sgld/nn/a.py:3: f1: Name of ..."),
    ("lines of the longest function", {"a.py": a_function(40)}, {"a.py": a_function(41)},
     "sgld/nn/a.py:1: f has 41 lines"),
    ("Any per 1,000 lines", {"a.py": "a: Any\n" + "#\n" * 99}, {"a.py": "a: Any\n" + "#\n" * 50}, "sgld/nn/a.py: 1"),
    ("imports against the ladder", {"cli/a.py": "import sgld.nn.b", "nn/b.py": ""},
     {"cli/a.py": "", "nn/b.py": "import sgld.cli.a"}, "nn/b.py:1: nn may not import sgld.cli.a"),
    ("lines of tests", {"tests/a.py": "#\n" * TEST_LINES}, {"tests/a.py": "#\n" * (TEST_LINES + 1)},
     f"tests/: {TEST_LINES + 1:,} lines"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "allowed", "beyond", "place"), LIMITS, ids=lambda value: value if type(value) is str else ""
)
def test_a_limit(name: str, allowed: dict[str, str], beyond: dict[str, str], place: str, tmp_path: Path) -> None:
    code, printed = measure(checkout(tmp_path / "allowed", allowed))
    assert (code, "OVER" in printed) == (0, False)
    code, printed = measure(checkout(tmp_path / "beyond", beyond))
    table, _, faults = printed.partition("\n\n")
    assert code == 1
    assert [line.split("|")[1].strip() for line in table.splitlines() if "OVER" in line] == [name]
    assert faults.startswith(f"{name}:")
    assert place in faults


@pytest.mark.parametrize(
    "first", ["Returns the", "What is", "Whether it", "The room", "State of", "Names the", "Room in"]
)
def test_what_is_no_imperative(first: str, tmp_path: Path) -> None:
    code, printed = measure(checkout(tmp_path, {"a.py": docstrings(f"{first} thing.")}))
    assert code == 1
    assert f"f0: {first}" in printed


def test_the_figures_of_functions(tmp_path: Path) -> None:
    lengths = [*[1] * 10, *[7] * 9, 20]
    text = "\n".join(a_function(length).replace("def f", f"def f{n}") for n, length in enumerate(lengths))
    assert "| function median / p95 lines    |     4 / 7 |" in measure(checkout(tmp_path, {"a.py": text}))[1]


def test_this_checkout_is_measured() -> None:
    printed = subprocess.run(
        [sys.executable, str(TOOL)], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    assert "| imports against the ladder     |         0 |       0 |      |" in printed
