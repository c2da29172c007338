"""The script for a machine with a GPU must never rot: it runs to its end on a CPU, too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_script_runs_to_its_end_without_a_gpu(tmp_path, clean_environment):
    options = ["--device", "cpu", "--tiny", "--minutes", "20", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=clean_environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())
    assert not list(tmp_path.glob("ray.json"))  # it is in there
    assert set(parts) == {
        "tests", "scores", "extraction", "overlap", "ray", "finetuning", "truth"
    }  # fmt: skip
    for name, part in parts.items():
        assert part["error"] is None
        assert part["rows"] or part["skipped"], name
    rows = {row["what"]: row["value"] for part in parts.values() for row in part["rows"]}
    assert rows["2 actors: difference to the local run"] == 0
    assert rows["one actor killed: backbones that failed"] == 0
    assert rows["resumed: best weights bit for bit"] == "True"


def test_without_a_gpu_it_says_how_to_try_it(clean_environment):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda:77"], env=clean_environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--device cpu --tiny" in done.stderr
