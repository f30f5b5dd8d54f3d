"""The support matrix of docs/models.md: each pipeline of the registry, and what a test proves of it.

python tools/matrix.py           writes it between its two marks
python tools/matrix.py --check   fails where it is not what stands there

A test says what it proves: `@pytest.mark.proves("WanPipeline", "text-to-video", "LoRA")`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from sgld.models import REGISTRY

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
START, END = "<!-- matrix -->\n", "<!-- /matrix -->\n"
FEATURES = ("LoRA", "USP", "CFG parallel", "offload", "previews", "quantization", "step cache")
TASKS = ("text-to-image", "image-to-image", "text-to-video", "image-to-video", "audio")


class Collector:
    """A plugin of pytest that reads the marks."""

    def __init__(self) -> None:
        self.proved: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All tests are known."""
        for item in session.items:
            for mark in item.iter_markers("proves"):
                pipeline, *features = mark.args
                if pipeline not in REGISTRY:
                    raise pytest.UsageError(f"{item.nodeid}: proves something of {pipeline!r}, which is not registered")
                if unknown := set(features) - {*FEATURES, *TASKS}:
                    raise pytest.UsageError(f"{item.nodeid}: proves {sorted(unknown)}; known: {(*TASKS, *FEATURES)}")
                self.proved[pipeline].update(features)


def collect() -> dict[str, set[str]]:
    """By pipeline, what tests prove."""
    collector, told = Collector(), io.StringIO()
    with contextlib.redirect_stdout(told):
        folders = [str(ROOT / "tests" / name) for name in ("models", "nn", "worker")]
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *folders], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise SystemExit(told.getvalue())
    return dict(collector.proved)


def table(proved: dict[str, set[str]]) -> str:
    """The matrix in Markdown."""
    rows = [["pipeline", "makes", *FEATURES], ["---"] * (2 + len(FEATURES))]
    for pipeline in sorted(REGISTRY):
        found = proved.get(pipeline, set())
        tasks = ", ".join(task for task in TASKS if task in found) or "unproved"
        rows.append([f"`{pipeline}`", tasks, *("yes" if feature in found else "" for feature in FEATURES)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = PAGE.read_text()
    before, rest = text.split(START)
    made = before + START + table(collect()) + END + rest.split(END)[1]
    if check and made != text:
        sys.exit("docs/models.md: the support matrix is not what the tests prove; run python tools/matrix.py")
    if not check:
        PAGE.write_text(made)


if __name__ == "__main__":
    main()
