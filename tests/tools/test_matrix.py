"""The support matrix says what the tests prove, and nothing else."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from sgld.models import REGISTRY
from tests.models.parity import load
from tools.matrix import END, PAGE, ROOT, START, table
from tools.tiny import makers


def test_the_page_is_what_the_tests_prove() -> None:
    command = [sys.executable, str(ROOT / "tools/matrix.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_task_that_a_model_lists_is_proved(tmp_path: Path) -> None:
    listed: defaultdict[str, set[str]] = defaultdict(set)
    for name, make in makers().items():
        index = make(tmp_path / name) / "model_index.json"
        if index.is_file() and json.loads(index.read_text())["_class_name"] in REGISTRY:
            info = load(tmp_path / name).info
            listed[info.name].update(info.tasks, ["audio"] if info.audio else [])
    listed["LTX2ImageToVideoPipeline"] = listed["LTX2Pipeline"]  # another name of the same model
    assert listed.keys() == REGISTRY.keys()
    matrix = PAGE.read_text().partition(START)[2].partition(END)[0]
    rows = (row.split(" | ") for row in matrix.splitlines() if "`" in row)
    assert {row[0].strip("| `"): set(row[1].split(", ")) for row in rows} == listed


def test_what_no_test_proves_is_not_said() -> None:
    row = next(line for line in table({"WanPipeline": {"LoRA"}}).splitlines() if "`WanPipeline`" in line)
    assert row.split(" | ")[1:4] == ["unproved", "yes", ""]
    assert row not in PAGE.read_text()
