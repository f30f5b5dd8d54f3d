"""The support matrix says what the tests prove, and nothing else."""

import subprocess
import sys

from tools.matrix import README, ROOT, table


def test_the_readme_is_what_the_tests_prove() -> None:
    command = [sys.executable, str(ROOT / "tools/matrix.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_no_test_proves_is_not_said() -> None:
    row = next(line for line in table({"WanPipeline": {"LoRA"}}).splitlines() if "`WanPipeline`" in line)
    assert row.split(" | ")[1:4] == ["unproved", "yes", ""]
    assert row not in README.read_text()
