"""Every example runs, as a user would run it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("1", "2", "31_", "4", "finetune_")
EXAMPLES = [
    pytest.param(file, marks=[pytest.mark.slow] if file.name.startswith(SLOW) else [])
    for file in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example_runs(file, forked, clean_environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = forked([file, "--smoke"], tmp_path / "out", tmp_path / "err")
    child.join(300)
    assert child.exitcode == 0, (tmp_path / "err").read_text()
    told = (tmp_path / "out").read_text()
    assert "images/s" in told or "skipped" in told
