"""Budgets where the time of day jumps."""

import glob
import json
import os
import random
import subprocess
import sys
import time

import pytest
from chaos_lab import BACKBONES, trials

LIBRARY = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")


@trials(1)
@pytest.mark.skipif(not LIBRARY, reason="no libfaketime (apt-get install faketime)")
def test_a_budget(seed, tmp_path, clean_environment):
    """Days forth and back, several times a second, also for the workers."""
    rng, budget, run = random.Random(seed), 20, tmp_path / "run"
    now = tmp_path / "now"
    now.write_text("+0")
    environment = clean_environment | {
        "LD_PRELOAD": LIBRARY[0], "FAKETIME_TIMESTAMP_FILE": str(now), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1",
    }  # fmt: skip
    command = [
        "search", "digits", "--backbones", BACKBONES[0], "--budget", f"{budget}s", "--epochs",
        400, "--samples", 100, "--device", "cpu", "-q", "--out", run,
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "sfda_tune", *map(str, command)],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    begun, until = None, time.monotonic() + 120
    try:
        while child.poll() is None and time.monotonic() < until:
            if begun is None and (run / "search.json").is_file():
                begun = time.monotonic()
            new = tmp_path / "new"
            new.write_text(f"{rng.randint(-400, 400):+d}d")
            os.replace(new, now)
            time.sleep(0.2)
    finally:
        child.kill()
        child.wait()
    text = (tmp_path / "log").read_text(errors="replace")
    assert child.returncode == 0, text
    assert begun is not None
    assert time.monotonic() - begun < budget + 5
    state = json.loads((run / "search.json").read_text())
    assert state["status"] == "budget spent"
    assert budget / 2 < state["seconds"]["total"] < budget * 1.2
    assert any(abs(t["started"] - time.time()) > 86400 for t in state["trials"])  # it did jump
    assert all(0 <= t["seconds"] < 2 * budget for t in state["trials"])
