"""Every example runs, as a user would run it."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("03_", "06_", "1", "2", "31_", "4", "finetune_")
EXAMPLES = [
    pytest.param(file, marks=[pytest.mark.slow] if file.name.startswith(SLOW) else [])
    for file in sorted((ROOT / "examples").glob("*.py"))
]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example_runs(file, forked, clean_environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # at 15 other tests starve the workers
    child = forked([file, "--smoke"], tmp_path / "out", tmp_path / "err")
    child.join(300)
    assert child.exitcode == 0, (tmp_path / "err").read_text()
    told = (tmp_path / "out").read_text()
    assert "images/s" in told or "skipped" in told


@pytest.mark.slow
def test_the_tutorial_runs_and_shows_what_it_gave(
    forked, clean_environment, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    script = tmp_path / "tutorial.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in code))
    child = forked([script], tmp_path / "out", tmp_path / "err")
    child.join(300)
    assert child.exitcode == 0, (tmp_path / "err").read_text()
    told = (tmp_path / "out").read_text()
    assert "convnext_tiny.fb_in1k" in told
    assert "test images" in told
