"""Every example runs, as a user would run it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("1", "2", "31_", "4", "finetune_")
EXAMPLES = [
    pytest.param(file, marks=[pytest.mark.slow] if file.name.startswith(SLOW) else [])
    for file in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example_runs(file, clean_environment, tmp_path):
    done = subprocess.run(
        [sys.executable, str(file), "--smoke"],
        capture_output=True, text=True, env=clean_environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout or "skipped" in done.stdout
